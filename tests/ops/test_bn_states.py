"""bn_merge and bn_finalize against torch's batch norm and double precision, and as torch citizens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast import ops
from spos_fast.calibration import MODES, recalibrate
from spos_fast.errors import InputError
from tests.ops.samples import SAMPLES
from tests.ops.test_every_op import identical, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CHANNELS = (5, 16)
SIZES = (6, 3, 4, 2)  # images of each batch: averages of batches and pools differ


def batches(dtype: torch.dtype = torch.float64, mean: float = 1.0) -> list[Tensor]:
    """Images with the channels of all layers."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, sum(CHANNELS), 4, 5, generator=generator, dtype=torch.float64) * 2 + mean).to(dtype)
        for n in SIZES
    ]


def calibrated(given: list[Tensor], mode: str, momentum: float = 0.1) -> tuple[list[Tensor], list[Tensor]]:
    """The statistics after all batches; in ``"pooled"`` the unbiased variances."""
    mean, var, count = [], [], [0] * len(CHANNELS)
    for position, images in enumerate(given):
        moments = [ops.bn_moments(x) for x in images.split(CHANNELS, 1)]
        counts = [images.numel() // images.shape[1]] * len(CHANNELS)
        batch = [m[0] for m, _ in moments], [m2[0] for _, m2 in moments], counts
        mean, var = ops.bn_merge(mean, var, count, *batch, mode=mode, batches=position, momentum=momentum)
        count = [a + b for a, b in zip(count, counts, strict=True)]
    return mean, [v / (n - 1) for v, n in zip(var, count, strict=True)] if mode == "pooled" else var


class Layers(nn.Module):
    """Batch norms side by side, each on channels of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, **settings) for channels in CHANNELS)

    def forward(self, images: Tensor) -> None:
        """Nothing but the statistics is wanted."""
        for norm, x in zip(self.norms, images.split(CHANNELS, 1), strict=True):
            norm(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_modes_are_those_of_recalibrate(mode: str, dtype: torch.dtype) -> None:
    """Batch by batch the same statistics as torch's own layers under recalibrate: in double to its last digits, in
    float32 to the digits that layers of float32 keep."""
    given = batches(dtype)
    model = Layers(dtype=dtype)
    recalibrate(model, given, mode)  # type: ignore[arg-type]
    epsilon = 16 * torch.finfo(dtype).eps
    for norm, mean, var in zip(model.norms, *calibrated(given, mode), strict=True):
        torch.testing.assert_close(mean, norm.running_mean.double(), rtol=epsilon, atol=epsilon)
        torch.testing.assert_close(var, norm.running_var.double(), rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_ema_with_any_momentum(momentum: float) -> None:
    """The exponential average is that of torch's layers with this momentum."""
    given, model = batches(), Layers(dtype=torch.float64, momentum=momentum)
    for images in given:
        model(images)
    for norm, mean, var in zip(model.norms, *calibrated(given, "ema", momentum), strict=True):
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(var, norm.running_var)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_pooled_is_exact(mean: float) -> None:
    """Pooled statistics are those of all values at once, also far from zero."""
    given = batches(mean=mean)
    images = torch.cat(given).split(CHANNELS, 1)
    for x, got_mean, got_var in zip(images, *calibrated(given, "pooled"), strict=True):
        var, exact = torch.var_mean(x, (0, 2, 3))
        torch.testing.assert_close(got_mean, exact, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(got_var, var, rtol=1e-9 if mean > 1e5 else 1e-12, atol=0)


def test_biased_variances() -> None:
    """Variances divided by the count stand for the second moments that they came from."""
    mean, m2, count = [torch.randn(3)], [torch.rand(3) * 64], [64]
    for mode in MODES:
        wanted = ops.bn_merge([], [], [], mean, m2, count, mode=mode, batches=0)
        got = ops.bn_merge([], [], [], mean, [m2[0] / 64], count, mode=mode, batches=0, biased=True)
        assert identical(got, wanted)  # 64 is a power of two


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_candidate_spoils_no_other(mode: str) -> None:
    """NaN in the batch of one candidate stays in its tensors and its rows, and it makes no difference who shares a
    call."""
    torch.manual_seed(0)
    shapes = [(2, 7), (33,), (4, 40), (1,)] * 6  # more than one task of the kernel
    mean, batch_mean = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in "ab")
    var, batch_m2 = ([torch.rand(shape, dtype=torch.float64) for shape in shapes] for _ in "ab")
    batch_mean[0][1], batch_m2[0][1], batch_mean[5][2] = torch.nan, torch.nan, torch.inf
    counts = [9 + position for position in range(len(shapes))]
    given = mean, var, counts, batch_mean, batch_m2, counts
    together = ops.bn_merge(*given, mode=mode, batches=2)  # type: ignore[arg-type]
    alone = [ops.bn_merge(*([v] for v in layer), mode=mode, batches=2) for layer in zip(*given, strict=True)]
    assert identical(together, ([m for (m,), _ in alone], [v for _, (v,) in alone]))
    for position, (m, v) in enumerate(zip(*together, strict=True)):
        expected = torch.zeros(shapes[position], dtype=torch.bool)
        if position == 0:
            expected[1] = True
        if position == 5:
            expected[2] = True
        assert torch.equal(~m.isfinite(), expected) and v[~expected].isfinite().all()


@pytest.mark.parametrize("pooled", [False, True])
def test_finalize_is_batch_norm(pooled: bool) -> None:
    """scale * x + shift is what torch's batch norm makes of x with the same statistics, for rows of several candidates,
    with and without weights."""
    torch.manual_seed(0)
    mean, var = (
        [torch.randn(3, c, dtype=torch.float64) for c in CHANNELS],
        [torch.rand(3, c).double() for c in CHANNELS],
    )
    gamma, beta = [torch.randn(5), None], [None, torch.randn(16)]
    count = [10, 20] if pooled else None
    scales, shifts = ops.bn_finalize(mean, var, gamma, beta, 1e-3, count=count)
    for layer, channels in enumerate(CHANNELS):
        x = torch.randn(2, channels, dtype=torch.float64)
        weights = [None if v[layer] is None else v[layer].double() for v in (gamma, beta)]
        for row in range(3):
            v = var[layer][row] / (count[layer] - 1) if count else var[layer][row]
            wanted = functional.batch_norm(x, mean[layer][row], v, *weights, eps=1e-3)
            got = x * scales[layer][row] + shifts[layer][row]
            assert scales[layer].dtype == shifts[layer].dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_one_value_has_no_variance() -> None:
    """A pooled state of one value: its second moment 0 is its variance, as recalibrate takes it."""
    mean, var = ops.bn_merge([], [], [], [torch.ones(2)], [torch.zeros(2)], [1], mode="pooled", batches=0)
    scale, shift = ops.bn_finalize(mean, var, eps=0.25, count=[1])
    assert scale[0].tolist() == [2, 2] and shift[0].tolist() == [-2, -2]


def test_same_bits_for_any_number_of_threads() -> None:
    """Results do not depend on how many threads torch has."""
    threads = torch.get_num_threads()
    try:
        for name in ("bn_merge", "bn_finalize"):
            first, *_, last = SAMPLES[name]()
            for given in (first, last):
                many = tuple(value * 20 if isinstance(value, list) else value for value in given)
                results = []
                for count in (1, 5):
                    torch.set_num_threads(count)
                    results.append(getattr(torch.ops.spos_fast, name)(*many))
                assert identical(*results)
    finally:
        torch.set_num_threads(threads)


def test_opcheck() -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    mean, var = ([torch.rand(shape, dtype=torch.float64) for shape in ((2, 3), (4,))] for _ in "ab")
    batch = [m.float() for m in mean]
    gamma = [torch.rand(3).requires_grad_(), torch.empty(0)]
    wanted = [m.detach().requires_grad_() for m in mean]
    merge, finalize = torch.ops.spos_fast.bn_merge.default, torch.ops.spos_fast.bn_finalize.default
    torch.library.opcheck(merge, (wanted, var, [9, 8], batch, batch, [3, 2], "pooled", 2, 0.1, False))
    torch.library.opcheck(merge, ([], [], [], batch, batch, [3, 2], "ema", 0, 0.1, True))
    torch.library.opcheck(finalize, (wanted, var, gamma, [], 1e-5, [4, 2], torch.float32))
    torch.library.opcheck(finalize, (mean, var, [], gamma, 1e-5, [], torch.float32))


@pytest.mark.parametrize("count", [None, [5, 1]])
def test_gradients_of_finalize(count: list[int] | None) -> None:
    """First and second derivatives of everything against finite differences in double, with absent weights."""
    torch.manual_seed(0)
    mean = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (4,))]
    var = [(torch.rand(m.shape, dtype=torch.float64) + 0.5).requires_grad_() for m in mean]
    weights = [torch.randn(c, dtype=torch.float64, requires_grad=True) for c in (3, 4)]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        gamma, beta = [given[4], None], [None, given[5]]
        scale, shift = ops.bn_finalize(given[:2], given[2:4], gamma, beta, 1e-3, count=count, dtype=torch.float64)
        return *scale, *shift

    given = *mean, *var, *weights
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_no_gradient_goes_through_running_statistics() -> None:
    """What bn_merge makes asks for no gradient, whatever it was made from."""
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    mean, m2 = ops.bn_moments(x)
    state = ops.bn_merge([], [], [], [mean], [m2], [16], mode="pooled", batches=0)
    assert mean.requires_grad and not any(value.requires_grad for value in tensors(state))


