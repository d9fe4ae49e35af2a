"""bn_moments against double precision, and as a torch citizen."""

import contextlib
import itertools
import sys

import numpy
import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.ops import batchnorm
from tests.fresh import run_fresh

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# One of everything that could go wrong at an edge: single samples, pixels and channels, few channels, more channels
# than the kernel walks at once, counts that no vector width divides.
SHAPES = [
    (4, 16, 14, 14),
    (1, 8, 7, 7),
    (6, 3, 5, 9),
    (5, 1, 11, 3),
    (2, 1, 1, 1),
    (1, 1, 1, 1),
    (7, 100, 1, 1),
    (2, 116, 4, 4),
    (2, 530, 3, 3),
    (3, 5, 1, 70),
    (2, 4, 65, 63),
]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every layout that the kernels treat differently."""
    n, c, h, w = x.shape
    wide = torch.full((n, 2 * c + 1, h, w), torch.nan, dtype=x.dtype)
    wide[:, c : 2 * c] = x
    wide_last = wide.to(memory_format=torch.channels_last)
    striped = torch.full((n, 2 * c, h, w), torch.nan, dtype=x.dtype)
    striped[:, ::2] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "slice": wide[:, c : 2 * c],
        "channels_last slice": wide_last[:, c : 2 * c],
        "every other channel": striped[:, ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


def exact(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and second moment in double, two passes."""
    wide = x.double().unflatten(0, (groups, -1))
    mean = wide.mean(dim=(1, 3, 4), keepdim=True)
    return mean[:, 0, :, 0, 0], (wide - mean).square().sum(dim=(1, 3, 4))


def assert_exact(x: Tensor, got: tuple[Tensor, Tensor], groups: int = 1, rtol: float = 0.0) -> None:
    """Within a few roundings of the output's dtype; the mean on the scale of the values it is the mean of."""
    mean, m2 = exact(x, groups)
    epsilon = 8 * torch.finfo(got[0].dtype).eps + rtol
    count = x.numel() // x.shape[1] // groups
    scale = mean.abs() + (m2 / count).sqrt()
    assert got[0].dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert got[0].shape == got[1].shape == (groups, x.shape[1])
    assert ((got[0] - mean).abs() <= epsilon * scale).all()
    assert ((got[1] - m2).abs() <= epsilon * m2 + count * (epsilon * scale) ** 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any shape, dtype and layout gives what double precision gives; nothing outside of a slice is read."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(dtype)
    for name, laid_out in layouts(x).items():
        assert torch.equal(laid_out, x), name
        assert_exact(x, ops.bn_moments(laid_out))
        assert_exact(x, ops.bn_moments_reference(laid_out))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_groups(groups: int, memory_format: torch.memory_format) -> None:
    """Each run of N/groups samples has statistics of its own."""
    x = torch.randn(6, 10, 9, 9).contiguous(memory_format=memory_format)
    got = ops.bn_moments(x, groups)
    assert_exact(x, got, groups)
    one_by_one = [ops.bn_moments(part) for part in x.chunk(groups)]
    assert_exact(x, (torch.cat([m for m, _ in one_by_one]), torch.cat([m for _, m in one_by_one])), groups)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ratio", [0, 1, 10, 100, 1000])
def test_large_means(ratio: int, memory_format: torch.memory_format) -> None:
    """|mean| / std up to 1000 over 401,408 values: never worse than twice eager's var_mean, nor than 2e-7.

    2e-7 is the floor: the rounding of a float32 result, and what eager can reach by luck. fp32 sums of squares would
    lose every digit at 1000.
    """
    x = torch.randn(128, 2, 56, 28, generator=torch.Generator().manual_seed(1)) + ratio
    x = x.contiguous(memory_format=memory_format)
    count = x.numel() // 2
    mean, m2 = exact(x)
    got_mean, got_m2 = ops.bn_moments(x)
    eager_var, eager_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)

    def error(value: Tensor, wanted: Tensor) -> float:
        return float(((value.double() - wanted).abs() / wanted.abs().clamp_min(1)).max())

    assert error(got_m2 / count, m2 / count) <= max(2 * error(eager_var[None], m2 / count), 2e-7)
    assert error(got_mean, mean) <= max(2 * error(eager_mean[None], mean), 2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_twice_eagers_error_at_most(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The error is at most twice that of eager PyTorch in the same dtype (floor: 4 roundings of the output)."""
    x = (torch.randn(16, 24, 28, 28, generator=torch.Generator().manual_seed(2)) * 3 + 5).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    count = x.numel() // 24
    mean, m2 = exact(x)
    got_mean, got_m2 = ops.bn_moments(x)
    eager_var, eager_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    floor = 4 * torch.finfo(got_mean.dtype).eps
    for got, eager, wanted in ((got_mean, eager_mean, mean), (got_m2 / count, eager_var, m2 / count)):
        allowed = 2 * ((eager.double() - wanted) / wanted).abs().max()
        assert ((got.double() - wanted) / wanted).abs().max() <= max(float(allowed), floor)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(3, 20, 9, 9), (4, 40, 1, 1), (2, 3, 31, 33)], ids=str)
def test_bad_values_stay_in_their_channel(shape: tuple[int, ...], bad: float) -> None:
    """A NaN or an infinity spoils its own channel and no other."""
    x = torch.randn(shape)
    x[1, 2] = bad
    others = [c for c in range(shape[1]) if c != 2]
    for laid_out in layouts(x).values():
        mean, m2 = ops.bn_moments(laid_out)
        assert not mean[0, 2].isfinite() and m2[0, 2].isnan()
        assert_exact(x[:, others], (mean[:, others], m2[:, others]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_constant_channels_have_no_variance(memory_format: torch.memory_format) -> None:
    """Equal values give their value and a second moment of nothing but the rounding of it; never a negative one."""
    x = torch.full((3, 20, 17, 17), 0.1).contiguous(memory_format=memory_format)
    mean, m2 = ops.bn_moments(x)
    assert (mean == 0.1).all()
    assert ((m2 >= 0) & (m2 < 1e-25)).all()


@pytest.mark.parametrize("shape", [(64, 24, 14, 14), (2, 700, 5, 5), (8, 3, 64, 64)], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Results do not depend on how many threads torch has."""
    threads = torch.get_num_threads()
    try:
        for x in layouts(torch.randn(shape)).values():
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(ops.bn_moments(x))
            assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, 2), (torch.float16, 1)], ids=str)
