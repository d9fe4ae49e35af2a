"""sliced_conv2d and sliced_batch_norm against PyTorch's layers of the slice, and as torch citizens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from spos_fast import ops
from spos_fast.errors import InputError
from tests.ops.sliced_samples import SLICED_SAMPLES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAST = torch.channels_last


def width(channels: int) -> Tensor:
    """A number of channels that the host does not see."""
    return torch.tensor(channels, dtype=torch.int32)


@pytest.mark.parametrize("name", sorted(SLICED_SAMPLES))
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    for first, *rest in SLICED_SAMPLES[name]()[1:4:2]:
        torch.library.opcheck(getattr(torch.ops.spos_fast, name).default, (first.requires_grad_(), *rest))


def test_raw_ops() -> None:
    """torch.ops.spos_fast has the same functions, with sizes and widths apart."""
    raw, x, weight = torch.ops.spos_fast, torch.randn(2, 4, 6, 5), torch.randn(5, 6, 3, 3)
    settings = [2, 2], [1, 1], [1, 1], 1
    got = raw.sliced_conv2d(x, weight, None, 3, 4, *settings, None, None)
    assert torch.equal(got, ops.sliced_conv2d(x, weight, None, 2, 1, in_channels=3, out_channels=4))
    got = raw.sliced_conv2d(x, weight, None, 4, 5, *settings, width(3), width(4))
    assert torch.equal(got, ops.sliced_conv2d(x, weight, None, 2, 1, in_channels=width(3), out_channels=width(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert raw.sliced_conv2d(x, weight, None, 3, 4, *settings, None, None).dtype == torch.bfloat16
    got = raw.sliced_batch_norm(x, None, None, weight[0, :, 0, 0], None, True, 0.1, 1e-5, None)
    assert torch.equal(got, ops.sliced_batch_norm(x, None, None, weight[0, :, 0, 0], None, True))


# Keywords, and the used numbers of input and output channels, of weights stored for 6 and 8 channels.
CONVOLUTIONS: list[tuple[dict[str, Any], int, int]] = [
    ({"padding": 1}, 4, 5),
    ({"stride": 2, "padding": (2, 1), "dilation": (1, 2)}, 1, 1),
    ({"padding": 1}, 6, 8),
    ({"padding": 1, "groups": 8}, 3, 3),
    ({"padding": 1, "stride": (2, 1), "groups": 8}, 8, 8),
]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize(("options", "used_in", "used_out"), CONVOLUTIONS, ids=str)
def test_a_slice_is_the_small_convolution(
    options: dict[str, Any], used_in: int, used_out: int, memory_format: torch.memory_format, as_tensor: bool
) -> None:
    """Values and gradients are those of a convolution that stores the slice only; NaN outside of it, also in the
    gradient of absent outputs, is never seen; gradients outside are exactly zero."""
    torch.manual_seed(0)
    depthwise = "groups" in options
    x = torch.full((2, 8 if depthwise else 6, 7, 6), torch.nan).contiguous(memory_format=memory_format)
    weight, bias = torch.full((8, 1 if depthwise else 6, 3, 3), torch.nan), torch.full((8,), torch.nan)
    part = weight[:used_out] if depthwise else weight[:used_out, :used_in]
    for slot in (x[:, :used_in], part, bias[:used_out]):
        slot.copy_(torch.randn(slot.shape))
    small = [value.clone().requires_grad_() for value in (x[:, :used_in], part, bias[:used_out])]
    big = [value.requires_grad_() for value in (x, weight, bias)]

    number = width if as_tensor else int
    sliced = {"in_channels": number(used_in)} | ({} if depthwise else {"out_channels": number(used_out)})
    got = ops.sliced_conv2d(*big, **options, **sliced)
    wanted = functional.conv2d(*small, **{**options, **({"groups": used_out} if depthwise else {})})
    assert got.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(got[:, :used_out], wanted)
    assert not got[:, used_out:].any() and got.shape[1] == (8 if as_tensor else used_out)

    grad = torch.randn_like(wanted)
    wide = functional.pad(grad, (0, 0, 0, 0, 0, got.shape[1] - used_out), value=torch.nan)
    got_grads = torch.autograd.grad(got, big, wide)
    cut = got_grads[0][:, :used_in], got_grads[1][: part.shape[0], : part.shape[1]], got_grads[2][:used_out]
    for a, b, whole in zip(cut, torch.autograd.grad(wanted, small, grad), got_grads, strict=True):
        torch.testing.assert_close(a, b)
        assert whole.count_nonzero() == a.count_nonzero()


def test_grouped_convolutions_in_full() -> None:
    """Groups that cannot be sliced run as they are."""
    x, weight = torch.randn(2, 6, 5, 5), torch.randn(4, 3, 3, 3)
    assert torch.equal(ops.sliced_conv2d(x, weight, groups=2), functional.conv2d(x, weight, groups=2))
    with pytest.raises(InputError, match="only convolutions with groups=1 and depthwise ones can be sliced"):
        ops.sliced_conv2d(x, weight, groups=2, out_channels=2)


def test_gradients() -> None:
    """First and second derivatives against finite differences in double, with numbers of either kind."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).double() for size in ((2, 3, 4, 3), (4, 3, 3, 3), (4,)))
    given = [value.requires_grad_() for value in (x, weight, bias)]
    for sliced in ({"in_channels": 2, "out_channels": 3}, {"in_channels": width(2), "out_channels": width(3)}):

        def run(*values: Tensor, sliced: dict[str, Any] = sliced) -> Tensor:
            return ops.sliced_conv2d(*values, padding=1, **sliced)

        assert torch.autograd.gradcheck(run, given)
        assert torch.autograd.gradgradcheck(run, given)
    depthwise = torch.randn(3, 1, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: ops.sliced_conv2d(x, w, groups=3, out_channels=2), (x, depthwise))