def test_compile_and_export() -> None:
    """Moments, merge, scale and shift, normalisation: torch.compile and torch.export take them in one graph."""

    class Calibrated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean, m2 = ops.bn_moments(x, 2)
            state = ops.bn_merge([], [], [], [mean], [m2], [50], mode="cumulative", batches=0)
            state = ops.bn_merge(*state, [50], [mean + 1], [m2], [50], mode="cumulative", batches=1)
            (scale,), (shift,) = ops.bn_finalize(*state)
            return ops.bn_normalize(x, scale, shift, relu=True, groups=2)

    x, module = torch.randn(4, 3, 5, 5), Calibrated()
    wanted = module(x)
    assert identical(torch.compile(module, fullgraph=True, backend="aot_eager")(x), wanted)
    assert identical(torch.export.export(module, (x,)).module()(x), wanted)


S, F = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
MERGE: dict[str, Any] = {
    "mean": [S], "var": [S], "count": [9], "batch_mean": [F], "batch_m2": [F], "batch_count": [9],
    "mode": "pooled", "batches": 1, "momentum": 0.1, "biased": False,
}  # fmt: skip
FINALIZE: dict[str, Any] = {"mean": [S], "var": [S], "gamma": [F], "beta": [F], "eps": 1e-5, "count": [9]}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"mode": "median"}, InputError, "mode: got 'median'; expected one of cumulative, pooled, ema"),
        ({"batches": -1}, InputError, "batches must be the number of batches merged so far, got -1"),
        ({"batches": 1.0}, TypeError, "batches must be an int, got float"),
        ({"momentum": 1.5}, InputError, "momentum must be from 0 to 1, got 1.5"),
        ({"batch_mean": []}, InputError, "batch_mean must hold the statistics of at least one layer"),
        ({"batch_mean": [[1.0]]}, TypeError, r"batch_mean\[0\] must be a tensor, got list"),
        ({"batch_mean": [F.half()]}, TypeError, r"batch_mean\[0\] must be float32 or float64, got torch.float16"),
        ({"batch_m2": [S]}, TypeError, r"batch_m2\[0\] must be float32, got torch.float64"),
        ({"batch_m2": [F, F]}, InputError, "batch_m2 must hold 1 tensors, one a layer, got 2"),
        ({"batch_m2": [F[:2]]}, InputError, r"batch_m2\[0\] must be \[3\], got shape \[2\]"),
        ({"mean": [F]}, TypeError, r"mean\[0\] must be float64, got torch.float32"),
        ({"var": [S[None]]}, InputError, r"var\[0\] must be \[3\], got shape \[1, 3\]"),
        ({"var": []}, InputError, "var must hold 1 tensors, one a layer, got 0"),
        ({"batch_count": [0]}, InputError, r"batch_count\[0\] must be at least 1, got 0"),
        ({"batch_count": [1], "mode": "ema"}, InputError, r"batch_count\[0\] must be at least 2, got 1"),
        ({"batch_count": [2.0]}, TypeError, r"batch_count\[0\] must be an int, got float"),
        ({"count": []}, InputError, "count must hold 1 numbers, one a layer, got 0"),
        ({"count": [0]}, InputError, r"count\[0\] must be at least 1, got 0"),
    ],
)
def test_errors_of_merge(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line, by the public function and by the reference alike."""
    for function in (ops.bn_merge, ops.bn_merge_reference):
        with pytest.raises(kind, match=message) as caught:
            function(**{**MERGE, **changes})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"mean": [], "var": []}, InputError, "mean must hold the statistics of at least one layer"),
        ({"mean": [F]}, TypeError, r"mean\[0\] must be float64, got torch.float32"),
        ({"mean": [S[0]], "var": [S[0]]}, InputError, r"mean\[0\] must be \[..., C\], got no dimension"),
        ({"var": [S[:2]]}, InputError, r"var\[0\] must be \[3\], got shape \[2\]"),
        ({"gamma": [S]}, TypeError, r"gamma\[0\] must be float32, got torch.float64"),
        ({"gamma": [F, F]}, InputError, "gamma must hold 1 tensors, one a layer, got 2"),
        ({"beta": [F[:2]]}, InputError, r"beta\[0\] must be \[3\], got shape \[2\]"),
        ({"count": [0]}, InputError, r"count\[0\] must be at least 1, got 0"),
        ({"dtype": torch.float16}, TypeError, "dtype must be float32 or float64, got torch.float16"),
    ],
)
def test_errors_of_finalize(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    """The same for bn_finalize."""
    for function in (ops.bn_finalize, ops.bn_finalize_reference):
        with pytest.raises(kind, match=message) as caught:
            function(**{**FINALIZE, "dtype": torch.float32, **changes})
        assert "\n" not in str(caught.value)


def test_errors_of_the_raw_ops() -> None:
    """Called past the public functions, the kernels still refuse instead of reading what is not there."""
    for changes in (
        {"var": []},
        {"mean": [S[:2]]},
        {"mean": [F]},
        {"batch_m2": [F[:2]]},
        {"batch_count": []},
        {"mode": "x"},
    ):
        with pytest.raises((RuntimeError, InputError, TypeError), match="must"):
            torch.ops.spos_fast.bn_merge(**{**MERGE, **changes})
    for changes in ({"var": []}, {"var": [S[:2]]}, {"gamma": [F[:2]]}, {"beta": [S]}, {"count": [1, 1]}):
        with pytest.raises((RuntimeError, InputError, TypeError), match="must"):
            torch.ops.spos_fast.bn_finalize(**{**FINALIZE, "dtype": torch.float32, **changes})


def test_the_schemas_are_what_the_docs_say() -> None:
    """The ops' schemas are public: a change of them breaks exported graphs."""
    assert str(torch.ops.spos_fast.bn_merge.default._schema) == (
        "spos_fast::bn_merge(Tensor[] mean, Tensor[] var, int[] count, Tensor[] batch_mean, Tensor[] batch_m2, "
        "int[] batch_count, str mode, int batches, float momentum, bool biased) -> (Tensor[] mean, Tensor[] var)"
    )
    assert str(torch.ops.spos_fast.bn_finalize.default._schema) == (
        "spos_fast::bn_finalize(Tensor[] mean, Tensor[] var, Tensor[] gamma, Tensor[] beta, float eps, int[] count, "
        "ScalarType dtype) -> (Tensor[] scale, Tensor[] shift)"
    )
