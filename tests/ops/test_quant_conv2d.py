"""quant_conv2d against the same thing composed of PyTorch's functions in double, and what it keeps and promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import TensorsAlive
from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.ops import integer_conv
from spos_fast.ops.dispatch import OPS
from tests.ops import composed_quant
from tests.ops.samples import SAMPLES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LAST = torch.channels_last
BITS = torch.arange(1, 9, dtype=torch.int32)
INTEGERS = pytest.mark.skipif(not integer_conv.available(), reason="this PyTorch has no oneDNN convolution on integers")
FUSED = pytest.mark.skipif(
    OPS["integer_conv2d"].choices["cpu"].kernel != "native", reason="integer_conv2d has no kernel in this build"
)
# N, C, H, W, C_out, kernel, groups, stride, padding, dilation
SHAPES = {
    "3x3": (2, 9, 7, 6, 12, 3, 1, 1, 1, 1),
    "strided 1x1": (2, 8, 7, 6, 5, 1, 1, 2, 0, 1),
    "depthwise": (2, 17, 6, 7, 17, 3, 17, 1, 1, 1),
    "groups": (1, 8, 9, 9, 12, 3, 4, 2, 2, 2),
    "one channel": (2, 1, 5, 5, 1, 5, 1, 1, 2, 1),
    "whole packs": (2, 20, 6, 17, 48, 3, 1, 1, 1, 1),
    "strided whole packs": (1, 4, 9, 7, 16, 1, 1, 2, 0, 1),
}


class Given:
    """Random arguments of one convolution, all differentiable."""

    def __init__(
        self,
        name: str = "3x3",
        dtype: torch.dtype = torch.float32,
        *,
        act: int = 4,
        weight: int = 4,
        act_mode: str = "pact",
        weight_mode: str = "dorefa",
        per_channel: bool = False,
    ) -> None:
        n, c, h, w, out, k, groups, stride, padding, dilation = SHAPES[name]
        generator = torch.Generator().manual_seed(7 * act + weight)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        step = (
            0.4 + torch.rand(8, out, generator=generator) if per_channel else 0.4 + torch.rand(8, generator=generator)
        )
        step = step / (2.0 ** (BITS - 1)).view(-1, *[1] * (step.dim() - 1))
        alpha = 1.5 + torch.rand(8, generator=generator)
        self.tensors: dict[str, Tensor | None] = {
            "x": randn(n, c, h, w).to(dtype).contiguous(memory_format=LAST),
            "weight": (randn(out, c // groups, k, k) * 0.5).to(dtype),
            "bias": randn(out).to(dtype),
            "scale": (0.5 + torch.rand(c, generator=generator)).to(wide),
            "shift": randn(c).to(wide),
            "act_step": (alpha / (2.0**BITS - 1) if act_mode == "lsq" else alpha).to(wide),
            "weight_step": step.to(wide) if weight_mode == "lsq" else None,
        }
        size, parameter = 2**act - 1, self.tensors["act_step"][act - 1].double()
        along = self.tensors["scale"][:, None, None].double(), self.tensors["shift"][:, None, None].double()
        in_steps = 1 / parameter if act_mode == "lsq" else size / parameter
        self.tensors["x"] = composed_quant.away_from_ties(
            self.tensors["x"], lambda x: (x * along[0] + along[1]) * in_steps
        )
        if weight_mode == "lsq":
            steps = self.tensors["weight_step"][weight - 1].double()
            steps = steps[:, None, None, None] if per_channel else steps
            self.tensors["weight"] = composed_quant.away_from_ties(self.tensors["weight"], lambda w: w / steps)
        elif weight > 1:
            greatest = self.tensors["weight"].abs().max()
            self.tensors["weight"] = composed_quant.away_from_ties(
                self.tensors["weight"],
                lambda w: torch.where(w.abs() < greatest, composed_quant.dorefa_unit(w) * (2**weight - 1), 0.25),
            )
        for value in self.tensors.values():
            if value is not None:
                value.requires_grad_()
        self.act, self.weight, self.act_mode, self.weight_mode, self.per_channel = (
            act,
            weight,
            act_mode,
            weight_mode,
            per_channel,
        )
        self.settings: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    def ours(self, **changes: Any) -> Any:
        """By the op."""
        arguments = {**self.tensors, **self.settings, "act_mode": self.act_mode, "weight_mode": self.weight_mode}
        arguments |= dict(act_bits=BITS, act_index=self.act - 1, weight_bits=BITS, weight_index=self.weight - 1)
        return ops.quant_conv2d(**(arguments | {"per_channel": self.per_channel} | changes))

    def composed(self) -> tuple[Tensor, dict[str, Tensor]]:
        """In double, from leaves of their own; the output and these leaves."""
        leaves = {name: v.detach().double().requires_grad_() for name, v in self.tensors.items() if v is not None}
        step = leaves["weight_step"][self.weight - 1] if self.weight_mode == "lsq" else None
        if step is not None and self.per_channel:
            step = step[:, None, None, None]
        y = composed_quant.convolution(
            leaves["x"],
            leaves["weight"],
            leaves["bias"],
            leaves["scale"],
            leaves["shift"],
            leaves["act_step"][self.act - 1],
            self.act,
            self.act_mode,
            step,
            self.weight,
            **self.settings,
        )
        return y, leaves


@INTEGERS
@pytest.mark.parametrize("act", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(
    ("weight_mode", "weight"), [("dorefa", k) for k in (1, 2, 4, 7)] + [("lsq", k) for k in (1, 3, 8)]
)
@pytest.mark.parametrize("name", list(SHAPES))
def test_integers_are_exact(name: str, weight_mode: str, weight: int, act: int) -> None:
    """On codes every value is the double convolution of fake-quantized values but for the rounding of two steps, their
    product and the result: no sum is rounded, nothing saturates."""
    given = Given(name, act=act, weight=weight, weight_mode=weight_mode)
    made, exact = given.ours(bias=None).detach(), given.composed()[0].detach()
    exact -= given.tensors["bias"].detach().double()[:, None, None]
    # The composed sums are rounded too, in double, and the bias leaves a rounding where values are small.
    torch.testing.assert_close(made.double(), exact, rtol=3e-7, atol=1e-14 * float(exact.abs().max()))
    assert made.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(("weight_mode", "per_channel"), [("dorefa", False), ("lsq", False), ("lsq", True)])
@pytest.mark.parametrize("act_mode", ["pact", "pact_residual", "lsq"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_gradients(name: str, act_mode: str, weight_mode: str, per_channel: bool) -> None:
    """Of all arguments, through the output and its statistics, against composed autograd in double; in double to its
    last digits, in float32 to a few roundings. Entries that were not picked get exactly zero."""
    for bits in (1, 2, 4, 8):
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
            given = Given(
                name, dtype, act=bits, weight=bits, act_mode=act_mode, weight_mode=weight_mode, per_channel=per_channel
            )
            wanted, leaves = given.composed()
            generator = torch.Generator().manual_seed(bits)
            slope = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
            of_mean, of_m2 = torch.randn(2, wanted.shape[1], generator=generator, dtype=torch.float64)
            mean = wanted.mean((0, 2, 3))
            m2 = (wanted - mean[:, None, None]).square().sum((0, 2, 3))
            ((wanted * slope).sum() + (mean * of_mean).sum() + (m2 * of_m2).sum()).backward()
            made = given.ours(statistics=True)
            torch.testing.assert_close(made.mean.double(), mean, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(made.m2.double(), m2, rtol=tolerance, atol=tolerance)
            loss = (made.z.double() * slope).sum() + (made.mean.double() * of_mean).sum()
            (loss + (made.m2.double() * of_m2).sum()).backward()
            for argument, leaf in leaves.items():
                got, exact = given.tensors[argument].grad.double(), leaf.grad
                size = exact.norm() + (
                    leaves["x"].grad.norm() if argument == "act_step" else 0
                )  # a sum that may cancel
                error = float((got - exact).norm() / size)
                assert error < tolerance, (argument, bits, dtype, error)
                if argument.endswith("step"):
                    others = [k for k in range(8) if k != bits - 1]
                    assert not got[others].any()


def test_keeps_codes_and_no_copies() -> None:
    """What autograd keeps beside the arguments and the output is one byte for each value of x."""
    given = Given()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        out = given.ours(statistics=True)
    known = {
        value.untyped_storage().data_ptr() for value in (*given.tensors.values(), out.z, BITS) if value is not None
    }
    new = [value for value in kept if value.untyped_storage().data_ptr() not in known]
    x = given.tensors["x"]
    assert sum(value.nbytes for value in new) <= x.numel() + 4 * out.z.shape[1] + 3 * 8
    assert [value.dtype for value in new if value.numel() == x.numel()] == [torch.uint8]


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_slices(name: str) -> None:
    """First channels only: the bits of a call on the stored slice, gradients of exactly zero outside, NaN unread."""
    given = Given(name, weight_mode="lsq", per_channel=True)
    x, weight, bias = (given.tensors[key].detach() for key in ("x", "weight", "bias"))
    used_in, used_out = (5, 8) if name == "3x3" else (5, 5)
    weight[used_out:] = torch.nan
    if name == "3x3":
        weight[:, used_in:] = torch.nan
    x[:, used_in:] = torch.nan
    cut = {key: given.tensors[key][:used_in].detach().requires_grad_() for key in ("scale", "shift")}
    changes = dict(in_channels=used_in, out_channels=used_out, **cut)
    leaves = {key: given.tensors[key].requires_grad_() for key in ("x", "weight", "bias", "weight_step")}
    whole = given.ours(**changes)
    stored = weight[:used_out, :used_in] if name == "3x3" else weight[:used_out]
    small = given.ours(
        x=x[:, :used_in].detach().contiguous(memory_format=LAST),
        weight=stored.detach().clone(),
        bias=bias[:used_out].detach(),
        weight_step=leaves["weight_step"][:, :used_out].detach(),
        groups=1 if name == "3x3" else used_out,
        **cut,
    )
    assert torch.equal(whole, small) and whole.isfinite().all()
    whole.sum().backward()
    assert leaves["weight"].grad[:used_out].any() and not leaves["weight"].grad[used_out:].any()
    assert not leaves["x"].grad[:, used_in:].any() and not leaves["weight_step"].grad[:, used_out:].any()
    assert leaves["weight"].grad.isfinite().all() and leaves["x"].grad.isfinite().all()


def test_nan_is_not_swallowed() -> None:
    """A NaN in x, or in the weights, shows in the result; the next call is not touched by it."""
    given = Given()
    clean = given.ours()
    for name in ("x", "weight", "act_step"):
        broken = given.tensors[name].detach().clone()
        broken[(3,) if name == "act_step" else (0, 0, 0, 0)] = torch.nan
        assert given.ours(**{name: broken}).isnan().any()
        assert torch.equal(given.ours(), clean)


@pytest.mark.parametrize("mode", ["dorefa", "lsq"])
def test_backward_holds_no_more_than_it_must(mode: str) -> None:
    """With an image as large as the weights three tensors of their size at once, not four. The weights' gradient is in
    memory of torch's, not in what ops keep for their next call."""
    x = torch.rand(32, 48, 8, 48).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(1365, 48, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    step = torch.ones(1, requires_grad=True)
    out = ops.quant_conv2d(
        x,
        weight,
        act_step=step,
        act_bits=4,
        weight_step=torch.full((1,), 0.2, requires_grad=True) if mode == "lsq" else None,
        weight_bits=4,
        weight_mode=mode,
        stride=4,
    )
    grad = torch.ones_like(out)
    with TensorsAlive() as alive:
        out.backward(grad)
    unit = x.numel() * x.element_size()
    assert alive.most < 3.3 * unit
    assert weight.grad is not None and weight.grad.untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the result has its dtype; weights are quantized as they are stored, and their gradients too."""
    given = Given()
    x, weight = given.tensors["x"], given.tensors["weight"]
    with torch.autocast("cpu", dtype):
        made = given.ours(statistics=True)
    assert made.z.dtype == dtype and made.mean.dtype == torch.float32
    direct = given.ours(x=x.detach().to(dtype), bias=given.tensors["bias"].detach())
    assert torch.equal(made.z, direct)
    made.z.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@INTEGERS
def test_without_the_fused_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines on which oneDNN is faster give the same values, statistics and gradients, but for roundings."""
    given, made = Given("whole packs"), []
    for fuses in (integer_conv.fuses(), False):
        monkeypatch.setattr(integer_conv, "fuses", lambda fuses=fuses: fuses)
        results = given.ours(statistics=True)
        gradients = torch.autograd.grad(results.z.square().sum(), [given.tensors["x"], given.tensors["weight"]])
        made.append([*results, *gradients])
    for got, wanted in zip(*made, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@FUSED
def test_fused_bits_do_not_depend_on_threads() -> None:
    """Bands of few and of many rows, and moments of many tasks, come out the same for any number of threads."""
    threads = torch.get_num_threads()
    try:
        for given in SAMPLES["integer_conv2d"]():
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(OPS["integer_conv2d"].overload(*given))
            for other in results[1:]:
                assert all(map(torch.equal, other, results[0]))
    finally:
        torch.set_num_threads(threads)


@FUSED
def test_fused_nan_is_everywhere() -> None:
    """One NaN, also at a pixel that no output reads, gives NaN in all that is made: as of quantize_codes."""
    x, *rest = SAMPLES["integer_conv2d"]()[1]
    x = x.clone()
    x[0, 1, 8, 5] = torch.nan
    out, mean, m2, codes, step = OPS["integer_conv2d"].overload(x, *rest)
    assert out.isnan().all() and step.isnan() and codes[0, 1, 8, 5] == 0
    wanted = OPS["integer_conv2d"].reference(x, *rest)
    assert torch.equal(codes, wanted[3]) and wanted[0].isnan().all() and mean.shape == m2.shape == wanted[1].shape


@FUSED
def test_fused_convolution_refuses() -> None:
    """What the kernel would read beyond, and what it has no gradient of, are errors."""
    x, *rest = SAMPLES["integer_conv2d"]()[0]
    run, codes = OPS["integer_conv2d"].overload, torch.zeros(8, 4, 1, 1, dtype=torch.int8)
    for bad, message in (
        ((x[:, :16], None, None, *rest[2:]), "x must have 20 channels, got 16"),
        ((x, *rest[:6], codes, *rest[7:]), "weight must be what pack_codes gives"),
        ((x[:, :, :1, :1], *rest[:10], (0, 0), *rest[11:]), "at least as large as the kernel"),
        ((x, *rest[:7], rest[7][:5], *rest[8:]), "out_scale must be float32"),
        ((x.double(), *rest[:2], rest[2].double(), *rest[3:]), "x must be float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*bad)
    with pytest.raises(RuntimeError, match="multiple of 16 output channels"):
        OPS["pack_codes"].overload(codes)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        run(x.requires_grad_(), *rest)[0].sum().backward()


@FUSED
def test_fused_moments_of_wide_rows() -> None:
    """Sums in single precision are of few pixels, however long a row is."""
    _, *rest = SAMPLES["integer_conv2d"]()[0]
    wide = torch.rand(1, 20, 1, 100_000, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    out, mean, m2, *_ = OPS["integer_conv2d"].overload(wide, *rest)
    exact = out.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2.double(), exact.var((0, 2, 3), correction=0) * exact[0, 0].numel(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("out", [16, 17])
def test_sums_that_would_overflow_run_in_floats(out: int) -> None:
    """Sums of products of codes beyond 32 bits are no integers' business."""
    x, weight = torch.full((1, 8192, 3, 3), 9.0), torch.ones(out, 8192, 3, 3)
    made = ops.quant_conv2d(x, weight, act_step=torch.tensor([1.0]), act_bits=8, weight_bits=7)
    torch.testing.assert_close(made, torch.full_like(made, 8192 * 9.0), rtol=1e-5, atol=0)


def test_without_vnni_or_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that cannot add products of 8 bits, or have no convolution on integers: the same values, in float."""
    given = Given(act=8, weight=7)
    exact = given.composed()[0].detach()
    wanted = given.ours().detach().double()
    torch.testing.assert_close(wanted, exact, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(integer_conv, "most_activation_bits", lambda: 7)
    torch.testing.assert_close(given.ours().double(), exact, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(integer_conv, "available", lambda: False)
    torch.testing.assert_close(given.ours().double(), exact, rtol=1e-5, atol=1e-5)


def test_packed_weights() -> None:
    """Weights that stay packed give the bits of the op, for other images, sizes and bits of the activations."""
    given = Given("3x3")
    arguments = {name: given.tensors[name] for name in ("act_step", "weight_step")} | given.settings
    arguments |= dict(act_bits=BITS, act_mode="pact", weight_bits=BITS, weight_index=3, weight_mode="dorefa")
    packed = ops.PackedConv2d(
        given.tensors["weight"], given.tensors["bias"], per_channel=False, in_channels=None, out_channels=7, **arguments
    )
    affine = {name: given.tensors[name] for name in ("scale", "shift")}
    for size, bits in ((7, 4), (7, 2), (9, 8), (7, 4)):
        x = torch.randn(3, 9, size, 6).contiguous(memory_format=LAST)
        made = packed(x, bits - 1, **affine)
        assert not made.requires_grad
        assert torch.equal(made, given.ours(x=x, act_index=bits - 1, out_channels=7))


@pytest.mark.parametrize("out", [16, 17])
def test_packed_weights_keep_nan_and_take_other_channels(out: int) -> None:
    """A NaN is none that the ReLU behind swallows; what fits the stored channels is packed anew."""
    settings = Given("3x3").settings | dict(weight_step=None, weight_bits=4, weight_index=0, weight_mode="dorefa")
    settings |= dict(act_step=torch.ones(1), act_bits=4, act_mode="pact", per_channel=False, in_channels=None)
    packed = ops.PackedConv2d(torch.randn(out, 32, 3, 3), None, out_channels=None, **settings)
    x = torch.rand(2, 32, 5, 5)
    assert packed(x, relu=True).isfinite().all()
    x[0, 0, 0, 0] = torch.nan
    assert packed(x, relu=True).isnan().all()
    assert packed(torch.rand(2, 16, 5, 5)).shape == (2, out, 5, 5)


def test_opcheck() -> None:
    """Schema, fake, autograd and AOT dispatch, as torch checks them."""
    for arguments in SAMPLES["quant_conv2d"]():
        first, *rest = arguments
        torch.library.opcheck(OPS["quant_conv2d"].overload, (first.requires_grad_(), *rest))


def test_compiled_draws_of_bits() -> None:
    """100 random draws of bits as tensors are one graph forwards and one backwards, and give eager's bits."""
    from torch._dynamo.testing import CompileCounterWithBackend

    given = Given(weight_mode="lsq")
    counter = CompileCounterWithBackend("aot_eager")

    def step(act: Tensor, weight: Tensor) -> Tensor:
        made = given.ours(act_index=act, weight_index=weight, statistics=True)
        return made.z * (made.m2 + 1).rsqrt()[:, None, None]

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    draws = torch.randint(0, 8, (100, 2), generator=torch.Generator().manual_seed(0))
    for position, (act, weight) in enumerate(draws):
        out = compiled(act, weight)
        if position % 10 == 0:
            wanted = torch.autograd.grad(step(act, weight).sum(), given.tensors["act_step"])[0]
            assert torch.equal(out, step(act, weight))
            assert torch.equal(torch.autograd.grad(out.sum(), given.tensors["act_step"])[0], wanted)
    assert counter.frame_count <= 2


def test_export() -> None:
    """torch.export takes it as one op, for any batch size."""

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
            return ops.quant_conv2d(x, weight, act_step=alpha, act_bits=4, weight_bits=3, padding=1)

    x, weight, alpha = torch.randn(4, 3, 6, 6), torch.randn(5, 3, 3, 3), torch.tensor([2.0])
    program = torch.export.export(
        Module(), (x, weight, alpha), dynamic_shapes=[{0: torch.export.Dim("batch", min=2, max=64)}, None, None]
    )
    other = torch.randn(9, 3, 6, 6)
    assert torch.equal(program.module()(other, weight, alpha), Module()(other, weight, alpha))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_images(dtype: torch.dtype, name: str) -> None:
    """An empty batch gives an empty image of the right size, and zeros for all gradients, as PyTorch's convolution."""
    given = Given(name, dtype, weight_mode="lsq", per_channel=True)
    size = given.ours().shape
    given.tensors["x"] = given.tensors["x"].detach()[:0].requires_grad_()
    out = given.ours()
    assert out.shape == (0, *size[1:]) and out.dtype == dtype and out.is_contiguous(memory_format=LAST)
    out.sum().backward()
    for key, value in given.tensors.items():
        if value is not None:
            assert value.grad.shape == value.shape and not value.grad.any(), key


def test_second_derivatives_are_refused() -> None:
    """An error, not a gradient of zero."""
    given = Given()
    (grad,) = torch.autograd.grad(given.ours().square().sum(), given.tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="quant_conv2d"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(in_channels=10), "in_channels must be from 1 to 9"),
        (dict(out_channels=0), "out_channels must be from 1 to 12"),
        (dict(act_mode="lsq+"), "mode must be"),
        (dict(weight_step=torch.ones(8)), "weight_step must be given for lsq"),
        (dict(shift=None), "scale and shift must be given both"),
        (dict(stride=0), "stride must be"),
        (dict(padding=-1), "padding must be"),
        (dict(weight_index=8), "index must be from 0 to"),
        (dict(act_step=torch.ones(3)), r"act_step must be \[8\]"),
        (dict(bias=torch.ones(3)), r"bias must be \[12\]"),
        (dict(groups=2), "groups: got 2.*all 18"),
        (dict(x=torch.ones(2, 9, 0, 3)), "x must hold at least one value"),
        (dict(x=torch.ones(0, 9, 7, 6), statistics=True), "x must hold at least one value"),
        (dict(weight=torch.ones(12, 9, 11, 3)), "x must be as large as the kernel"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    """One line that names the argument, before anything is computed."""
    with pytest.raises(InputError, match=message):
        Given().ours(**changes)
