"""Running batch-norm statistics of many layers at once: merging a batch's into them, and what they come to.

A supernet's candidates have statistics of their own in every layer: thousands of short vectors. One call takes all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.dispatch import LIBRARY, define_op

StatisticsMode = Literal["cumulative", "pooled", "ema"]
_MODES: tuple[str, ...] = get_args(StatisticsMode)
_NO_GRADIENT = (
    "bn_merge is not differentiable: running statistics are kept outside of autograd, as BatchNorm2d keeps them"
)


def bn_merge(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    count: Sequence[int],
    batch_mean: Sequence[Tensor],
    batch_m2: Sequence[Tensor],
    batch_count: Sequence[int],
    *,
    mode: StatisticsMode,
    batches: int,
    momentum: float = 0.1,
    biased: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The statistics of one more batch merged into running ones, for any number of layers in one call.

    On a GPU one launch takes 340 layers (42 if built with nvcc 12). There is no Triton kernel; without the native one
    PyTorch runs layer by layer.

    The three modes are those of ``spos_fast.calibration.recalibrate``:

    - ``"cumulative"``: the plain average of the batches' means and unbiased variances (PyTorch's momentum None).
    - ``"pooled"``: mean and second moment of all values of all batches, by the rule of Chan, Golub and LeVeque (1979);
      ``var`` then holds the sum of squared distances, not divided by anything.
    - ``"ema"``: (1 - momentum) * state + momentum * batch, beginning with mean 0 and variance 1 (PyTorch's momentum).

    Every value of a state depends on the values in its place only: a NaN in one candidate's batch stays in that
    candidate, and it makes no difference which layers share a call. Not differentiable: gradients end here. A tensor
    costs the host about 10 us whatever its size, so candidates are best the rows of one tensor a layer.

    Args:
        mean: of each layer the state so far, any shape, float64. Before the first batch an empty list, or anything.
        var: likewise.
        count: of each layer how many values a channel's state stands for; ``"pooled"`` alone looks at it.
        batch_mean: of each layer the batch's mean, shape of the state; all float32, or all float64.
        batch_m2: likewise the sum of squared distances from it, as :func:`bn_moments` gives it.
        batch_count: of each layer how many values each of them is taken over; at least 2, in ``"pooled"`` 1.
        mode: see above.
        batches: how many batches the states stand for so far. With 0, ``mean``, ``var`` and ``count`` are not read.
        momentum: of ``"ema"``, from 0 to 1.
        biased: ``batch_m2`` holds biased variances, second moments divided by the count, as the units hand them out.

    Returns:
        The new means and the new variances (``"pooled"``: second moments), float64.

    Raises:
        TypeError: something that should be a tensor is none, or is of another dtype.
        InputError: lists or shapes that do not fit together, counts that are too small, an unknown mode.
    """
    given = _checked_merge(mean, var, count, batch_mean, batch_m2, batch_count, mode, batches, momentum)
    means, variances = _merge(*given, mode, batches, float(momentum), biased)
    return means, variances


def bn_merge_reference(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    count: Sequence[int],
    batch_mean: Sequence[Tensor],
    batch_m2: Sequence[Tensor],
    batch_count: Sequence[int],
    mode: StatisticsMode,
    batches: int,
    momentum: float,
    biased: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """What bn_merge computes, in plain PyTorch."""
    given = _checked_merge(mean, var, count, batch_mean, batch_m2, batch_count, mode, batches, momentum)
    mean, var, count, batch_mean, batch_m2, batch_count = given
    if batches == 0:
        mean = [torch.zeros_like(m, dtype=torch.float64) for m in batch_mean]
        var, count = [torch.ones_like(m) for m in mean], [0] * len(mean)
    elif mode != "pooled":
        count = [0] * len(mean)
    weight = momentum if mode == "ema" else 1 / (batches + 1)
    means, variances = [], []
    for m, v, done, b, m2, n in zip(mean, var, count, batch_mean, batch_m2, batch_count, strict=True):
        b, m2 = b.double(), m2.double() * (n if biased else 1)
        if mode == "pooled":
            delta = b - m
            means.append(m + delta * (n / (done + n)))
            variances.append((v if done else 0) + m2 + delta.square() * (done * n / (done + n)))
        else:
            means.append((1 - weight) * m + weight * b)
            variances.append((1 - weight) * v + weight * (m2 / (n - 1)))
    return means, variances


def bn_finalize(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    gamma: Sequence[Tensor | None] | None = None,
    beta: Sequence[Tensor | None] | None = None,
    eps: float = 1e-5,
    *,
    count: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor]]:
    """Batch norms as one multiplication and one addition each, for any number of layers in one call, launches as
    in :func:`bn_merge`.

    scale = gamma / sqrt(var + eps), shift = beta - mean * scale, computed in float64 and then rounded. Differentiable.

    Args:
        mean: of each layer, [..., C], float64: C channels, and whatever has statistics of its own in front.
        var: likewise.
        gamma: of each layer [C], dtype ``dtype``, or None for ones; None for ones everywhere.
        beta: likewise, None for zeros.
        eps: added to the variances.
        count: given, ``var`` holds second moments over that many values, one number a layer (the states of bn_merge's
            ``"pooled"``), of which the unbiased variance is taken: var / max(count - 1, 1).
        dtype: of the result: float32, or float64 for networks of float64.

    Returns:
        Scales and shifts, shapes of the means.

    Raises:
        TypeError: something that should be a tensor is none, or is of another dtype.
        InputError: lists or shapes that do not fit together, counts below 1.
    """
    gammas, betas = (_absent_as_empty(values, mean, dtype) for values in (gamma, beta))
    given = _checked_finalize(mean, var, gammas, betas, eps, [] if count is None else count, dtype)
    scales, shifts = _finalize(*given)
    return scales, shifts


