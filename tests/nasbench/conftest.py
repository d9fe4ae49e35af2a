"""The published sample, and a made-up benchmark of all small cells with known properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spos_fast.nasbench.results import CellResults, read_results


@pytest.fixture(scope="session")
def sample_path(shared_data: Path) -> Path:
    path = shared_data / "nasbench101" / "sample30001.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def sample(sample_path: Path) -> CellResults:
    return read_results(sample_path)


@pytest.fixture(scope="session")
def small_space() -> CellResults:
    """Every cell of at most 5 vertices, 4 budgets and 3 repeats; accuracy grows with conv3x3 and falls with maxpool."""
    from spos_fast.nasbench import enumerate_cells, graphs

    cells = enumerate_cells()
    keep = cells.vertices <= 5
    ops, count = cells.ops[keep], int(keep.sum())
    rng = np.random.default_rng(0)
    counts = graphs.op_counts(ops)
    ability = 0.9 + 0.01 * counts[:, 0] - 0.005 * counts[:, 2] + rng.normal(0, 0.003, count)
    epochs = (4, 12, 36, 108)
    lost = np.array([0.5, 0.3, 0.05, 0.0]) + rng.normal(0, [0.05, 0.03, 0.01, 0.0], (count, 4))
    validation = (ability[:, None] - lost)[:, :, None] + rng.normal(0, 0.002, (count, 4, 3))
    time = (1000 + 300 * counts[:, 0])[:, None, None] * (np.array(epochs) / 108)[:, None] * np.ones((1, 4, 3))
    hashes = [name.decode() for name, kept in zip(cells.hashes.tolist(), keep, strict=True) if kept]
    return CellResults(
        "small space",
        hashes,
        cells.adjacency[keep],
        ops,
        cells.vertices[keep].astype(np.int8),
        cells.params[keep].astype(np.int64),
        epochs,
        (validation + 0.05).astype(np.float32),
        validation.astype(np.float32),
        (validation - 0.005).astype(np.float32),
        time.astype(np.float32),
    )
