"""Writes files of the official format with made-up trainings: small ones for tests, full-size ones for measurements.

python tests/nasbench/official_file.py OUT [--cells 423624] [--epochs 108] [--repeats 3] [--seed 0]
"""

import argparse
import base64
import json
import random
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from spos_fast.nasbench import OPERATIONS, enumerate_cells

CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, CRC_TABLE >> 1 ^ 0x82F63B78, CRC_TABLE >> 1).astype(np.uint32)


def masked_crc32c(texts: Sequence[bytes]) -> list[int]:
    """The check of TFRecord for many texts at once, independent of the C++ under test."""
    sums = np.zeros(len(texts), np.uint32)
    lengths = np.array([len(text) for text in texts])
    for length in set(lengths.tolist()):
        where = lengths == length
        columns = np.frombuffer(b"".join(text for text in texts if len(text) == length), np.uint8)
        crc = np.full(where.sum(), 0xFFFFFFFF, np.uint32)
        for column in columns.reshape(-1, length).T:
            crc = crc >> 8 ^ CRC_TABLE[(crc ^ column) & 255]
        sums[where] = ~crc
    return (((sums >> 15 | sums << 17) + np.uint32(0xA282EAD8)) & 0xFFFFFFFF).tolist()


def frames(records: Sequence[bytes]) -> bytes:
    """The bytes of a TFRecord file."""
    lengths = [struct.pack("<Q", len(record)) for record in records]
    heads, feet = masked_crc32c(lengths), masked_crc32c(records)
    parts = zip(lengths, heads, records, feet, strict=True)
    return b"".join(
        length + struct.pack("<I", head) + record + struct.pack("<I", foot) for length, head, record, foot in parts
    )


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def evaluation(values: Sequence[float]) -> bytes:
    """An EvaluationData: epoch, training_time, train, validation and test accuracy; fewer values leave out the last."""
    fields = b"".join(struct.pack("<Bd", field << 3 | 1, value) for field, value in enumerate(values, 1))
    return b"\x0a" + varint(len(fields)) + fields


def metrics(evaluations: Iterable[Sequence[float]], params: int, total_time: float = 1.0) -> bytes:
    """A ModelMetrics."""
    message = b"".join(map(evaluation, evaluations))
    return message + b"\x10" + varint(params) + b"\x19" + struct.pack("<d", total_time)


def record(hash: str, epochs: int, matrix: str, ops: str, message: bytes) -> bytes:
    """The JSON list of a record."""
    return json.dumps([hash, epochs, matrix, ops, base64.encodebytes(message).decode()]).encode()


def write_file(path: Path, cells: int, epochs: Sequence[int], repeats: int, seed: int) -> None:
    """A valid file of random cells in random order; every number is a float32."""
    space = enumerate_cells()
    order = random.Random(seed).sample(range(len(space)), cells)
    rng = np.random.default_rng(seed)
    pending: list[bytes] = []
    with open(path, "wb") as file:
        for count, i in enumerate(order, 1):
            n = int(space.vertices[i])
            matrix = "".join(map(str, space.adjacency[i, :n, :n].ravel().tolist()))
            ops = ",".join(["input", *(OPERATIONS[op] for op in space.ops[i, 1 : n - 1]), "output"])
            hash, params = space.hashes[i].decode(), int(space.params[i])
            for budget in epochs:
                accuracies = (rng.integers(0, 9985, (repeats, 3, 3)) / 9984).astype(np.float32).tolist()
                times = rng.uniform(1, 5000, repeats).astype(np.float32).tolist()
                for accuracy, time in zip(accuracies, times, strict=True):
                    points = [(0, 0), (budget / 2, time / 2), (budget, time)]
                    evaluations = [(*point, *values) for point, values in zip(points, accuracy, strict=True)]
                    pending.append(record(hash, budget, matrix, ops, metrics(evaluations, params, time)))
            if count % 2048 == 0 or count == len(order):
                file.write(frames(pending))
                pending.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=int, default=423624)
    parser.add_argument("--epochs", type=int, nargs="+", default=[108])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_file(options.out, options.cells, options.epochs, options.repeats, options.seed)


if __name__ == "__main__":
    main()
