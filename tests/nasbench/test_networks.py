"""Networks of cells: parameters against the published ones, and the numbers they compute against a plain rewrite."""

import csv
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spos_fast.errors import InputError
from spos_fast.nasbench import OPERATIONS
from spos_fast.nasbench.model_spec import ModelSpec

torch = pytest.importorskip("torch")
C3, C1, POOL = OPERATIONS
INCEPTION = [
    [0, 1, 1, 1, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0, 0],
]


def parameters(spec: ModelSpec) -> int:
    from spos_fast.nasbench import network

    with torch.device("meta"):
        return sum(p.numel() for p in network(spec).parameters())


@pytest.mark.parametrize(
    ("matrix", "ops", "count"),
    [
        ([[0, 1], [0, 0]], ["input", "output"], 882_570),
        (INCEPTION, ["input", C1, C3, C3, C3, POOL, "output"], 2_694_282),
    ],
)
def test_published_parameters(matrix, ops, count) -> None:
    """The smallest cell and the official README's have the number of parameters that is published for them."""
    assert parameters(ModelSpec(matrix, ops)) == count


def test_parameters_of_real_cells(shared_data: Path) -> None:
    """Every 300th cell of the published sample has exactly the published number of parameters."""
    path = shared_data / "nasbench101" / "sample30001.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt") as file:
        rows = list(csv.reader(file))[1::300]
    assert len(rows) == 101
    for _, vertices, _, edges, inner, count, *_ in rows:
        matrix = np.array(list(map(int, edges))).reshape(int(vertices), -1)
        ops = ["input", *(OPERATIONS[int(op)] for op in inner.split(",") if op), "output"]
        assert parameters(ModelSpec(matrix, ops)) == int(count)


def test_vertex_channels() -> None:
    """The remainder goes to the first vertices before the output; a vertex is as wide as the widest one it feeds."""
    from spos_fast.nasbench.networks import vertex_channels

    edges = np.array(INCEPTION, dtype=bool).tolist()
    assert vertex_channels(64, 130, edges) == [64, 33, 33, 32, 32, 32, 130]
    chain = np.eye(4, k=1, dtype=bool).tolist()
    assert vertex_channels(8, 16, chain) == [8, 16, 16, 16]


def test_cell_computes_what_the_paper_says() -> None:
    """One cell with truncation, a sum, a concatenation and the input added to the output, against the same written out
    by hand: a swapped vertex, a lost edge or a wrong slice changes the numbers."""
    from spos_fast.nasbench.networks import Cell

    torch.manual_seed(0)
    # 1 feeds 2 and the output, 2 and 3 feed the output: 7 channels are 3 + 2 + 2, so vertex 2 reads 2 of vertex 1's 3.
    edges = np.zeros((5, 5), dtype=bool)
    for source, target in [(0, 1), (1, 2), (1, 4), (0, 3), (2, 4), (3, 4), (0, 4), (0, 2)]:
        edges[source, target] = True
    cell = Cell(edges.tolist(), ["input", C3, C1, POOL, "output"], 4, 7).double()
    for module in cell.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.normal_(module.bias)
    images = torch.randn(3, 4, 6, 6, dtype=torch.float64)

    def unit(block, x, padding=0):
        convolved = torch.nn.functional.conv2d(x, block[0].weight, padding=padding)
        mean = convolved.mean((0, 2, 3), keepdim=True)
        variance = ((convolved - mean) ** 2).mean((0, 2, 3), keepdim=True)
        scale, shift = (p.view(1, -1, 1, 1) for p in (block[1].weight, block[1].bias))
        return ((convolved - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    first = unit(cell.ops[0], unit(cell.projections["1"], images), padding=1)
    second = unit(cell.ops[1], first[:, :2] + unit(cell.projections["2"], images))
    third = torch.nn.functional.max_pool2d(unit(cell.projections["3"], images), 3, 1, 1)
    wanted = torch.cat([first, second, third], 1) + unit(cell.projections["4"], images)
    torch.testing.assert_close(cell(images), wanted)


def test_shapes_and_sizes() -> None:
    """Smaller networks and odd image sizes work; the batch statistics have the published momentum."""
    from spos_fast.nasbench import network

    spec = ModelSpec(INCEPTION, ["input", C1, C3, C3, C3, POOL, "output"])
    net = network(spec, stem_channels=7, stacks=2, cells_per_stack=1, num_classes=4, in_channels=1)
    assert net(torch.randn(2, 1, 9, 9)).shape == (2, 4)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert {(m.momentum, m.eps) for m in norms} == {(0.003, 1e-5)}


@pytest.mark.parametrize(
    ("matrix", "ops", "sizes", "message"),
    [
        ([[0, 0], [0, 0]], ["input", "output"], {}, "no path leads from its input to its output"),
        ([[0, 1, 0], [0, 0, 1], [0, 0, 0]], ["input", "conv5x5", "output"], {}, "unknown operation 'conv5x5'"),
        ([[0, 1], [0, 0]], ["input", "output"], {"stacks": 0}, "stacks: got 0; expected a positive number"),
        (INCEPTION, ["input", C1, C3, C3, C3, POOL, "output"], {"stem_channels": 3}, "stem_channels: got 3; too few"),
    ],
)
def test_errors(matrix, ops, sizes, message) -> None:
    """A cell or a size that makes no network is named in one line."""
    from spos_fast.nasbench import network

    with pytest.raises(InputError, match=message):
        network(ModelSpec(matrix, ops), **sizes)


def test_import_needs_no_torch() -> None:
    """spos_fast.nasbench and its API load without torch: starting a program that only queries takes no seconds."""
    code = "import sys, spos_fast.nasbench, spos_fast.nasbench.model_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