def bn_finalize_reference(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    eps: float,
    count: Sequence[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """What bn_finalize computes, in plain PyTorch; absent gammas and betas are empty tensors, or empty lists."""
    mean, var, gamma, beta, _, count, _ = _checked_finalize(mean, var, gamma, beta, eps, count, dtype)
    scales, shifts = [], []
    for position, (m, v) in enumerate(zip(mean, var, strict=True)):
        scale = _rstd(v, position, count, eps)
        if gamma and not _absent(gamma[position]):
            scale = gamma[position] * scale
        shift = -m * scale
        if beta and not _absent(beta[position]):
            shift = beta[position] + shift
        scales.append(scale.to(dtype))
        shifts.append(shift.to(dtype))
    return scales, shifts


def _rstd(var: Tensor, position: int, count: Sequence[int], eps: float) -> Tensor:
    return ((var / max(count[position] - 1, 1) if count else var) + eps).rsqrt()


def _absent(value: Tensor) -> bool:
    """Whether this gamma or beta stands for none: lists of the raw op cannot hold None."""
    return value.shape == (0,)


def _absent_as_empty(
    values: Sequence[Tensor | None] | None, mean: Sequence[Tensor], dtype: torch.dtype
) -> Sequence[Tensor]:
    """As the raw op takes them: an empty list for none at all, an empty tensor for none of one layer."""
    if values is None or all(value is None for value in values):
        return []
    if len(values) != len(mean):
        return values  # type: ignore[return-value]  # refused by the check, which can name it
    return [m.new_empty(0, dtype=dtype) if v is None else v for v, m in zip(values, mean, strict=True)]


def _checked_merge(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    count: Sequence[int],
    batch_mean: Sequence[Tensor],
    batch_m2: Sequence[Tensor],
    batch_count: Sequence[int],
    mode: str,
    batches: int,
    momentum: float,
) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor], list[Tensor], list[int]]:
    """The lists as the kernels take them; refuses what does not fit."""
    if mode not in _MODES:
        raise InputError(f"mode: got {mode!r}; expected one of {', '.join(_MODES)}")
    if not isinstance(batches, int) or isinstance(batches, bool):
        raise TypeError(f"batches must be an int, got {type(batches).__name__}")
    if batches < 0:
        raise InputError(f"batches must be the number of batches merged so far, got {batches}")
    if not 0 <= momentum <= 1:
        raise InputError(f"momentum must be from 0 to 1, got {momentum}")
    if batches == 0:
        mean, var, count = [], [], []
    elif mode != "pooled":
        count = []
    layers = len(batch_mean)
    if layers == 0:
        raise InputError("batch_mean must hold the statistics of at least one layer, got an empty list")
    _check_dtypes("batch_mean", batch_mean, torch.float32, torch.float64)
    shapes, dtype = [m.shape for m in batch_mean], batch_mean[0].dtype
    _check_dtypes("batch_mean", batch_mean, dtype)
    _check_dtypes("batch_m2", batch_m2, dtype)
    _check_shapes("batch_m2", batch_m2, shapes)
    _check_counts("batch_count", batch_count, layers, 1 if mode == "pooled" else 2)
    if batches > 0:
        for name, values in (("mean", mean), ("var", var)):
            _check_dtypes(name, values, torch.float64)
            _check_shapes(name, values, shapes)
        if mode == "pooled":
            _check_counts("count", count, layers, 1)
    return list(mean), list(var), list(count), list(batch_mean), list(batch_m2), list(batch_count)