def test_only_what_is_asked_for_gets_gradients() -> None:
    """A frozen weight costs nothing backwards; neither does an input without gradient."""
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(5, 6, 3, 3).requires_grad_()
    assert torch.autograd.grad(ops.sliced_conv2d(x, weight).sum(), weight)[0].shape == weight.shape
    x.requires_grad_()
    assert torch.autograd.grad(ops.sliced_conv2d(x, weight.detach()).sum(), x)[0].shape == x.shape


def test_the_whole_weight_is_not_copied() -> None:
    """Memory that a call takes: the output and at most twice the slice, far from the stored weight."""
    weight, x = torch.randn(1024, 1024, 1, 1), torch.randn(2, 64, 7, 7)
    slices = {"in_channels": 64, "out_channels": 64}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = ops.sliced_conv2d(x, weight, **slices)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages())
    assert out.nbytes <= taken <= out.nbytes + x.nbytes + 2 * weight[:64, :64].numel() * 4 < weight.nbytes / 4


def test_the_format_follows_a_channels_last_weight() -> None:
    """As with conv2d: a channels-last model makes channels-last images of whatever comes in."""
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(8, 4, 3, 3).contiguous(memory_format=LAST)
    assert ops.sliced_conv2d(x, weight).is_contiguous(memory_format=LAST)
    assert functional.conv2d(x, weight[:, :3].contiguous(memory_format=LAST)).is_contiguous(memory_format=LAST)
    wide = torch.randn(2, 8, 5, 5).contiguous(memory_format=LAST)
    assert ops.sliced_conv2d(wide[:, 2:6], weight).is_contiguous(memory_format=LAST)


def layer(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, used: Any = 3) -> Tensor:
    """A layer of a slimmable network."""
    y = ops.sliced_conv2d(x, weight, bias, padding=1, out_channels=used)
    channels = used if isinstance(used, Tensor) else None
    return ops.sliced_batch_norm(y, mean, var, None, bias, True, channels=channels).relu()


def arguments() -> list[Tensor]:
    """What layer takes."""
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=LAST)
    return [x, torch.randn(5, 4, 3, 3), torch.randn(5), torch.zeros(5), torch.ones(5)]


