"""unit_eval and bn_update_running: the ops that take what normalisation layers of torch.nn keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spos_fast import ops
from spos_fast.nn import ShuffleUnit
from spos_fast.ops.dispatch import OPS
from spos_fast.ops.modules import unit_of
from tests.ops.samples import SAMPLES
from tests.ops.unit_samples import LAST, image

pytestmark = pytest.mark.usefixtures("poisoned_memory")

unit_eval, unit_train, bn_update_running = (
    OPS[name].overload for name in ("unit_eval", "unit_train", "bn_update_running")
)


def cloned(arguments: Any) -> Any:
    """The same with tensors of their own."""
    return tree_map_only(Tensor, lambda value: value.clone(memory_format=torch.preserve_format), arguments)


@pytest.mark.parametrize("name", ["unit_eval", "unit_train", "bn_update_running"])
def test_opcheck(name: str) -> None:
    """Schema (and which arguments are written to), fake tensors and AOT dispatch, as torch itself checks them."""
    samples = SAMPLES[name]()
    for arguments in samples[:: max(1, len(samples) // 4)]:
        torch.library.opcheck(OPS[name].overload, arguments)


def test_folding_is_that_of_the_inference_op() -> None:
    """The same unit with scale and shift computed by hand, and no channel beyond the slice is read."""
    for x, weights, mean, var, gamma, beta, mid, stride, eps in SAMPLES["unit_eval"]():
        if x.dtype != torch.float32:
            continue
        wanted = OPS["unit_eval"].reference(x, weights, mean, var, gamma, beta, mid, stride, eps)
        shuffle = len(weights) < 6
        inner = range(0, 2) if shuffle else range(1, 5)
        spoilt = cloned((mean, var, gamma, beta))
        for vectors in spoilt:
            for layer in inner if vectors else ():
                vectors[layer][mid:] = torch.nan
        got = unit_eval(x, weights, *spoilt, mid, stride, eps)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_training_step_is_that_of_two_ops() -> None:
    """unit_train: the bits of the unit's op, and of moving the statistics by what that hands out."""
    for x, weights, mean, var, counters, gamma, beta, momenta, mid, stride, eps in SAMPLES["unit_train"]():
        moved, wanted = cloned((mean, var, counters)), cloned((mean, var, counters))
        got = unit_train(x, weights, *moved, gamma, beta, momenta, mid, stride, eps)
        unit = unit_of(x, weights, mid, stride)
        affine = [
            torch.cat([vector[:size] for vector, size in zip(vectors, unit.sizes, strict=True)])
            for vectors in (gamma, beta)
            if vectors
        ]
        count = 3 if len(weights) < 6 else 6
        op = ops.shuffle_unit if count == 3 else ops.xception_unit
        projection = tuple(weights[count:]) or None
        out, batch_mean, batch_var = op(
            x, *weights[:count], *affine, projection=projection, mid=mid, stride=stride, eps=eps
        )
        values = [n * h * w for n, _, h, w in unit.saved_shapes]
        bn_update_running(*wanted, batch_mean, batch_var, unit.sizes, values, momenta)
        assert torch.equal(got, out)
        for ours, theirs in zip(moved, wanted, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_statistics_move_as_batch_norm_moves_them() -> None:
    """What three BatchNorm2d keep after a step, of part of their channels too, whatever the momentum."""
    torch.manual_seed(0)
    momenta, widths, images = [0.1, 0.35, 1.0], [5, 16, 33], [(4, 3, 3), (2, 1, 7), (1, 1, 2)]
    norms = [nn.BatchNorm2d(width, momentum=momentum) for width, momentum in zip(widths, momenta, strict=True)]
    kept = [cloned((norm.running_mean, norm.running_var, norm.num_batches_tracked)) for norm in norms]
    means, variances, counts = [], [], []
    for norm, (n, h, w) in zip(norms, images, strict=True):
        x = torch.randn(n, norm.num_features, h, w) + 1
        norm(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        means.append(mean)
        variances.append(var)
        counts.append(n * h * w)
    running = [list(vectors) for vectors in zip(*kept, strict=True)]
    bn_update_running(*running, torch.cat(means), torch.cat(variances), widths, counts, momenta)
    for norm, mean, var, counter in zip(norms, *running, strict=True):
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(var, norm.running_var)
        assert counter == 1 == norm.num_batches_tracked
    longer = [torch.full((9,), 2.0) for _ in range(2)]
    bn_update_running(longer[:1], longer[1:], [], torch.zeros(4), torch.zeros(4), [4], [8], [0.5])
    for vector in longer:
        assert vector.tolist() == [1.0] * 4 + [2.0] * 5


def test_bad_lists_are_refused_before_anything_moves() -> None:
    """Lists of different lengths, wrong dtypes, single values: an error that names the argument."""
    mean, var = [torch.zeros(4)], [torch.ones(4)]
    good = (mean, var, [], torch.ones(4), torch.ones(4), [4], [8], [0.5])
    for place, wrong, message in (
        (1, [], "one running_mean, running_var"),
        (3, torch.ones(3), "a value for every channel"),
        (3, torch.ones(4, dtype=torch.float16), "float32 or float64"),
        (1, [torch.ones(4, dtype=torch.float64)], "dtype of the batch's"),
        (1, [torch.ones(3)], "or longer"),
        (6, [1], "at least 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bn_update_running(*good[:place], wrong, *good[place + 1 :])
    assert mean[0].tolist() == [0.0] * 4 and var[0].tolist() == [1.0] * 4
    x, weights, *rest = SAMPLES["unit_eval"]()[0]
    for bad, message in (
        ((x, weights[:2], *rest), "3 of a shuffle unit"),
        ((x[:, :-2].contiguous(memory_format=LAST), weights, *rest), "channels to a branch"),
        ((x, weights, rest[0][:-1], *rest[1:]), "mean must hold 3 tensors, got 2"),
        ((x, weights, rest[0], [v[:3] for v in rest[1]], *rest[2:]), "or longer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            unit_eval(*bad)


def test_no_gradient_is_made_up() -> None:
    """Differentiating through unit_eval is an error, not a zero."""
    x, *rest = SAMPLES["unit_eval"]()[0]
    with pytest.raises(RuntimeError, match="not differentiable"):
        unit_eval(x.clone(memory_format=LAST).requires_grad_(), *rest).sum().backward()


def test_autograd_sees_that_statistics_moved() -> None:
    """A graph that saved the statistics notices a training step of a unit."""
    made = ShuffleUnit(8, 8, 4, 3).to(memory_format=LAST)
    norm = made.branch_main[1]
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = norm.eval()(x)
    norm.train()
    with torch.no_grad():
        made(image(2, 8, 5, 6))
    assert int(norm.num_batches_tracked) == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
