"""NAS-Bench-101 in plain Python: the official hash (graph_util.hash_module with ModelSpec's pruning) and a loader.

Written from the rules, with the same data structures as the official code: numpy matrices, hashlib, dictionaries.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPERATIONS = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")


def prune(matrix: NDArray[Any], labels: Sequence[int]) -> tuple[NDArray[Any], list[int]] | None:
    """Only the vertices that lie on a path from the first to the last one; None if no path does."""
    count = len(matrix)

    def reached(start: int, edges: NDArray[Any]) -> set[int]:
        seen, waiting = {start}, [start]
        while waiting:
            vertex = waiting.pop()
            for other in range(count):
                if edges[vertex, other] and other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    kept = sorted(reached(0, matrix) & reached(count - 1, matrix.T))
    if len(kept) < 2:
        return None
    return matrix[np.ix_(kept, kept)], [labels[vertex] for vertex in kept]


def hash_module(matrix: NDArray[Any], labels: Sequence[int]) -> str:
    """Hash of a pruned cell; labels are -1 (input), 0, 1, 2 (operations), -2 (output)."""

    def digest(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    count = len(matrix)
    into, out_of = np.sum(matrix, axis=0).tolist(), np.sum(matrix, axis=1).tolist()
    hashes = [digest(str((o, i, label))) for o, i, label in zip(out_of, into, labels, strict=True)]
    for _ in range(count):
        before = hashes
        hashes = []
        for vertex in range(count):
            sources = sorted(before[other] for other in range(count) if matrix[other, vertex])
            targets = sorted(before[other] for other in range(count) if matrix[vertex, other])
            hashes.append(digest("".join(sources) + "|" + "".join(targets) + "|" + before[vertex]))
    return digest(str(sorted(hashes)))


def hash_cell(matrix: NDArray[Any], labels: Sequence[int]) -> str | None:
    """Pruned and hashed."""
    pruned = prune(matrix, labels)
    return None if pruned is None else hash_module(*pruned)


def enumerate_hashes(most_vertices: int) -> list[str]:
    """Hashes of all cells of 2 to ``most_vertices`` vertices and at most nine edges (scripts/generate_graphs.py)."""
    found: dict[str, None] = {}
    for count in range(2, most_vertices + 1):
        for bits in range(1 << (count * (count - 1) // 2)):
            matrix = np.zeros((count, count), dtype=np.int8)
            for target in range(1, count):
                for source in range(target):
                    matrix[source, target] = bits >> (source + target * (target - 1) // 2) & 1
            rows, columns = matrix.sum(axis=1), matrix.sum(axis=0)
            if not (rows[:-1].all() and columns[1:].all()) or rows.sum() > 9:
                continue
            for inner in itertools.product(range(3), repeat=count - 2):
                found.setdefault(hash_module(matrix, [-1, *inner, -2]))
    return list(found)


def query(
    fixed: dict[str, dict[str, Any]],
    computed: dict[str, dict[int, list[dict[str, float]]]],
    matrix: NDArray[Any],
    ops: Sequence[str],
    epochs: int = 108,
) -> dict[str, Any]:
    """One query as the official API answers it: prune, hash, copy both dictionaries, draw a repeat."""
    pruned = prune(matrix, [-1, *(OPERATIONS.index(op) for op in ops[1:-1]), -2])
    if pruned is None:
        raise KeyError(None)
    name = hash_module(*pruned)
    statistics, repeats = copy.deepcopy(fixed[name]), copy.deepcopy(computed[name])
    point = repeats[epochs][random.randint(0, 2)]
    metrics = ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy")
    return {**statistics, **{metric: point[f"final_{metric}"] for metric in metrics}}


def records(path: str | Path) -> Iterator[bytes]:
    """Payloads of a TFRecord file; the checksums are skipped, as the official reader's Python part does."""
    with open(path, "rb") as file:
        while head := file.read(12):
            (length,) = struct.unpack_from("<Q", head)
            yield file.read(length)
            file.read(4)


def load(path: str | Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[int, list[dict[str, float]]]]]:
    """The official dictionaries: fixed statistics by hash; computed statistics by hash and epochs, one a repeat."""
    fixed: dict[str, dict[str, Any]] = {}
    computed: dict[str, dict[int, list[dict[str, float]]]] = {}
    for record in records(path):
        name, epochs, raw_matrix, raw_ops, raw_metrics = json.loads(record)
        count = int(len(raw_matrix) ** 0.5)
        parameters, evaluations = decode_metrics(base64.decodebytes(raw_metrics.encode()))
        if name not in fixed:
            matrix = np.array([int(edge) for edge in raw_matrix], dtype=np.int8).reshape(count, count)
            fixed[name] = {
                "module_adjacency": matrix,
                "module_operations": raw_ops.split(","),
                "trainable_parameters": parameters,
            }
        point = {
            f"{when}_{metric}": evaluations[index][metric]
            for index, when in ((1, "halfway"), (2, "final"))
            for metric in ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy")
        }
        computed.setdefault(name, {}).setdefault(epochs, []).append(point)
    return fixed, computed


_METRICS = {2: "training_time", 3: "train_accuracy", 4: "validation_accuracy", 5: "test_accuracy"}


def decode_metrics(data: bytes) -> tuple[int, list[dict[str, float]]]:
    """Parameters and evaluations of a ``ModelMetrics`` protobuf: field 1 evaluations, 2 parameters, 3 total time."""
    parameters, evaluations = 0, []
    for field, value in _fields(data):
        if field == 1:
            pairs = _fields(value)
            evaluations.append(
                {_METRICS[number]: struct.unpack("<d", raw)[0] for number, raw in pairs if number in _METRICS}
            )
        elif field == 2:
            parameters = value
    return parameters, evaluations


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = data[position]
            position += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield key >> 3, data[position : position + length]
        position += length