def _checked_finalize(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    eps: float,
    count: Sequence[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], float, list[int], torch.dtype]:
    """The lists as the kernels take them; refuses what does not fit."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    if len(mean) == 0:
        raise InputError("mean must hold the statistics of at least one layer, got an empty list")
    _check_dtypes("mean", mean, torch.float64)
    _check_dtypes("var", var, torch.float64)
    _check_shapes("var", var, [m.shape for m in mean])
    for position, m in enumerate(mean):
        if m.dim() == 0:
            raise InputError(f"mean[{position}] must be [..., C], got no dimension")
    for name, values in (("gamma", gamma), ("beta", beta)):
        _check_dtypes(name, values, dtype)
        if len(values) == len(mean):
            _check_shapes(
                name, values, [v.shape if _absent(v) else m.shape[-1:] for v, m in zip(values, mean, strict=True)]
            )
        elif len(values):
            raise InputError(f"{name} must hold {len(mean)} tensors, one a layer, got {len(values)}")
    if len(count):
        _check_counts("count", count, len(mean), 1)
    return list(mean), list(var), list(gamma), list(beta), float(eps), list(count), dtype


def _check_dtypes(name: str, values: Sequence[Tensor], *dtypes: torch.dtype) -> None:
    for position, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{position}] must be a tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name}[{position}] must be {wanted}, got {value.dtype}")


def _check_shapes(name: str, values: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    if len(values) != len(shapes):
        raise InputError(f"{name} must hold {len(shapes)} tensors, one a layer, got {len(values)}")
    for position, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if value.shape != shape:
            raise InputError(f"{name}[{position}] must be {list(shape)}, got shape {list(value.shape)}")


def _check_counts(name: str, counts: Sequence[int], layers: int, least: int) -> None:
    if len(counts) != layers:
        raise InputError(f"{name} must hold {layers} numbers, one a layer, got {len(counts)}")
    for position, value in enumerate(counts):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{name}[{position}] must be an int, got {type(value).__name__}")
        if value < least:
            raise InputError(f"{name}[{position}] must be at least {least}, got {value}")


def _fake_merge(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    count: Sequence[int],
    batch_mean: Sequence[Tensor],
    *_: Any,
    **__: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    def new() -> list[Tensor]:
        return [m.new_empty(m.shape, dtype=torch.float64) for m in batch_mean]

    return new(), new()


def _fake_finalize(
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    eps: float,
    count: Sequence[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    def new() -> list[Tensor]:
        return [m.new_empty(m.shape, dtype=dtype) for m in mean]

    return new(), new()


_merge = define_op(
    "bn_merge(Tensor[] mean, Tensor[] var, int[] count, Tensor[] batch_mean, Tensor[] batch_m2, int[] batch_count, "
    "str mode, int batches, float momentum, bool biased) -> (Tensor[] mean, Tensor[] var)",
    reference=bn_merge_reference,
    fake=_fake_merge,
)
_finalize = define_op(
    "bn_finalize(Tensor[] mean, Tensor[] var, Tensor[] gamma, Tensor[] beta, float eps, int[] count, ScalarType dtype) "
    "-> (Tensor[] scale, Tensor[] shift)",
    reference=bn_finalize_reference,
    fake=_fake_finalize,
)


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    ctx.mark_non_differentiable(*output[0], *output[1])


def _unreachable(*_: Any) -> None:
    raise RuntimeError("bn_merge is not differentiable: running statistics are kept outside of autograd")


torch.library.register_autograd("spos_fast::bn_merge", _unreachable, setup_context=_no_gradient, lib=LIBRARY)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mean, var, gamma, beta, ctx.eps, ctx.count, _ = inputs
    ctx.lengths = [len(values) for values in (mean, var, gamma, beta)]
    ctx.save_for_backward(*mean, *var, *gamma, *beta)


def _backward(ctx: Any, grad_scale: list[Tensor], grad_shift: list[Tensor]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    mean, var, gamma, beta = (list(itertools.islice(saved, length)) for length in ctx.lengths)
    grads: tuple[list[Tensor], ...] = ([], [], [], [])
    for position, (m, v) in enumerate(zip(mean, var, strict=True)):
        rstd = _rstd(v, position, ctx.count, ctx.eps)
        scale = gamma[position] * rstd if gamma and not _absent(gamma[position]) else rstd
        of_shift = grad_shift[position].double()
        of_scale = grad_scale[position].double() - of_shift * m  # the shift depends on the scale
        divisor = max(ctx.count[position] - 1, 1) if ctx.count else 1
        grads[0].append(-of_shift * scale)
        grads[1].append(of_scale * scale * rstd.square() * (-0.5 / divisor))
        for values, to, grad in ((gamma, grads[2], of_scale * rstd), (beta, grads[3], of_shift)):
            if values:
                like = values[position]
                to.append(
                    torch.zeros_like(like) if _absent(like) else grad.reshape(-1, len(like)).sum(0).to(like.dtype)
                )
    # To torch an empty list is one of tensors, and wants a list of gradients.
    return *grads, None, None if ctx.count else [], None


torch.library.register_autograd("spos_fast::bn_finalize", _backward, setup_context=_save_for_backward, lib=LIBRARY)
