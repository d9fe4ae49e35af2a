"""Stems scored a few images at a time: equal to the modules run on whole batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bench.memory import TensorsAlive
from spos_fast.errors import InputError
from spos_fast.nn import stem_part
from spos_fast.nn.parts import Part
from spos_fast.nn.stem_part import StemPart
from spos_fast.running import RunningStatistics

POOLS = {
    "no pooling": None,
    "resnet": nn.MaxPool2d(3, 2, 1),
    "two by two": nn.MaxPool2d(2),
    "overlapping, rounded up": nn.MaxPool2d((3, 2), (2, 1), ceil_mode=True),
    "dilated": nn.MaxPool2d(2, 1, dilation=2),
}


def stem(pool: nn.Module | None, channels: int = 20, **convolution: int) -> nn.Sequential:
    """With statistics far from zero, weights and biases."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, channels, 7, **{"stride": 2, "padding": 3, **convolution}))
    made.extend([nn.BatchNorm2d(channels), nn.ReLU()])
    nn.init.uniform_(made[1].weight, 0.5, 2)
    nn.init.uniform_(made[1].bias, -1, 1)
    nn.init.uniform_(made[0].bias, -5, 5)
    if pool is not None:
        made.append(pool)
    return made.to(memory_format=torch.channels_last).eval()


def images(count: int = 7, size: int = 33) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(part: Part, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, mean and variance in calibration, and the output on these statistics."""
    ((out, moments),) = part.calibrate([x])
    assert out is not None
    running = RunningStatistics([part], "cumulative")
    running.merge([moments])
    return out, moments.mean[0], moments.var[0], part.infer([x], running.statistics())[0]


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("at_once", [1, 60_000, 1 << 30], ids=["one by one", "two by two", "whole"])
def test_equals_the_stem_run_as_modules(pool: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images are convolved together, and whatever the pooling; odd sizes, and a rest of one image. Far
    from exact at most twice as far as the modules; moments in double precision to its digits."""
    monkeypatch.setattr(stem_part, "_AT_ONCE", at_once)
    module, x = stem(POOLS[pool]), images()
    got, plain = run(StemPart(module), x), run(Part(module), x)
    module.double()
    exact = run(Part(module), x.double())
    for one, other, wanted in zip(got, plain, exact, strict=True):
        assert one.shape == wanted.shape and one.dtype == torch.float32
        assert (one - wanted).abs().max() <= 2 * (other - wanted).abs().max()
    ((out, moments),) = StemPart(module).calibrate([x.double()])
    for one, wanted in zip((out, moments.mean[0], moments.var[0]), exact, strict=False):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_same_bits_for_any_number_of_threads_and_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are cut by their size alone."""
    monkeypatch.setattr(stem_part, "_AT_ONCE", 60_000)
    part, x, other = StemPart(stem(POOLS["resnet"])), images(), images().flip(0)
    alone = run(part, x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = run(part, x)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, again, alone))
    (_, (out, moments)) = part.calibrate([other, x])
    assert out is not None
    assert torch.equal(out, alone[0]) and torch.equal(moments.mean[0], alone[1])


@torch.no_grad()
def test_a_nan_stays_in_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """On given statistics, where it would in the modules; in calibration it reaches all of its channels' statistics."""
    monkeypatch.setattr(stem_part, "_AT_ONCE", 60_000)
    module, x = stem(POOLS["resnet"]), images()
    part = StemPart(module)
    running = RunningStatistics([part], "cumulative")
    running.merge([part.calibrate([x])[0][1]])
    x[3, 1, 10, 10] = math.nan
    (got,), (expected,) = (each.infer([x], running.statistics()) for each in (part, Part(module)))
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[3].isnan().any() and not got[[0, 1, 2, 4, 5, 6]].isnan().any()
    assert part.calibrate([x])[0][1].mean[0].isnan().all()


@torch.no_grad()
def test_the_convolution_of_a_batch_is_never_whole() -> None:
    """Its pages, fresh in every batch, cost as much as the convolution."""
    part, x = StemPart(stem(POOLS["resnet"], 64)), images(16, 224)
    whole = 16 * 64 * 112 * 112 * 4
    with TensorsAlive() as alive:
        ((out, _),) = part.calibrate([x])
    assert out is not None
    assert alive.most < whole


@torch.no_grad()
def test_one_value_a_channel_is_refused() -> None:
    """It has no variance; of two images one by one it has one."""
    part = StemPart(stem(None, padding=0))
    with pytest.raises(InputError, match="one value a channel"):
        part.calibrate([images(1, 7)])
    assert part.calibrate([images(2, 7)])[0][1].counts == [2]


def test_a_negative_scale_before_pooling_is_not_taken() -> None:
    """It would turn the greatest into the least."""
    module = stem(POOLS["resnet"])
    assert StemPart.takes(module)
    with torch.no_grad():
        module[1].weight[3] = -1
    assert not StemPart.takes(module)
    assert StemPart.takes(module[:3])


def test_windows_that_can_lie_in_padding_run_as_modules():
    """Dilated pooling: minus infinity would become 0 behind the ReLU."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 1, 1, dilation=2)]
    assert not StemPart.takes(nn.Sequential(*layers))
    layers[3] = nn.MaxPool2d(2, 1, 1)
    assert StemPart.takes(nn.Sequential(*layers))
