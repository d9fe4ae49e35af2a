"""Supernets: shared weights of which one path runs at a time, and the plain networks that come out of them.

Parameter names are those of the published SPOS code, so that its checkpoints load and ours read alike:
``first_conv.*``, ``features.<block>.<choice>.*`` (without ``<choice>`` in a plain network), ``conv_last.*``,
``classifier.0.*``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spos_fast.architecture import Architecture
from spos_fast.errors import CheckpointError

# What a block of a supernet is called with beside its input.
Setting = int | tuple[int, ...]
# A block of a route: the index of its candidate and its setting.
Step = tuple[int, Setting]


class Network(nn.Module):
    """A plain single-path network: stem, one block a layer, head.

    Args:
        first_conv: stem.
        features: blocks in order.
        conv_last: last convolution before the global average pool.
        classifier: from pooled features to logits.
        dropout: probability before the classifier.
    """

    def __init__(
        self,
        first_conv: nn.Module,
        features: Sequence[nn.Module],
        conv_last: nn.Module,
        classifier: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.first_conv = first_conv
        self.features = nn.Sequential(*features)
        self.conv_last = conv_last
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, classes]``."""
        x = self.conv_last(self.features(self.first_conv(x)))
        return self.classifier(self.dropout(x.mean((2, 3))))


class Supernet(nn.Module):
    """All candidates of every block; ``net(x, arch)`` runs the one that the architecture names, and touches no other.

    Parameters off the path keep ``grad`` None, so the optimiser neither decays them nor moves their momentum, and no
    memory is spent on their gradients. A block that runs narrower than it is stored uses the first of its channels:
    the gradient of the others is zero, the optimiser's decay and momentum go on in them.

    Args:
        first_conv, conv_last, classifier, dropout: as in :class:`Network`.
        features: for every block its candidates, called with their input and a setting.
        route: for every block of an architecture the index of its candidate and the setting that it runs with (a number
            of mid channels, a pair of bit-widths, ...): an integer, or a tuple of integers, of one form a layer. Raises
            ``InputError`` if the architecture is not of the space.
        build: builds the plain :class:`Network` of an architecture (``space.build``).
        entries: for a block and its setting, by name, the entry of those vectors of which the block holds many and the
            plain network one (steps of several bit-widths); None where there are none. All else of the plain network is
            the first part of what the block holds.
    """

    def __init__(
        self,
        first_conv: nn.Module,
        features: Sequence[Sequence[nn.Module]],
        conv_last: nn.Module,
        classifier: nn.Module,
        dropout: float,
        *,
        route: Callable[[Architecture], Sequence[Step]],
        build: Callable[[Architecture], nn.Module],
        entries: Callable[[nn.Module, Setting], dict[str, int]] | None = None,
    ) -> None:
        super().__init__()
        self.first_conv = first_conv
        self.features = nn.ModuleList(nn.ModuleList(candidates) for candidates in features)
        self.conv_last = conv_last
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier
        self._route = route
        self._build = build
        self._entries = entries

    def path(self, arch: Architecture) -> list[nn.Module]:
        """The modules that the architecture runs, in order, from the stem to the classifier.

        Raises:
            InputError: the architecture is not of this supernet's space.
        """
        blocks = [block for block, _ in self._blocks(arch)]
        return [self.first_conv, *blocks, self.conv_last, self.dropout, self.classifier]

    def route(self, arch: Architecture) -> list[Step]:
        """For every block the index of its candidate in :attr:`features` and the setting that it runs with.

        Raises:
            InputError: the architecture is not of this supernet's space.
        """
        return list(self._route(arch))

    def _blocks(self, arch: Architecture) -> list[tuple[nn.Module, Setting]]:
        """The blocks of the path and their settings."""
        routed = zip(self.features, self._route(arch), strict=True)
        return [(candidates[choice], setting) for candidates, (choice, setting) in routed]  # type: ignore[index]

    def forward(self, x: Tensor, arch: Architecture) -> Tensor:
        """Images ``[N, C, H, W]`` through the path of ``arch`` to logits ``[N, classes]``.

        Raises:
            InputError: the architecture is not of this supernet's space.
        """
        blocks = self._blocks(arch)
        x = self.first_conv(x)
        for block, setting in blocks:
            x = block(x, setting)
        return self.classify(self.conv_last(x))

    def classify(self, x: Tensor) -> Tensor:
        """What :attr:`conv_last` makes, ``[N, C, H, W]``, to logits ``[N, classes]``."""
        return self.classifier(self.dropout(x.mean((2, 3))))

    def extract(self, arch: Architecture) -> nn.Module:
        """A plain network with the path's weights and statistics (copies); its output equals the path's.

        Batch normalisation becomes affine, with scale 1 and shift 0, so that the network can be trained on.

        Raises:
            InputError: the architecture is not of this supernet's space.
        """
        route = self._route(arch)
        reference = next(self.parameters())
        plain = self._build(arch).to(device=reference.device, dtype=reference.dtype)
        state = plain.state_dict()
        entries = [self._entries(*block) if self._entries else {} for block in self._blocks(arch)]
        for name, value in state.items():
            source, entry = name, None
            if name.startswith("features."):
                _, block, rest = name.split(".", 2)
                source = f"features.{block}.{route[int(block)][0]}.{rest}"
                entry = entries[int(block)].get(rest)
            state[name] = _own_tensor(self, source, value, entry)
        plain.load_state_dict(state)
        if reference.dim() == 4 and not reference.is_contiguous():
            plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return plain.train(self.training)

    def load_published(self, path: str | Path) -> None:
        """Load the published SPOS supernet checkpoint, tensors only.

        A ``state_dict`` entry and the ``module.`` prefix of DataParallel are seen through. Statistics that the file
        lacks stay as they are: a search recalibrates them anyway.

        Raises:
            CheckpointError: unreadable file, or keys or shapes of another network; nothing is loaded then.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such checkpoint") from None
        except Exception as error:  # torch raises many types for a damaged or foreign file
            raise CheckpointError(f"{path}: not a readable checkpoint of tensors ({type(error).__name__})") from None
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
        given = {str(name).removeprefix("module."): value for name, value in content.items()}
        own = self.state_dict()
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        missing = [name for name in own if name not in given and not name.endswith(statistics)]
        foreign = [name for name in given if name not in own]
        wrong = [name for name in given if name in own and given[name].shape != own[name].shape]
        for names, what in (
            (missing, "is missing"),
            (foreign, "is not of this supernet"),
            (wrong, "has another shape"),
        ):
            if names:
                detail = (
                    f" ({tuple(given[names[0]].shape)}, expected {tuple(own[names[0]].shape)})"
                    if names is wrong
                    else ""
                )
                raise CheckpointError(f"{path}: {names[0]} {what}{detail}; {len(names)} such keys in all")
        self.load_state_dict(given, strict=False)


def _own_tensor(net: nn.Module, name: str, default: Tensor, entry: int | None) -> Tensor:
    """A parameter or buffer of ``net``, cut to the size of ``default``, from an entry on if that is given; the
    supernet's non-affine normalisation has no scale (1) and no shift (0).
    """
    owner, _, leaf = name.rpartition(".")
    value = getattr(net.get_submodule(owner), leaf)
    if value is None:
        return torch.ones_like(default) if leaf == "weight" else torch.zeros_like(default)
    value = value.detach()[entry or 0 :] if value.dim() else value.detach()
    return value[tuple(slice(size) for size in default.shape)].clone()
