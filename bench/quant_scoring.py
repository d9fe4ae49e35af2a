"""How long scoring takes at few bits, against scoring of the same network in full precision.

    python -m bench.quant_scoring --threads 2                # 4 bits, 224 x 224
    python -m bench.quant_scoring --bits 2 --size 112

One network, ResNet-18 with uniform bits, and its twin of plain residual blocks, both as paths of a supernet scored by
:class:`spos_fast.Evaluator` on the same images: recalibration and validation. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast import Architecture, Evaluator
from spos_fast.data import Images
from spos_fast.data.images import Normalization
from spos_fast.nn import SlicedBatchNorm2d
from spos_fast.spaces import QuantResNet
from spos_fast.supernet import Supernet


class _Block(nn.Module):
    """The residual block in full precision, called as a supernet calls it."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = SlicedBatchNorm2d(wide, affine=False)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide, affine=False)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or narrow != wide:
            shortcut = nn.Conv2d(narrow, wide, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(wide, affine=False))

    def forward(self, x: Tensor, _setting: int) -> Tensor:
        """The block on x."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


def full_precision(space: QuantResNet, net: Supernet) -> Supernet:
    """A supernet of plain blocks with the same stem and head."""
    features: list[Sequence[nn.Module]] = []
    channels = space.config()["stage_channels"]
    before = channels[0]
    for stage, (wide, repeats) in enumerate(zip(channels, space.config()["stage_repeats"], strict=True)):
        for repeat in range(repeats):
            features.append([_Block(before, wide, 2 if stage and not repeat else 1)])
            before = wide
    return Supernet(
        net.first_conv,
        features,
        net.conv_last,
        net.classifier,
        0.0,
        route=lambda _: [(0, 0)] * len(features),
        build=space.build,
    )


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations (default 4)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    parser.add_argument("--images", type=int, default=64, help="of calibration, and of validation (default 64)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    space = QuantResNet(18, input_size=options.size, bits=((options.bits, options.bits),), ratios=(1.0,))
    net = space.supernet()
    pixels = torch.randint(0, 256, (options.images, 3, options.size, options.size), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (options.images,))
    images = Images(pixels, labels, Normalization((0.5,) * 3, (0.25,) * 3))
    arch: Architecture = space.uniform(options.bits, options.bits)
    evaluators = {
        f"{options.bits} bits": Evaluator(
            net, images, images, calibration_batch=options.batch, batch_size=options.batch
        ),
        "full precision": Evaluator(
            full_precision(space, net), images, images, calibration_batch=options.batch, batch_size=options.batch
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in evaluators}
    for number in range(options.rounds + 1):
        for name, evaluate in evaluators.items():
            begin = time.perf_counter()
            evaluate([arch])
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    few, full = seconds.values()
    for name, samples in seconds.items():
        print(f"{name}: {1e3 * statistics.median(samples):.0f} ms")
    ratios = sorted(one / other for one, other in zip(full, few, strict=True))
    middle = statistics.median(full) / statistics.median(few)
    print(
        f"ratio of the medians {middle:.2f}x; of the rounds {ratios[0]:.2f} to {ratios[-1]:.2f}x; {options.threads} "
        f"threads, {options.size} x {options.size}, batches of {options.batch}"
    )


if __name__ == "__main__":
    main()
