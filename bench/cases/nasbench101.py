"""NAS-Bench-101 cells, on the CPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.peers import nasbench101 as peers
from bench.registry import OURS, Case
from spos_fast.nasbench import OPERATIONS, hash_cell

CELLS = 200
Cell = tuple[NDArray[np.uint8], list[int]]


def random_cells(count: int) -> list[Cell]:
    """Cells of 7 vertices and 9 edges at most that have a path from input to output, as the official notebook draws."""
    rng = random.Random(0)
    cells: list[Cell] = []
    while len(cells) < count:
        matrix = np.zeros((7, 7), dtype=np.uint8)
        for vertex in range(7):
            for other in range(vertex + 1, 7):
                matrix[vertex, other] = rng.random() < 0.5
        labels = [-1, *(rng.randrange(3) for _ in range(5)), -2]
        pruned = peers.prune(matrix, labels)
        if pruned is not None and pruned[0].sum() <= 9:
            cells.append((matrix, labels))
    return cells


def cases(device: str) -> list[Case]:
    """Hashes, one cell at a time."""
    if device != "cpu":
        return []

    def inputs(where: torch.device) -> list[Cell]:
        return random_cells(CELLS)

    def ours(cells: list[Cell]) -> Any:
        named = [
            (matrix, ["input", *(OPERATIONS[label] for label in labels[1:-1]), "output"]) for matrix, labels in cells
        ]
        return lambda: [hash_cell(matrix, names) for matrix, names in named]

    return [
        Case(
            op="NAS-Bench-101 hash",
            shape=f"{CELLS} cells, one by one",
            dtype="uint8",
            device=device,
            bytes=0,
            flops=0,
            inputs=inputs,
            contenders={
                OURS: ours,
                "plain Python": lambda cells: lambda: [peers.hash_cell(*cell) for cell in cells],
            },
            tests=("tests/nasbench/test_cell.py",),
            tolerance=0.0,
            items=CELLS,
            unit="cells",
            headline=True,
        )
    ]
