"""ShuffleUnit on the fused op: the same results, statistics and hooks as its plain modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spos_fast import ops
from spos_fast.calibration import MODES, recalibrate
from spos_fast.nn import ShuffleUnit, XceptionUnit, fused
from spos_fast.ops.dispatch import OPS

LAST = torch.channels_last


UNITS = {
    "shuffle": (ShuffleUnit, (12, 12, 10, 5), "shuffle_unit"),
    "shuffle stride 2": (ShuffleUnit, (12, 26, 10, 3, 2), "shuffle_unit"),
    "shuffle widening": (ShuffleUnit, (12, 26, 10, 3, 1), "shuffle_unit"),
    "xception": (XceptionUnit, (12, 12, 10), "xception_unit"),
    "xception stride 2": (XceptionUnit, (12, 26, 10, 2), "xception_unit"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every op of a unit that is called, with gradients or without."""
    found: list[str] = []
    below_autograd = fused.below_autograd

    def counted_below(name: str, *args: Any) -> Any:
        if name != "bn_update_running":
            found.append(name)
        return below_autograd(name, *args)

    def counted(name: str) -> Any:
        plain = getattr(ops, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return plain(*args, **kwargs)

        return run

    for kind in ("shuffle_unit", "xception_unit"):
        for name in (kind, f"{kind}_infer"):
            if OPS[name].choices["cpu"].kernel == "reference":
                pytest.skip("no native kernel in this build")
            monkeypatch.setattr(ops, name, counted(name))
    monkeypatch.setattr(fused, "below_autograd", counted_below)
    return found


def unit(name: str = "shuffle", affine: bool = True, seed: int = 0) -> Any:
    """A unit with weights, scales, shifts and running statistics that are not their defaults."""
    torch.manual_seed(seed)
    made, sizes, _ = UNITS[name]
    made = made(*sizes, affine=affine)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for key, buffer in made.named_buffers():
            if buffer.dim():
                buffer.uniform_(0.5, 1.5) if key.endswith("var") else buffer.normal_()
    return made.to(memory_format=LAST)


def plainly(made: Any, x: Tensor) -> Tensor:
    """The unit's modules one after the other."""
    if made.branch_proj is None:
        return torch.cat((x[:, ::2], made.branch_main(x[:, 1::2])), 1)
    return torch.cat((made.branch_proj(x), made.branch_main(x)), 1)


def images(seed: int, size: int = 3) -> Tensor:
    """Channels-last input of the unit."""
    return torch.randn(size, 12, 6, 7, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=LAST)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", UNITS)
def test_training_is_that_of_the_modules(calls: list[str], name: str, affine: bool, momentum: float | None) -> None:
    """Output, gradients, running statistics and counts over three steps, for every kind of momentum."""
    ours, theirs = unit(name, affine), unit(name, affine)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            module.reset_running_stats() if momentum is None else None
    for step in range(3):
        x, y = images(step).requires_grad_(), images(step).requires_grad_()
        out, wanted = ours(x), plainly(theirs, y)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        (out.sin().sum() / 10).backward()
        (wanted.sin().sum() / 10).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert calls == [UNITS[name][2]] * 3
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=key)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", UNITS)
def test_evaluation_is_that_of_the_modules(calls: list[str], name: str, affine: bool) -> None:
    """Without gradients running statistics are folded in; with them the modules run."""
    made = unit(name, affine).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(images(0)), plainly(made, images(0)), rtol=1e-5, atol=1e-5)
    assert calls == ["unit_eval"]
    assert made(images(0)).requires_grad and len(calls) == 1


def test_statistics_that_are_not_tracked_stay_away(calls: list[str]) -> None:
    """track_running_stats=False: batch statistics in training and in evaluation, and nothing is stored."""
    made = ShuffleUnit(12, 12, 10, 3).to(memory_format=LAST)
    for place in (1, 4, 6):
        features = made.branch_main[place].num_features
        made.branch_main[place] = nn.BatchNorm2d(features, track_running_stats=False)
    for training in (True, False):
        made.train(training)
        torch.testing.assert_close(made(images(0)), plainly(made, images(0)))
    assert calls == ["shuffle_unit"] * 2
    assert all(buffer is None for module in made.branch_main for buffer in module._buffers.values())


