"""The peers are what their names say; a wrong peer makes a wrong ratio."""

from __future__ import annotations

import csv
import gzip
import itertools

import numpy as np
import pytest
import torch

from bench.peers import batchnorm, nasbench101, quantization


def test_nasbench_hashes_are_the_official_ones(shared_data):
    """Plain Python against the hashes of real cells."""
    with gzip.open(shared_data / "nasbench101" / "sample30001.csv.gz", "rt") as file:
        rows = list(itertools.islice(csv.DictReader(file), 0, 30_000, 200))
    assert len(rows) == 150
    for row in rows:
        matrix, labels = cell_of(row)
        assert nasbench101.hash_cell(matrix, labels) == row["hash"]


def cell_of(row):
    """Matrix and labels from the sample's columns."""
    bits = np.array([int(bit) for bit in row["adjacency_row_major"]], dtype=np.int8)
    count = int(row["vertices"])
    interior = next(value for name, value in row.items() if name.startswith("interior_ops"))
    return bits.reshape(count, count), [-1, *map(int, interior.split(",")), -2]


def test_nasbench_loader_reads_the_official_format(shared_data):
    """53 cells, three repeats each, halfway and final; hashes belong to the graphs."""
    fixed, computed = nasbench101.load(shared_data / "nasbench101" / "mini_only108_53cells.tfrecord")
    assert len(fixed) == len(computed) == 53
    for name, statistics in fixed.items():
        ops = ["conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"]
        labels = [-1, *(ops.index(op) for op in statistics["module_operations"][1:-1]), -2]
        assert nasbench101.hash_cell(statistics["module_adjacency"], labels) == name
        (repeats,) = computed[name].values()
        assert len(repeats) == 3
        for point in repeats:
            assert len(point) == 8 and 0.05 < point["final_test_accuracy"] < 0.96
            assert point["final_training_time"] > point["halfway_training_time"] > 0
        assert 227_274 <= statistics["trainable_parameters"] <= 49_979_274


def test_nasbench_enumeration_finds_every_cell():
    """91 cells of up to four vertices, 2,532 of up to five: the published counts."""
    assert len(nasbench101.enumerate_hashes(4)) == 91
    assert len(set(nasbench101.enumerate_hashes(5))) == 2_532


def test_nasbench_query_answers_one_of_three_repeats(shared_data):
    """What it gives was in the file."""
    fixed, computed = nasbench101.load(shared_data / "nasbench101" / "mini_only108_53cells.tfrecord")
    name, statistics = next(iter(fixed.items()))
    answer = nasbench101.query(fixed, computed, statistics["module_adjacency"], statistics["module_operations"])
    assert answer["test_accuracy"] in [point["final_test_accuracy"] for point in computed[name][108]]
    assert answer["trainable_parameters"] == statistics["trainable_parameters"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pact(bits):
    """Values on the grid over [0, alpha]; gradient 1 inside, all of it to alpha above."""
    x, alpha = torch.linspace(-1, 3, 41, requires_grad=True), torch.tensor([2.0], requires_grad=True)
    y = quantization.pact(x, alpha, bits)
    levels = 2**bits - 1
    torch.testing.assert_close(y, (x.clamp(0, 2) * levels / 2).round() * 2 / levels)
    y.sum().backward()
    inside, above = (x > 0) & (x < 2), x > 2
    assert (x.grad[inside] == 1).all() and (x.grad[above] == 0).all() and (x.grad[x < 0] == 0).all()
    at_the_edge = int((x == 2).sum())
    assert above.sum() <= alpha.grad <= above.sum() + at_the_edge


def test_dorefa_weights():
    """2^k levels in [-1, 1], the largest weight at an end."""
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = quantization.dorefa_weights(weight, 2)
    assert {round(value, 4) for value in y.tolist()} <= {-1.0, -0.3333, 0.3333, 1.0}
    assert y[weight.abs().argmax()].abs() == 1
    y.sum().backward()
    assert weight.grad.isfinite().all()


def test_lsq_composed_equals_pytorchs_own():
    """Values, and the gradients of x and of the step, against the learnable kernel of PyTorch and a closed form.

    Not within half a step outside the range: there PyTorch lets gradients pass, the paper does not.
    """
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 2
    scaled = values / 0.2
    values = values[~((scaled > -0.51) & (scaled < 0.01)) & ~((scaled > 14.99) & (scaled < 15.51))][:1000]
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (
        lambda x, s: quantization.lsq(x, s, 4, signed=False),
        lambda x, s: quantization.aten_learnable(x, s, 4),
    ):
        x = values.clone().requires_grad_()
        step = torch.tensor([0.2], requires_grad=True)
        out = function(x, step)
        results.append((out.detach(), *torch.autograd.grad(out, [x, step], grad)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    scaled = x.detach() / 0.2
    term = torch.where(
        scaled <= 0, torch.zeros(()), torch.where(scaled >= 15, torch.tensor(15.0), scaled.round() - scaled)
    )
    torch.testing.assert_close(results[0][2][0], (grad * term).sum() / (1000 * 15) ** 0.5, rtol=1e-4, atol=1e-5)
    cached = quantization.aten_cachemask(x.detach(), torch.tensor([0.2]), 4)
    torch.testing.assert_close(cached, results[0][0])


@pytest.mark.parametrize("groups", [1, 3])
def test_moments(groups):
    """Both ways against double."""
    x = torch.randn(6, 5, 4, 3) + 2
    wide = x.double().unflatten(0, (groups, -1))
    mean = wide.mean((1, 3, 4))
    m2 = (wide - mean[:, None, :, None, None]).square().sum((1, 3, 4))
    for peer in (batchnorm.var_mean, batchnorm.two_reads):
        got_mean, got_m2 = peer(x, groups)
        torch.testing.assert_close(got_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_m2.double(), m2, rtol=1e-5, atol=1e-6)
