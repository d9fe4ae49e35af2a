"""A quantizer of activations as a module, and what all quantizing layers share: bit-widths and where steps start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spos_fast.errors import InputError
from spos_fast.ops import fake_quant
from spos_fast.ops.quantizers import MODES

Bits = int | Sequence[int]
Index = int | Tensor

# Mean magnitude of a standard normal value, and of one behind a ReLU.
_MEAN_NORMAL = math.sqrt(2 / math.pi)
_MEAN_RECTIFIED = 1 / math.sqrt(2 * math.pi)


class QuantAct(nn.Module):
    """Fake-quantizes activations with a learned step: see :func:`spos_fast.ops.fake_quant`.

    Steps start at LSQ's ``2 mean|x| / sqrt(high)`` (a single signed bit: ``mean|x|``) of a standard normal input,
    behind a ReLU unless ``signed``; PACT's clipping level at ``high`` such steps. :func:`initialize_steps` takes them
    from data.

    Args:
        bits: 1 to 8, or a list of all that can be chosen at a call.
        quantizer: pact, pact_residual, lsq or lsq+.
        signed: whether codes are signed (lsq and lsq+ only); otherwise negative values become 0.
        channels: None for one step, or the number of channels for a step each.

    Attributes:
        step: [K], or [K, channels], an entry for each of the K bit-widths: PACT's clipping level or LSQ's step;
            float32 (float64 after ``double()``), also where ``half()`` or the like is called.
        offset: likewise, of lsq+; else None.

    Raises:
        InputError: bits out of range, or a quantizer that is not there.
    """

    bits_vector: Tensor
    offset: nn.Parameter | None

    def __init__(
        self, bits: Bits, *, quantizer: str = "pact", signed: bool = False, channels: int | None = None
    ) -> None:
        super().__init__()
        self.bits = checked_bits("bits", bits)
        check_name("quantizer", quantizer, MODES)
        if signed and quantizer.startswith("pact"):
            raise InputError(f"signed: {quantizer} clips at 0 and has unsigned codes; use lsq or lsq+")
        self.quantizer, self.signed, self.channels = quantizer, signed, channels
        self.register_buffer("bits_vector", torch.tensor(self.bits, dtype=torch.int32), persistent=False)
        shape = [len(self.bits)] if channels is None else [len(self.bits), channels]
        self.step = nn.Parameter(torch.empty(shape))
        self.register_parameter("offset", nn.Parameter(torch.zeros(shape)) if quantizer == "lsq+" else None)
        self.start_at(torch.tensor(_MEAN_NORMAL if signed else _MEAN_RECTIFIED))

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> None:
        """Set all steps from the mean magnitude of the values, [] or [channels]."""
        starts = start_steps(self.bits, mean, self.signed)
        if self.quantizer.startswith("pact"):
            starts = [start * (2**k - 1) for start, k in zip(starts, self.bits, strict=True)]
        for entry, start in zip(self.step, starts, strict=True):
            entry.copy_(start)

    def forward(self, x: Tensor, index: Index = 0) -> Tensor:
        """The values of x rounded to the codes of the bit-width with this index, an int or an integer tensor []."""
        axis = None if self.channels is None else 1
        return fake_quant(
            x,
            self.step,
            self.bits_vector,
            index=index,
            mode=self.quantizer,
            signed=self.signed,
            offset=self.offset,
            axis=axis,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantAct:
        return super()._apply(keeping_precision(fn), recurse)

    def extra_repr(self) -> str:
        """Bits and quantizer."""
        return f"bits={list(self.bits)}, quantizer={self.quantizer}" + (", signed" if self.signed else "")


def keeping_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a module does to its tensors, for vectors of steps: they move with it, but not to half precision, in which
    most updates of a step would round to nothing and which the ops do not take.
    """

    def apply(vector: Tensor) -> Tensor:
        made = fn(vector)
        if made.is_floating_point() and made.dtype not in (torch.float32, torch.float64):
            return vector.to(made.device, torch.float32)
        return made

    return apply


def checked_bits(name: str, bits: Bits) -> tuple[int, ...]:
    """One or several bit-widths as an ascending tuple.

    Raises:
        InputError: none, one out of 1 .. 8, or not ascending.
    """
    several = (bits,) if isinstance(bits, int) else tuple(bits)
    if not several or any(not isinstance(k, int) or not 1 <= k <= 8 for k in several):
        raise InputError(f"{name} must be from 1 to 8, or a list of such, got {bits}")
    if list(several) != sorted(set(several)):
        raise InputError(f"{name} must be ascending, each once, got {list(several)}")
    return several


def start_steps(bits: Sequence[int], mean: Tensor, signed: bool) -> list[Tensor]:
    """LSQ's first step for every bit-width from the mean magnitude: 2 mean / sqrt(high).

    A single signed bit is the sign times the step, for which the mean magnitude itself is the best there is.
    """
    if not signed:
        return [2 * mean / math.sqrt(2**k - 1) for k in bits]
    return [mean if k == 1 else 2 * mean / math.sqrt(2 ** (k - 1) - 1) for k in bits]


def check_name(argument: str, name: str, names: Sequence[str]) -> None:
    """Refuse a quantizer that is not among these."""
    if name not in names:
        raise InputError(f"{argument} must be one of {', '.join(names)}, got {name}")