@pytest.mark.parametrize(
    ("backend", "used"), [("aot_eager", 3), ("aot_eager", width(3)), ("inductor", width(3))], ids=str
)
def test_compile_fullgraph(backend: str, used: Any) -> None:
    """torch.compile takes a layer in one graph: output, gradients and moved statistics."""
    given = arguments()
    for value in given[:3]:
        value.requires_grad_()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        statistics = [value.clone() for value in given[3:]]
        out = function(*given[:3], *statistics, used=used)
        grads = torch.autograd.grad(out.square().sum(), given[:3])
        results.append([out, *grads, *statistics])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_export() -> None:
    """torch.export gives a program of PyTorch's own ops, which runs without this package, for any batch size."""

    class Module(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return ops.sliced_conv2d(x, weight, padding=1, out_channels=3)

    x, weight, *_ = arguments()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(Module(), (x, weight), dynamic_shapes=[batch, None])
    assert not [node for node in program.graph.nodes if "spos_fast" in str(node.target)]
    larger = torch.cat((x, x, x[:1])).contiguous(memory_format=LAST)
    torch.testing.assert_close(program.module()(larger, weight), Module()(larger, weight))


def test_autocast() -> None:
    """Under autocast the convolution runs in its dtype; the weights' gradients stay wide."""
    x, weight, bias, *_ = (value.requires_grad_() for value in arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.sliced_conv2d(x, weight, bias, out_channels=2)
        assert ops.sliced_conv2d(out, weight, in_channels=2).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(4, 3, 3)}, InputError, r"x must have 4 dimensions, got shape \[4, 3, 3\]"),
        ({"x": torch.zeros(2, 4, 3, 3).int()}, TypeError, "x must be float32, .* got torch.int32"),
        ({"x": torch.zeros(2, 7, 3, 3)}, InputError, "in_channels must be from 1 to 6, .* got 7"),
        ({"weight": torch.zeros(5, 6, 1, 1).double()}, TypeError, "weight must have the dtype of x"),
        ({"bias": torch.zeros(4)}, InputError, r"bias must be \[5\], got shape \[4\]"),
        ({"in_channels": 0}, InputError, "in_channels must be from 1 to 4, .* got 0"),
        ({"out_channels": 6}, InputError, "out_channels must be from 1 to 5, .* got 6"),
        ({"out_channels": 2.5}, TypeError, "out_channels must be an int or an int32 tensor"),
        ({"out_channels": torch.tensor(3)}, TypeError, "out_channels must be an int or an int32 tensor"),
        ({"groups": 2}, InputError, "groups must divide the 5 stored output channels, got 2"),
        (
            {"weight": torch.zeros(4, 1, 1, 1), "groups": 4, "in_channels": 2, "out_channels": 3},
            InputError,
            "in_channels and out_channels of a depthwise convolution must be the same",
        ),
    ],
)
def test_errors_of_the_convolution(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(kind, match=message) as caught:
        ops.sliced_conv2d(**{"x": torch.zeros(2, 4, 3, 3), "weight": torch.zeros(5, 6, 1, 1), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kept", [True, False], ids=["statistics", "none"])
def test_batch_norm_of_a_slice(training: bool, kept: bool) -> None:
    """Values, gradients and running statistics are those of batch norm that stores the slice only; what is stored
    beyond stays, its gradients are exactly zero, and NaN there is never seen. A number on the device does the same."""
    if not training and not kept:
        return
    torch.manual_seed(0)
    values = [torch.rand(3) + 0.5 for _ in range(4)]
    x, grad = torch.randn(4, 3, 5, 4) + 1, torch.randn(4, 3, 5, 4)
    small = [value.clone() for value in values]
    x.requires_grad_(), small[2].requires_grad_(), small[3].requires_grad_()
    wanted = functional.batch_norm(x, *(small[:2] if kept else (None, None)), *small[2:], training, 0.3)
    wanted_grads = torch.autograd.grad(wanted, [x, *small[2:]], grad)

    for channels in (None, width(3)):
        seen = 5 if channels is not None else 3
        wide_x = torch.cat((x.detach(), torch.full((4, seen - 3, 5, 4), torch.nan)), 1).requires_grad_()
        stored = [torch.cat((value, torch.full((4,), torch.nan))) for value in values]
        stored[2].requires_grad_(), stored[3].requires_grad_()
        running = stored[:2] if kept else (None, None)
        got = ops.sliced_batch_norm(wide_x, *running, *stored[2:], training, 0.3, channels=channels)
        torch.testing.assert_close(got[:, :3], wanted)
        assert not got[:, 3:].any()
        for a, b in zip(stored[:2], small[:2], strict=True):
            torch.testing.assert_close(a[:3], b.detach())
            assert a[3:].isnan().all()
        wide_grad = functional.pad(grad, (0, 0, 0, 0, 0, seen - 3), value=torch.nan)
        got_grads = torch.autograd.grad(got, [wide_x, *stored[2:]], wide_grad)
        for a, b in zip(got_grads, wanted_grads, strict=True):
            dim = 1 if a.dim() == 4 else 0
            torch.testing.assert_close(a.narrow(dim, 0, 3), b)
            assert not a.narrow(dim, 3, a.shape[dim] - 3).any()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
        ({"x": torch.zeros(3)}, InputError, r"x must be \[N, C, \.\.\.\], got shape \[3\]"),
        ({"x": torch.zeros(2, 6, 3, 3)}, InputError, "x must have 1 to 5 channels, what running_mean stores"),
        ({"weight": torch.zeros(3)}, InputError, "x must have 1 to 3 channels, what weight stores"),
        ({"channels": 3}, TypeError, r"channels must be an int32 tensor \[\] or None, got int"),
        ({"channels": torch.ones(2).int()}, InputError, r"got shape \[2\]"),
    ],
)
def test_errors_of_the_batch_norm(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    given = {"x": torch.zeros(2, 4, 3, 3), "running_mean": torch.zeros(5), "running_var": torch.zeros(5)}
    with pytest.raises(kind, match=message) as caught:
        ops.sliced_batch_norm(**{**given, **change})
    assert "\n" not in str(caught.value)
