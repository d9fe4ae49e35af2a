"""Choice blocks: stride 1 on the four ImageNet stages, and the strided one that opens each of them.

The floor counts the four-launch form (docs/performance.md): batch statistics end every convolution, so each layer's
output is written and read once. A = bytes of half the channels. Training forwards 10 A, backwards 16 A, inference 4 A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import shufflenet
from bench.peers.compiled import compiled
from bench.peers.shufflenet import State
from bench.registry import OURS, Bind, Case
from spos_fast.nn import ShuffleUnit, XceptionUnit

STAGES = ((64, 56), (160, 28), (320, 14), (640, 7))  # channels, height and width
CHOICES = ("k3", "k5", "k7", "x")
GPU_TESTS = {"cpu": (), "cuda": ("tests/test_gpu.py",)}  # of the layers above the ops
MODES = ("train", "forward", "infer")
# Gradients differ by more than values do: where rounding moves a value across zero, ReLU's gradient is all or nothing.
# The share of such values is about the rounding error, the 2-norm its square root; in double all agree to 1e-12.
TOLERANCES = {
    ("float32", "train"): 1e-2,
    ("float32", "forward"): 1e-4,
    ("float32", "infer"): 1e-4,
    ("bfloat16", "train"): 0.25,
    ("bfloat16", "forward"): 3e-2,
    ("bfloat16", "infer"): 3e-2,
    ("float64", "train"): 1e-10,
}
MODE_NAMES = {"train": "forward+backward", "forward": "training forward", "infer": "inference"}


def cases(device: str) -> list[Case]:
    """Every stage, choice and mode at stride 1; training at stride 2 for k5 and Xception."""
    dtype, batch = ("bfloat16", 128) if device == "cuda" else ("float32", 32)
    found = [
        _case(device, dtype, batch, mode, choice, channels, channels, side, 1)
        for mode in MODES
        for channels, side in STAGES
        for choice in CHOICES
    ]
    found += [
        _case(device, dtype, batch, "train", choice, before, channels, 2 * side, 2)
        for before, (channels, side) in zip((16, 64, 160, 320), STAGES, strict=True)
        for choice in ("k5", "x")
    ]
    return found


@dataclass
class _Inputs:
    x: Tensor
    grad: Tensor
    unit: nn.Module
    mode: str

    @property
    def training(self) -> bool:
        return self.mode != "infer"


def _case(
    device: str, dtype: str, batch: int, mode: str, choice: str, channels_in: int, channels: int, side: int, stride: int
) -> Case:
    def inputs(where: torch.device) -> _Inputs:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        sizes = (channels_in, channels, channels // 2)
        unit: nn.Module
        if choice == "x":
            unit = XceptionUnit(*sizes, stride=stride, affine=False)
        else:
            unit = ShuffleUnit(*sizes, kernel_size=int(choice[1]), stride=stride, affine=False)
        for name, buffer in unit.named_buffers():
            if buffer.dim():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(0, 0.1)
        statistics = torch.float64 if kind == torch.float64 else torch.float32
        unit = unit.to(where, statistics, memory_format=torch.channels_last).train(mode != "infer")  # type: ignore[call-overload]
        for parameter in unit.parameters():
            parameter.data = parameter.data.to(kind)
        x = torch.randn(batch, channels_in, side, side).to(where, kind).contiguous(memory_format=torch.channels_last)
        out = side // stride
        grad = torch.randn(batch, channels, out, out).to(where, kind).contiguous(memory_format=torch.channels_last)
        return _Inputs(x.requires_grad_(mode == "train"), grad, unit, mode)

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    contenders: dict[str, Bind] = {
        OURS: _ours,
        "eager NCHW": _peer(stride, nchw, shufflenet.split_by_reshape),
        "eager NCHW, slices": _peer(stride, nchw, shufflenet.split_by_slices),
        "eager channels_last": _peer(stride, nhwc, shufflenet.split_by_slices),
        "compile NCHW": _peer(stride, nchw, shufflenet.split_by_slices, "default"),
        "compile channels_last": _peer(stride, nhwc, shufflenet.split_by_slices, "default"),
    }
    headline = stride == 1 and choice == "k5" and side in (56, 14)
    if device == "cuda" or headline:  # on the CPU it takes minutes a case and was never the best peer
        autotune = _peer(stride, nhwc, shufflenet.split_by_slices, "max-autotune-no-cudagraphs")
        contenders["compile max-autotune"] = autotune
    size = f"{batch}x{channels_in}x{side}x{side}" + (f"->{channels}" if stride == 2 else "")
    passes = {"train": 3, "forward": 1, "infer": 1}[mode]
    return Case(
        op=f"{'xception' if choice == 'x' else 'shuffle'}_unit {MODE_NAMES[mode]}",
        shape=f"{choice if choice != 'x' else 'k3'} {size}",
        dtype=dtype,
        device=device,
        bytes=unit_bytes(mode, choice, batch, channels_in, channels, side, stride, getattr(torch, dtype).itemsize),
        flops=passes * 2 * batch * unit_macs(choice, channels_in, channels, side, stride),
        inputs=inputs,
        contenders=contenders,
        tests=(
            "tests/bench/test_registry.py",
            "tests/test_supernet.py",
            "tests/test_fused_units.py",
            "tests/ops/test_units.py",
            *GPU_TESTS[device],
        ),
        tolerance=TOLERANCES[dtype, mode],
        items=batch,
        unit="images",
        headline=headline,
    )


def unit_macs(choice: str, channels_in: int, channels: int, side: int, stride: int) -> int:
    """Multiply-adds of one image through a block of ``channels // 2`` mid channels."""
    half, mid = (channels_in // 2 if stride == 1 else channels_in), channels // 2
    made = channels - half
    small = (side // stride) ** 2
    if choice == "x":
        main = small * (9 * (half + 2 * mid) + half * mid + mid * mid + mid * made)
        kernel = 3
    else:
        kernel = int(choice[1])
        main = side * side * half * mid + small * (kernel * kernel * mid + mid * made)
    projection = small * half * (kernel * kernel + half) if stride == 2 else 0
    return main + projection


def unit_bytes(
    mode: str, choice: str, batch: int, channels_in: int, channels: int, side: int, stride: int, itemsize: int
) -> int:
    """Bytes that the four-launch form moves: input and output once, each inner layer's output written and read once.

    Inference moves input and output only. Backwards reads the incoming gradient twice (its sums come first) and every
    saved layer twice, writes and reads every inner gradient, and writes the input's.
    """
    half, mid = (channels_in // 2 if stride == 1 else channels_in), channels // 2
    large, small = batch * side * side, batch * (side // stride) ** 2
    x, out = channels_in * large, channels * small
    made = channels - half
    if choice == "x":
        inner = [half * small, mid * small, mid * small, mid * small, mid * small, made * small]
    else:
        inner = [mid * large, mid * small, made * small]
    if stride == 2:
        inner += [half * small, half * small]
    forward = x + out + 2 * sum(inner)
    # For stride 1, shuffle: read gradient 2 + 1 A, saved layers 2 x 3 A, inner gradients 2 x 2 A, x again 1 A, gradient
    # of x 2 A: 16 A with A = half * large.
    last = made * small + (half * small if stride == 2 else 0)
    read_gradient = out + last
    backward = read_gradient + 2 * sum(inner) + 2 * (sum(inner) - last) + half * large + x
    return itemsize * {"infer": x + out, "forward": forward, "train": forward + backward}[mode]


def _ours(given: _Inputs) -> Callable[[], Any]:
    unit = given.unit
    parameters = list(unit.parameters())
    return _runner(given, unit, given.x, given.grad, parameters)


def _peer(stride: int, layout: torch.memory_format, split: shufflenet.Split, mode: str | None = None) -> Bind:
    def bind(given: _Inputs) -> Callable[[], Any]:
        state = layered({**given.unit.state_dict(keep_vars=True)}, layout, given.training)
        block = shufflenet.unit_layers(state, "", stride)
        if not given.training:
            block = shufflenet.Unit(shufflenet.folded(block.main), shufflenet.folded(block.projection), stride)
        parameters = [value for value in state.values() if value.requires_grad]

        def forward(x: Tensor) -> Tensor:
            return shufflenet.unit(x, block, given.training, split)

        if mode is not None:
            forward = compiled(forward, None if mode == "default" else mode)
        x = given.x.detach().contiguous(memory_format=layout).requires_grad_(given.x.requires_grad)
        return _runner(given, forward, x, given.grad.contiguous(memory_format=layout), parameters)

    return bind


def layered(state: State, layout: torch.memory_format, training: bool) -> State:
    """Copies of a module's tensors in a layout; parameters are leaves that take gradients where it trains."""
    result = {}
    for name, value in state.items():
        if value.dim() == 0:  # counts of batches
            continue
        copy = value.detach().clone()
        if copy.dim() == 4:
            copy = copy.contiguous(memory_format=layout)
        result[name] = copy.requires_grad_(training and isinstance(value, nn.Parameter))
    return result


def _runner(
    given: _Inputs, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, parameters: Sequence[Tensor]
) -> Callable[[], Any]:
    if given.mode == "train":

        def train() -> Any:
            out = forward(x)
            grads = torch.autograd.grad(out, [x, *parameters], grad)
            return (out.detach(), *grads)  # a graph kept alive by its output would spoil the capture of CUDA graphs

        return train

    def run() -> Any:
        with torch.no_grad():
            return forward(x)

    return run
