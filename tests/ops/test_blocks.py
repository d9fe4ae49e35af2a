"""The ops that units are made of, as differentiable functions and as torch citizens.

Their kernels against their references on many shapes and dtypes: block_samples.py and test_every_op.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast import ops
from spos_fast.nn import ShuffleUnit
from spos_fast.ops import layout
from tests.ops.block_samples import BLOCK_SAMPLES

# Without native kernels the references serve, and say so; whether they should is not asked here.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* has no kernel on cpu:RuntimeWarning"),
]

LAST = torch.channels_last


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random channels-last images."""
    return torch.randn(size, dtype=dtype).contiguous(memory_format=LAST)


def affine(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A scale and a shift."""
    return torch.rand(channels, dtype=dtype) + 0.5, torch.randn(channels, dtype=dtype)


def width(channels: int) -> Tensor:
    """A number of channels that the host does not see."""
    return torch.tensor(channels, dtype=torch.int32)


def normalised(stats: ops.BNStats, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BN layer behind a convolution."""
    scale = gamma * (stats.m2 / stats.z[:, 0].numel() + eps).rsqrt()
    return scale, beta - stats.mean * scale


@pytest.mark.parametrize("name", sorted(BLOCK_SAMPLES))
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    for first, *rest in BLOCK_SAMPLES[name]()[:4]:
        first.requires_grad_(not name.endswith("_backward"))
        torch.library.opcheck(getattr(torch.ops.spos_fast, name).default, (first, *rest))


@pytest.mark.parametrize("name", sorted(BLOCK_SAMPLES))
def test_double(name: str) -> None:
    """In double the kernel is the reference up to rounding, on every shape."""
    reference = getattr(ops, f"{name}_reference")
    for arguments in BLOCK_SAMPLES[name]():
        wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments]
        results = getattr(torch.ops.spos_fast, name)(*wide), reference(*wide)
        for got, wanted in zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True):
            assert got.dtype == torch.float64 and got.shape == wanted.shape
            assert got.numel() == 0 or (got - wanted).norm() <= 2e-14 * wanted.norm()


POINTWISE = [
    {},
    {"relu": True, "first": 1, "step": 2, "channels_in": 3, "channels_out": 2},
    {"relu": True, "first": 2, "channels_in": width(3), "channels_out": width(2)},
]
DEPTHWISE = [{}, {"relu": True, "stride": 2, "channels": 3}, {"relu": True, "channels": width(3)}]


@pytest.mark.parametrize("options", POINTWISE, ids=str)
def test_gradients_of_pw_bnstats(options: dict[str, Any]) -> None:
    """Through z, mean and m2 to x, weight, scale and shift, against finite differences in double; sliced too."""
    torch.manual_seed(0)
    x, weight = image(2, 6, 3, 2, dtype=torch.float64), torch.randn(3, 4, 1, 1, dtype=torch.float64)
    used = options["channels_in"] if isinstance(options.get("channels_in"), int) else 4
    for loaded in (affine(used, torch.float64), ()):
        given = [value.requires_grad_() for value in (x, weight, *loaded)]
        assert torch.autograd.gradcheck(lambda *values: ops.pw_bnstats(*values, **options), given)


@pytest.mark.parametrize("options", DEPTHWISE, ids=str)
def test_gradients_of_dw_bnstats(options: dict[str, Any]) -> None:
    """Through z, mean and m2 to x, weight, scale and shift, against finite differences in double; sliced too."""
    torch.manual_seed(0)
    x, weight = image(2, 5, 4, 3, dtype=torch.float64), torch.randn(4, 1, 3, 3, dtype=torch.float64)
    used = options["channels"] if isinstance(options.get("channels"), int) else 4
    for loaded in (affine(used, torch.float64), ()):
        given = [value.requires_grad_() for value in (x, weight, *loaded)]
        assert torch.autograd.gradcheck(lambda *values: ops.dw_bnstats(*values, **options), given)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("end", ["alone", "passing", "projection"])
def test_gradients_of_bn_act_cat(end: str, relu: bool) -> None:
    """All its tensors, against finite differences in double."""
    torch.manual_seed(0)
    given = [image(2, 4, 3, 2, dtype=torch.float64), *affine(4, torch.float64)]
    if end != "alone":
        given += [image(2, 5, 3, 2, dtype=torch.float64)]
    if end == "projection":
        given += [*affine(5, torch.float64)]
    given = [value.requires_grad_() for value in given]
    assert torch.autograd.gradcheck(lambda *values: ops.bn_act_cat(*values, relu=relu), given)


