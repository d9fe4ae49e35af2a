"""The space of NAS-Bench-201: the benchmark's costs, networks that are their paths, edges that nothing reads."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spos_fast import InputError
from spos_fast.nasbench.nasbench201_cells import OPS, cell_genes
from spos_fast.nn.cells import Cell
from spos_fast.spaces import NASBench201

SIZES = {
    "small": dict(channels=4, cells=1, input_size=16),
    "reduced": dict(ops=("nor_conv_3x3", "none", "skip_connect"), channels=6, cells=2, input_size=8, in_channels=1),
    "classes": dict(channels=8, cells=3, input_size=20, num_classes=100),
}


def _images(space, count=4):
    config = space.config()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config["in_channels"], config["input_size"], config["input_size"], generator=generator)


def test_costs_are_the_benchmarks(shared_data):
    """All 15,625 cells: parameters and FLOPs of the table."""
    with np.load(shared_data / "nasbench201" / "nasbench201.npz") as table:
        genes, params, macs = table["ops"].astype(np.int64), table["params"], table["flops"]
    space = NASBench201()
    assert (space.cost_tables["params"].totals(genes) == params).all()
    assert (space.cost_tables["macs"].totals(genes) == macs).all()


def test_the_cost_of_the_full_network():
    """The best CIFAR-10 cell of the benchmark (94.37 %), by the formula of its columns."""
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
    space = NASBench201()
    cost = space.cost(space.architecture(cell_genes(text)))
    assert (cost.params, cost.macs) == (73_306 + 4 * 243_040 + 28_000, 7_783_040 + 4 * 35_389_440 + 3_932_160)


@pytest.mark.parametrize("sizes", SIZES)
def test_costs_are_those_of_the_networks(sizes):
    """Counted in the networks that are built, at sizes that no table has; MACs where every edge is read."""
    space = NASBench201(**SIZES[sizes])
    rng = np.random.default_rng(0)
    for arch in [*(space.sample(rng) for _ in range(4)), *space.baselines().values()]:
        network = space.build(arch).eval()
        assert sum(parameter.numel() for parameter in network.parameters()) == space.cost(arch).params
    for arch in space.baselines().values():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            space.build(arch).eval()(_images(space, 1))
        assert counter.get_total_flops() == 2 * space.cost(arch).macs


def test_a_cell_is_the_graph_of_the_paper():
    """Against a forward in the paper's words that runs every edge: the same output to rounding, bit for bit where no
    sum has three terms, also with nodes of zeros."""
    torch.manual_seed(0)
    cell, x = Cell(4, [OPS] * 6, affine=True).eval(), torch.randn(2, 4, 6, 6)
    for norm in (module for module in cell.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def run(edge, name, value):
        if name in ("none", "skip_connect"):
            return value * (name != "none")
        if name == "avg_pool_3x3":
            return nn.AvgPool2d(3, 1, 1, count_include_pad=False)(value)
        return cell.edges[edge][name](value.relu())

    for genes in [*np.random.default_rng(0).integers(5, size=(40, 6)).tolist(), [0, 3, 3, 0, 3, 2], [0] * 6]:
        first = run(0, OPS[genes[0]], x)
        second = run(1, OPS[genes[1]], x) + run(2, OPS[genes[2]], first)
        last = run(3, OPS[genes[3]], x) + run(4, OPS[genes[4]], first) + run(5, OPS[genes[5]], second)
        torch.testing.assert_close(cell(x, genes), last, rtol=1e-6, atol=1e-6)
        running = cell.running(genes)
        assert len(running) <= sum(OPS[gene].startswith("nor_conv") for gene in genes)


def test_what_nothing_reads_is_not_run():
    """An edge into a node that does not reach the output: no work, and gradients of None."""
    cell = Cell(4, [OPS] * 6, affine=False)
    genes = (3, 3, 2, 1, 0, 0)  # only 0 -> 3 is read
    cell(torch.randn(2, 4, 5, 5, requires_grad=True), genes).sum().backward()
    assert cell.running(genes) == [] and all(parameter.grad is None for parameter in cell.parameters())
    genes = (0, 0, 0, 0, 0, 3)  # node 2 is zeros
    out = cell(torch.randn(2, 4, 5, 5), genes)
    assert out.shape == (2, 4, 5, 5) and not out.any()


@pytest.mark.parametrize("sizes", SIZES)
def test_an_extracted_network_is_its_path(sizes):
    """Weights and statistics of the path, in evaluation and after training mode has moved the statistics."""
    torch.manual_seed(0)
    space = NASBench201(**SIZES[sizes])
    net, rng, x = space.supernet(), np.random.default_rng(1), _images(space)
    for _ in range(8):
        arch = space.sample(rng)
        net.train()(x, arch)
        assert torch.equal(net.eval()(x, arch), net.extract(arch)(x))
    assert not any(module.affine for module in net.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_network_of_its_own_asks_for_the_gradients_that_it_gets():
    """DistributedDataParallel fails on a parameter whose gradient is asked for and never made."""
    space = NASBench201(**SIZES["small"])
    for genes in ((3, 3, 2, 1, 0, 3), (3, 3, 2, 3, 0, 0), (3, 2, 3, 3, 3, 2)):
        network = space.build(space.architecture(genes))
        network(_images(space)).sum().backward()
        assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in network.parameters())


def test_reduced_spaces_are_the_papers():
    """Names and sizes; the same cell costs the same in all of them."""
    assert [NASBench201.reduced(number).size for number in (1, 2, 3)] == [4**6, 4**6, 3**6]
    assert "nor_conv_1x1" not in NASBench201.reduced(1).ops and "avg_pool_3x3" not in NASBench201.reduced(2).ops
    text = "|nor_conv_3x3~0|+|skip_connect~0|none~1|+|none~0|nor_conv_3x3~1|skip_connect~2|"
    costs = {
        space.cost(space.architecture(cell_genes(text, space.ops)))
        for space in (NASBench201(), *(NASBench201.reduced(number, cells=5) for number in (1, 2, 3)))
    }
    assert len(costs) == 1
    with pytest.raises(InputError, match="number"):
        NASBench201.reduced(4)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(ops=("none", "max_pool_3x3")), "ops"),
        (dict(ops=("none", "none")), "ops"),
        (dict(ops=("none",)), "ops"),
        (dict(ops="none"), "ops"),
        (dict(channels=0), "channels"),
        (dict(cells=1.5), "cells"),
        (dict(input_size=30), "input_size"),
    ],
)
def test_what_gives_no_network_is_refused(wrong, named):
    """By the name of the argument, before anything is built."""
    with pytest.raises(InputError, match=f"^{named}: got"):
        NASBench201(**wrong)