def test_who_looks_inside_gets_the_modules(calls: list[str]) -> None:
    """Hooks on a branch, in it and global ones fire; NCHW, other dtypes, mixed modes, changed layers: no op."""
    made, seen = unit("shuffle stride 2"), []

    def note(*_: Any) -> None:
        seen.append(1)

    def plain(x: Tensor | None = None) -> None:
        x = images(0) if x is None else x
        before = len(calls)
        torch.testing.assert_close(made(x), plainly(made, x))
        assert len(calls) == before

    branches = (made.branch_main, made.branch_proj)
    for place in (*branches, *(layer for branch in branches for layer in branch)):
        for register in (place.register_forward_hook, place.register_forward_pre_hook):
            handle = register(note)
            plain()
            handle.remove()
    assert len(seen) >= 2 * 15
    handle = nn.modules.module.register_module_forward_hook(note)
    plain()
    handle.remove()
    made.branch_main[1].forward = lambda x: 2 * nn.BatchNorm2d.forward(made.branch_main[1], x)
    plain()
    del made.branch_main[1].forward
    plain(images(0).contiguous())
    plain(images(0)[:, :, ::2])
    made.branch_main[4].eval()
    plain()
    made.branch_main[4].train()
    made.branch_main[2] = nn.ReLU6()
    plain()
    made.branch_main[2] = nn.ReLU()
    made.double()
    plain(images(0).double())
    made.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain()
    assert not calls
    made(images(0))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (3, {"padding_mode": "reflect"}),
        (3, {"padding": (4, 4), "dilation": (2, 2)}),
        (0, {"bias": nn.Parameter(torch.ones(10))}),
    ],
)
def test_changed_convolutions_run_as_they_are(calls: list[str], place: int, change: dict[str, Any]) -> None:
    """What was changed in a layer counts, in training and in evaluation."""
    made = unit()
    for name, value in change.items():
        setattr(made.branch_main[place], name, value)
    made.branch_main[place]._reversed_padding_repeated_twice = [2, 2, 2, 2]
    for training in (True, False):
        made.train(training)
        with torch.no_grad():
            torch.testing.assert_close(made(images(0)), plainly(made, images(0)))
    assert not calls


def test_mid_is_an_integer() -> None:
    """Numpy's integers are welcome; floats and tensors are refused in one line."""
    made = unit()
    torch.testing.assert_close(made(images(0), np.int64(4)), made(images(0), 4))
    for wrong in (4.0, torch.tensor(4, dtype=torch.int32)):
        with pytest.raises(TypeError, match="mid must be an int, got"):
            made(images(0), wrong)


def test_device_and_dtype() -> None:
    """As torch.nn's layers take them."""
    for made in (ShuffleUnit(8, 8, 4, 3, dtype=torch.float64), XceptionUnit(8, 20, 4, stride=2, dtype=torch.float64)):
        assert {parameter.dtype for parameter in made.parameters()} == {torch.float64}
    assert ShuffleUnit(8, 8, 4, 3, device="meta").branch_main[0].weight.is_meta


@pytest.mark.parametrize("mode", MODES)
def test_recalibration(calls: list[str], mode: str) -> None:
    """Every mode gives the statistics of the plain modules, and the units stay fused."""
    net, seen = nn.Sequential(unit(seed=1), unit(seed=2)), nn.Sequential(unit(seed=1), unit(seed=2))
    batches = [images(seed, size) for seed, size in enumerate((3, 3, 2))]
    recalibrate(net, batches, mode)  # type: ignore[arg-type]
    recalibrate(seen, batches, mode, forward=lambda x: plainly(seen[1], plainly(seen[0], x)))  # type: ignore[arg-type]
    assert len(calls) == 6
    for (name, a), b in zip(net.state_dict().items(), seen.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_switched_off(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel was chosen (SPOS_FAST_BACKEND=reference), the modules run."""
    made = unit()
    monkeypatch.setitem(OPS["shuffle_unit"].choices, "cpu", type(OPS["shuffle_unit"].choices["cpu"])("reference", ""))
    made(images(0))
    assert not calls


@pytest.mark.parametrize("gradients", [False, True])
def test_statistics_that_are_not_tracked_do_not_move(gradients):
    """Buffers that are there stay as they are once a layer's flag is off, as PyTorch has it."""
    torch.manual_seed(0)
    unit = ShuffleUnit(12, 12, 6, 3).to(memory_format=torch.channels_last)
    for layer in unit.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.track_running_stats = False
    before = {name: value.clone() for name, value in unit.named_buffers()}
    with torch.set_grad_enabled(gradients):
        unit(torch.randn(4, 12, 6, 6).contiguous(memory_format=torch.channels_last))
    assert before and all(torch.equal(value, before[name]) for name, value in unit.named_buffers())