def test_opcheck(dtype: torch.dtype, groups: int) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    inputs = layouts(torch.randn(4, 3, 5, 6).to(dtype))
    for name in ("contiguous", "channels_last slice", "transposed"):
        for grad in (False, True):
            sample = inputs[name].detach().requires_grad_(grad)
            torch.library.opcheck(torch.ops.spos_fast.bn_moments.default, (sample, groups))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients(memory_format: torch.memory_format) -> None:
    """First and second derivatives against finite differences in double."""
    x = torch.randn(4, 3, 3, 2, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.bn_moments(x, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.bn_moments(x, 2), (x,))


def test_gradients_of_one_output_and_of_halves() -> None:
    """Gradients have x's dtype and agree with the reference's, also where only one output is used."""
    for pick, dtype in itertools.product((0, 1), (torch.float32, torch.bfloat16)):
        x = torch.randn(4, 6, 5, 5).to(dtype).requires_grad_()
        (ops.bn_moments(x)[pick] * torch.arange(6)).sum().backward()
        got, x.grad = x.grad, None
        (ops.bn_moments_reference(x)[pick] * torch.arange(6)).sum().backward()
        assert got is not None and x.grad is not None and got.dtype == dtype
        torch.testing.assert_close(got, x.grad)


def test_compile_fullgraph() -> None:
    """torch.compile takes the op in one graph, forwards and backwards."""
    if sys.platform == "win32":
        pytest.skip("inductor needs a C++ compiler set up")

    def variance(x: Tensor) -> Tensor:
        mean, m2 = ops.bn_moments(x * 2, 2)
        return (m2 / x[0, 0].numel()).sum() + mean.square().sum()

    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    compiled = torch.compile(variance, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(variance(x), x)
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, wanted)


def test_autocast_keeps_statistics_wide() -> None:
    """Under autocast the statistics stay float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, m2 = ops.bn_moments(torch.randn(2, 3, 4, 4))
    assert mean.dtype == m2.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "groups", "kind", "message"),
    [
        ([1.0], 1, TypeError, "x must be a tensor, got list"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), 1, TypeError, "x must be float32, .* got torch.int32"),
        (torch.zeros(2, 3), 1, InputError, r"x must be \[N, C, H, W\], got shape \[2, 3\]"),
        (torch.zeros(0, 3, 4, 4), 1, InputError, r"at least one value .* got shape \[0, 3, 4, 4\]"),
        (torch.zeros(2, 3, 0, 4), 1, InputError, r"at least one value .* got shape \[2, 3, 0, 4\]"),
        (torch.zeros(4, 3, 2, 2), 3, InputError, "groups must divide the batch of 4 samples, got 3"),
        (torch.zeros(4, 3, 2, 2), 0, InputError, "groups must divide .* got 0"),
        (torch.zeros(4, 3, 2, 2), 2.0, TypeError, "groups must be an int, got float"),
    ],
)
def test_errors(x: object, groups: object, kind: type[Exception], message: str) -> None:
    """A mistake is named in one line, by the public function and by the reference alike."""
    for function in (ops.bn_moments, ops.bn_moments_reference):
        with pytest.raises(kind, match=message) as caught:
            function(x, groups)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_errors_of_the_raw_op() -> None:
    """Called past the public function, the kernel still refuses instead of reading what is not there."""
    for x, groups in ((torch.zeros(2, 3), 1), (torch.zeros(0, 3, 4, 4), 1), (torch.zeros(4, 3, 2, 2), 3)):
        with pytest.raises((RuntimeError, InputError), match="must"):
            torch.ops.spos_fast.bn_moments(x, groups)
    with pytest.raises((RuntimeError, TypeError), match="x must be float32"):
        torch.ops.spos_fast.bn_moments(torch.zeros(2, 3, 4, 4, dtype=torch.int64), 1)


CHECK = """
import torch
from spos_fast import ops
torch.manual_seed(0)
for groups, x in ((1, torch.randn(2, 5, 4, 4) + 3), (2, torch.randn(4, 20, 7, 7).to(memory_format=torch.channels_last)),
                  (1, torch.randn(2, 9, 3, 6).half()[:, ::2]), (1, torch.randn(3, 8, 1, 1).double())):
    for got, wanted in zip(ops.bn_moments(x, groups), ops.bn_moments_reference(x.double(), groups)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    x = x[:2].double().requires_grad_()
    ops.bn_moments(x)[1].sum().backward()
print(ops.explain())
"""


def backends() -> list[str]:
    """Those that run here; Triton interpreted."""
    found = ["auto", "reference"]
    with contextlib.suppress(ImportError):
        import triton

        # The interpreter of older tritons cannot loop with a newer numpy.
        if numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0" or triton.__version__ >= "3.9":
            found.append("triton")
    return found


def test_backends() -> None:
    """SPOS_FAST_BACKEND picks the kernel, every choice computes the same, and explain() says which it is; a misspelt
    one is an error that lists the right ones."""
    names = [*backends(), "cuda"]
    jobs = [(CHECK, {"SPOS_FAST_BACKEND": name, "TRITON_INTERPRET": "1"}) for name in names]
    *results, misspelt = run_fresh(jobs)
    for backend, result in zip(names, results, strict=False):
        assert result.returncode == 0, result.stderr
        row = next(line for line in result.stdout.splitlines() if line.split()[:2] == ["bn_moments", "cpu"])
        assert row.split()[2] == {"auto": "native"}.get(backend, backend)
        assert "Warning" not in result.stderr
    assert "SPOS_FAST_BACKEND must be one of auto, native, triton, reference, got 'cuda'" in misspelt.stderr


MISSING = """
import warnings, pathlib
from spos_fast import native
native._ops_library = native.OpsLibrary(pathlib.Path("/nowhere/_ops.so"))
import torch
from spos_fast import ops
x = torch.randn(2, 3, 4, 4)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    ops.bn_moments(x); ops.bn_moments(x)
print(len(seen), seen[0].message)
print(ops.explain())
"""


def test_a_missing_library_is_said_once() -> None:
    """Without the .so the reference serves, with one warning; strict makes it an error, as does asking for native."""
    environments: list[dict[str, str]] = [{}, {"SPOS_FAST_STRICT": "1"}, {"SPOS_FAST_BACKEND": "native"}]
    result, *refused = run_fresh([(MISSING, environment) for environment in environments])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 spos_fast.bn_moments has no kernel on cpu: _ops.so is not there; build it with")
    assert "reference" in result.stdout
    for result in refused:
        assert "RuntimeError: spos_fast.bn_moments has no kernel on cpu" in result.stderr


def test_the_schema_is_what_the_docs_say() -> None:
    """The op's schema is public: a change of it breaks exported graphs."""
    schema = str(torch.ops.spos_fast.bn_moments.default._schema)
    assert schema == "spos_fast::bn_moments(Tensor x, int groups=1) -> (Tensor mean, Tensor m2)"
    assert set(batchnorm.DTYPES) == set(DTYPES)
