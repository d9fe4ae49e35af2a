"""The space of NAS-Bench-Macro: the benchmark's costs and equal networks, networks that are their paths."""

import csv

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spos_fast import InputError
from spos_fast.spaces import NASBenchMacro

SIZES = {
    "small": dict(stem_channels=4, head_channels=16, input_size=16),
    "odd": dict(stem_channels=6, head_channels=20, input_size=13, in_channels=1, stage_repeats=(1, 2), num_classes=7),
}


@pytest.fixture(scope="module")
def table(shared_data):
    """Digits of all networks, and the columns of the benchmark."""
    with open(shared_data / "nasbench_macro" / "nas_bench_macro.csv") as file:
        rows = list(csv.DictReader(file))
    return np.array([[int(digit) for digit in row["arch"]] for row in rows]), rows


def test_costs_are_the_benchmarks(table):
    """All 6,561 networks: parameters and FLOPs of the table."""
    genes, rows = table
    space = NASBenchMacro()
    for metric, column in (("params", "params"), ("macs", "flops")):
        assert (space.cost_tables[metric].totals(genes) == [int(row[column]) for row in rows]).all()


def test_isomorphic_networks_have_one_result(table):
    """The benchmark trained one network of every class: equal keys are equal accuracies in all three seeds."""
    genes, rows = table
    space, classes = NASBenchMacro(), {}
    for digits, row in zip(genes.tolist(), rows, strict=True):
        results = tuple(row[column] for column in ("acc0", "acc1", "acc2", "params", "flops"))
        classes.setdefault(space.isomorphism_key(digits), set()).add(results)
    assert len(classes) == 3969 and all(len(results) == 1 for results in classes.values())


@pytest.mark.parametrize("sizes", SIZES)
def test_costs_are_those_of_the_networks(sizes):
    """Counted in the networks that are built, at sizes that no table has."""
    space, rng = NASBenchMacro(**SIZES[sizes]), np.random.default_rng(0)
    config = space.config()
    for arch in [*(space.sample(rng) for _ in range(4)), *space.baselines().values()]:
        network = space.build(arch).eval()
        assert sum(parameter.numel() for parameter in network.parameters()) == space.cost(arch).params
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, config["in_channels"], config["input_size"], config["input_size"]))
        assert counter.get_total_flops() == 2 * space.cost(arch).macs


@pytest.mark.parametrize("sizes", SIZES)
def test_an_extracted_network_is_its_path(sizes):
    """Weights and statistics of the path, after training mode has moved the statistics."""
    torch.manual_seed(0)
    space, rng = NASBenchMacro(**SIZES[sizes]), np.random.default_rng(1)
    config = space.config()
    net, x = space.supernet(), torch.randn(4, config["in_channels"], config["input_size"], config["input_size"])
    for _ in range(6):
        arch = space.sample(rng)
        net.train()(x, arch)
        assert torch.equal(net.eval()(x, arch), net.extract(arch)(x))


def test_a_left_out_block_is_the_input():
    """Inside of a stage nothing runs; blocks that are left out may stand anywhere there."""
    torch.manual_seed(0)
    space = NASBenchMacro(**SIZES["small"])
    net, x = space.supernet().eval(), torch.randn(2, 3, 16, 16)
    arch = space.architecture([1, 0, 2, 0, 0, 0, 0, 0])
    assert space.isomorphism_key(arch.genes) == "1-0-2-0-0-0-0-0"
    assert net.path(arch)[2](x, 0) is x
    assert space.isomorphism_key((0, 0, 0, 0, 2, 1, 0, 1)) == "0-0-0-2-0-1-1-0"


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(stem_channels=0), "stem_channels"),
        (dict(head_channels=2.5), "head_channels"),
        (dict(stage_repeats=()), "stage_repeats"),
        (dict(stage_repeats=(2, 0)), "stage_repeats"),
    ],
)
def test_what_gives_no_network_is_refused(wrong, named):
    """By the name of the argument."""
    with pytest.raises(InputError, match=f"^{named}: got"):
        NASBenchMacro(**wrong)