def test_gradients_of_one_output() -> None:
    """What is not used of z, mean and m2 gets no gradient, and takes none from the others."""
    torch.manual_seed(0)
    x, weight = image(2, 4, 3, 3, dtype=torch.float64).requires_grad_(), torch.randn(5, 4, 1, 1).double()
    for pick in range(3):
        got = torch.autograd.grad(ops.pw_bnstats(x, weight)[pick].square().sum(), x)[0]
        z = functional.conv2d(x, weight)
        mean = z.mean((0, 2, 3))
        m2 = (z - mean[:, None, None]).square().sum((0, 2, 3))
        (wanted,) = torch.autograd.grad((z, mean, m2)[pick].square().sum(), x)
        torch.testing.assert_close(got, wanted)


def layer(kind: str) -> tuple[Callable[..., ops.BNStats], nn.Conv2d]:
    """An op, and the convolution that it stands in for."""
    if kind == "pointwise":
        return ops.pw_bnstats, nn.Conv2d(6, 8, 1, bias=False)
    return ops.dw_bnstats, nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False)


@pytest.mark.parametrize("kind", ["pointwise", "depthwise"])
def test_a_whole_layer(kind: str) -> None:
    """Convolution, BN and ReLU out of two blocks give nn.BatchNorm2d's output and gradients."""
    torch.manual_seed(0)
    op, conv = layer(kind)
    norm = nn.BatchNorm2d(conv.out_channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    x = (image(4, 6, 9, 7) + 0.5).requires_grad_()
    inputs = [x, conv.weight, norm.weight, norm.bias]

    wanted = norm(conv(x)).relu()
    options = {"stride": 2} if kind == "depthwise" else {}
    stats = op(x, conv.weight, **options)
    got = ops.bn_act_cat(stats.z, *normalised(stats, norm.weight, norm.bias))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    grad = image(*got.shape)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def shuffle_unit(x: Tensor, unit: ShuffleUnit) -> Tensor:
    """The unit out of blocks: four passes."""
    main, proj = unit.branch_main, unit.branch_proj
    slicing = {"first": 1, "step": 2} if proj is None else {}
    stats = ops.pw_bnstats(x, main[0].weight, **slicing)
    loaded = normalised(stats, main[1].weight, main[1].bias)
    stats = ops.dw_bnstats(stats.z, main[3].weight, *loaded, relu=True, stride=main[3].stride[0])
    stats = ops.pw_bnstats(stats.z, main[5].weight, *normalised(stats, main[4].weight, main[4].bias))
    end = stats.z, *normalised(stats, main[6].weight, main[6].bias)
    if proj is None:
        return ops.bn_act_cat(*end, x)
    stats = ops.dw_bnstats(x, proj[0].weight, stride=proj[0].stride[0])
    stats = ops.pw_bnstats(stats.z, proj[2].weight, *normalised(stats, proj[1].weight, proj[1].bias))
    return ops.bn_act_cat(*end, stats.z, *normalised(stats, proj[3].weight, proj[3].bias))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shuffle_unit(stride: int) -> None:
    """A unit out of blocks, with and without projection, is the modules' one, forwards and backwards."""
    torch.manual_seed(0)
    unit = ShuffleUnit(12, 12 * stride, 10, 3, stride).double()
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = image(3, 12, 7, 6, dtype=torch.float64).requires_grad_()
    plain = unit.branch_main(x[:, 1::2] if stride == 1 else x)
    wanted = torch.cat((x[:, ::2] if unit.branch_proj is None else unit.branch_proj(x), plain), 1)
    got = shuffle_unit(x, unit)
    torch.testing.assert_close(got, wanted)
    inputs, grad = [x, *unit.parameters()], image(*got.shape, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_a_layer_backwards_in_one_pass() -> None:
    """The raw backward op with a BN layer's five rows gives the gradients of conv, BN, ReLU; its sums are those of the
    layer in front."""
    torch.manual_seed(0)
    x, weight = image(3, 5, 6, 4, dtype=torch.float64).requires_grad_(), torch.randn(4, 5, 1, 1).double()
    (scale, shift), (gamma, beta) = (affine(size, torch.float64) for size in (5, 4))
    given = [value.requires_grad_() for value in (weight, scale, shift, gamma, beta)]
    stats = ops.pw_bnstats(x, weight, scale, shift, relu=True)
    grad = image(*stats.z.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(ops.bn_act_cat(stats.z, *normalised(stats, gamma, beta)), [x, *given], grad)

    with torch.no_grad():
        count, z, mean = x[:, 0].numel(), stats.z.detach(), stats.mean
        rstd = (stats.m2 / count + 1e-5).rsqrt()
        s, b = normalised(stats, gamma, beta)
        total, product = torch.ops.spos_fast.bn_act_cat_backward(grad, 0, z, s, b, mean, True)
        norm = torch.stack((s, b, mean, total / count, product * rstd**2 / count))
        centre = torch.randn(5).double()
        front = torch.ops.spos_fast.pw_bnstats_backward(
            grad, z, norm, True, x, weight, scale, shift, centre, True, 0, 1, 5, 4, None, None
        )
        grad_x = front[0] * scale[:, None, None]
        found = [grad_x, front[1], front[3] + centre * front[2], front[2], product * rstd, total]
    for a, c in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_slices_are_the_small_convolution(as_tensor: bool) -> None:
    """A slice gives the values and gradients of a convolution that has only these channels. NaN everywhere outside of
    it is never seen, and the gradients there are exactly zero."""
    torch.manual_seed(0)
    number = width if as_tensor else int
    for depthwise in (False, True):
        x = torch.full((2, 12, 5, 4), torch.nan).contiguous(memory_format=LAST)
        used = slice(0, 3) if depthwise else slice(3, 9, 2)  # tensors: sizes are those of all six channels
        x[:, used] = torch.randn(2, 3, 5, 4)
        weight = torch.full((6, 1, 3, 3) if depthwise else (7, 5, 1, 1), torch.nan)
        part = weight[:3] if depthwise else weight[:4, :3]
        part.copy_(torch.randn(part.shape))
        loaded, size = affine(3), (6 if depthwise else 5) if as_tensor else 3
        padded = [torch.cat((value, torch.full((size - 3,), torch.nan))) for value in loaded]
        big = [value.requires_grad_() for value in (x, weight, *padded)]
        small = [
            value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            for value in (x[:, used].contiguous(memory_format=LAST), part, *loaded)
        ]
        if depthwise:
            got = ops.dw_bnstats(*big, relu=True, channels=number(3))
            wanted, made = ops.dw_bnstats(*small, relu=True), 3
        else:
            options = {"channels_in": number(3), "channels_out": number(4)}
            got = ops.pw_bnstats(*big, relu=True, first=3, step=2, **options)
            wanted, made = ops.pw_bnstats(*small, relu=True), 4
        for a, b in zip(got, wanted, strict=True):
            at = 1 if a.dim() == 4 else 0
            torch.testing.assert_close(a.narrow(at, 0, made), b)
            assert not a.narrow(at, made, a.shape[at] - made).any()
        assert got.z.is_contiguous(memory_format=LAST)

        grad, mean_grad, m2_grad = torch.randn_like(wanted.z), torch.randn(made), torch.randn(made)
        absent = got.z.shape[1] - made
        given = [functional.pad(grad, (0, 0, 0, 0, 0, absent), value=torch.nan)]
        given += [functional.pad(value, (0, absent), value=torch.nan) for value in (mean_grad, m2_grad)]
        got_grads = torch.autograd.grad(list(got), big, given)
        wanted_grads = torch.autograd.grad(list(wanted), small, [grad, mean_grad, m2_grad])
        cut = [
            got_grads[0][:, used],
            got_grads[1][: part.shape[0], : part.shape[1]],
            *(value[:3] for value in got_grads[2:]),
        ]
        for a, b, whole in zip(cut, wanted_grads, got_grads, strict=True):
            torch.testing.assert_close(a, b)
            assert whole.count_nonzero() == a.count_nonzero()  # zeros outside; a NaN would count


def test_zeros_stay_exact() -> None:
    """A constant channel has a second moment of zero, and its mean is its value; zeros give zeros."""
    x = torch.zeros(3, 4, 17, 17).contiguous(memory_format=LAST)
    for stats in (ops.pw_bnstats(x, torch.randn(5, 4, 1, 1)), ops.dw_bnstats(x, torch.randn(4, 1, 3, 3))):
        assert not any(value.any() for value in stats)
    x += 0.1
    stats = ops.pw_bnstats(x, torch.ones(1, 4, 1, 1))
    assert ((stats.m2 >= 0) & (stats.m2 < 1e-20)).all()
    torch.testing.assert_close(stats.mean, stats.z[0, :, 0, 0], rtol=1e-7, atol=0)


def test_a_large_mean_costs_no_precision() -> None:
    """m2 of values 1000 deviations from zero: its error is that of z's rounding, not that of sums of squares."""
    torch.manual_seed(0)
    x, weight = (torch.randn(8, 1, 28, 28) + 1000).contiguous(memory_format=LAST), torch.ones(1, 1, 1, 1)
    for stats in (ops.pw_bnstats(x, weight), ops.dw_bnstats(x, weight)):
        z = stats.z.double()
        exact = (z - z.mean()).square().sum()
        assert abs(float(stats.m2) - float(exact)) <= 1e-6 * float(exact)


def test_layouts() -> None:
    """NCHW, sliced and transposed images give the values of the packed channels-last one, with one warning an op."""
    torch.manual_seed(0)
    x, pw, dw, end = image(2, 8, 5, 6), torch.randn(4, 8, 1, 1), torch.randn(8, 1, 3, 3), affine(8)
    wide = torch.full((2, 20, 5, 6), torch.nan).contiguous(memory_format=LAST)
    wide[:, 4:12] = x
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "pw_bnstats": lambda x: ops.pw_bnstats(x, pw).z,
        "dw_bnstats": lambda x: ops.dw_bnstats(x, dw).z,
        "bn_act_cat": lambda x: ops.bn_act_cat(x, *end, x),
    }
    for name, call in calls.items():
        wanted = call(x)
        layout._warned.discard(name)
        with pytest.warns(RuntimeWarning, match=f"{name}: . is not channels last") as caught:
            for value in (x.contiguous(), wide[:, 4:12], x.transpose(2, 3).contiguous().transpose(2, 3)):
                out = call(value)
                assert torch.equal(out, wanted) and out.is_contiguous(memory_format=LAST)
        assert sum("not channels last" in str(warning.message) for warning in caught) == 1


def test_strided_weights_and_gradients() -> None:
    """Weights in any layout, and a gradient that is a slice of a wider one or an expanded number."""
    torch.manual_seed(0)
    x, weight = image(2, 8, 5, 6).requires_grad_(), torch.randn(8, 8, 1, 1)
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.pw_bnstats(x, turned).z, ops.pw_bnstats(x, weight).z)
    assert torch.equal(ops.pw_bnstats(x, weight.contiguous(memory_format=LAST)).m2, ops.pw_bnstats(x, weight).m2)
    z = ops.pw_bnstats(x, weight).z
    (got,) = torch.autograd.grad(torch.cat((z, z), 1)[:, 3:11].sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(functional.conv2d(x, weight).sum(), x)
    torch.testing.assert_close(got, wanted)
    (got,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(got, wanted)


def network(x: Tensor, pw: Tensor, dw: Tensor, gamma: Tensor, beta: Tensor, used: Any = 3) -> Tensor:
    """Two layers and an end."""
    stats = ops.pw_bnstats(x, pw, first=1, step=2, channels_out=used)
    size = stats.mean.shape[0]
    loaded = normalised(stats, gamma[:size], beta[:size])
    stats = ops.dw_bnstats(stats.z, dw, *loaded, relu=True, channels=used)
    return ops.bn_act_cat(stats.z, *normalised(stats, gamma[:size], beta[:size]), x)


def arguments() -> list[Tensor]:
    """What network takes."""
    return [image(2, 8, 5, 6), torch.randn(5, 4, 1, 1), torch.randn(5, 1, 3, 3), *affine(5)]


@pytest.mark.parametrize("used", [3, width(3)], ids=["int", "tensor"])
def test_compile_fullgraph(used: Any) -> None:
    """torch.compile takes the blocks in one graph, forwards and backwards, with widths of either kind."""
    given = [value.requires_grad_() for value in arguments()]

    def loss(*values: Tensor) -> Tensor:
        return network(*values, used=used)[:, :7].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(*given), given)
    for a, b in zip(torch.autograd.grad(compiled(*given), given), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor() -> None:
    """So does its own back end."""
    given = arguments()
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(*given), network(*given))


def test_export() -> None:
    """torch.export keeps the blocks as ops, with any batch size."""

    class Module(nn.Module):
        def forward(self, x: Tensor, pw: Tensor, dw: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            return network(x, pw, dw, gamma, beta)

    given = arguments()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(Module(), tuple(given), dynamic_shapes=[batch, *[None] * 4])
    names = {str(node.target) for node in program.graph.nodes}
    assert {f"spos_fast.{name}.default" for name in ("pw_bnstats", "dw_bnstats", "bn_act_cat")} <= names
    larger = image(5, 8, 5, 6)
    torch.testing.assert_close(program.module()(larger, *given[1:]), network(larger, *given[1:]))


def test_autocast() -> None:
    """Under autocast images are made in its dtype, statistics and gradients of parameters stay wide."""
    given = [value.requires_grad_() for value in arguments()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(*given)
        assert ops.pw_bnstats(given[0], given[1][:, :4], step=2).mean.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in given)


def test_bad_values_show() -> None:
    """A NaN in a channel that is used shows in what it reaches; ReLU does not swallow it."""
    x, weight = image(2, 4, 5, 6), torch.randn(3, 4, 1, 1)
    x[0, 1, 2, 2] = torch.nan
    stats = ops.pw_bnstats(x, weight, *affine(4), relu=True)
    assert stats.z[0, :, 2, 2].isnan().all() and stats.mean.isnan().all() and stats.m2.isnan().all()
    stats = ops.dw_bnstats(x, torch.randn(4, 1, 3, 3), *affine(4), relu=True)
    assert stats.m2.isnan().tolist() == [False, True, False, False]
    assert int(ops.bn_act_cat(x, *affine(4)).isnan().sum()) == 1
