"""The table: what comes out is what the official file held; a damaged file never answers."""

import base64
import json
import os
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spos_fast.cli import main
from spos_fast.errors import InputError
from spos_fast.nasbench import OPERATIONS, Table, enumerate_cells, hash_cell, hash_cells
from tests.nasbench.official_file import frames, metrics, record, write_file

MINI = "mini_only108_53cells.tfrecord"
EPOCHS = (4, 12, 36, 108)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up file of 200 cells, four budgets, two repeats."""
    path = tmp_path_factory.mktemp("official") / "made_up.tfrecord"
    write_file(path, 200, EPOCHS, 2, seed=1)
    return path


@pytest.fixture(scope="module")
def table(official: Path) -> Table:
    return Table.convert(official, official.with_suffix(".table"))


def records_of(path: Path) -> list[tuple[str, int, str, list[str], list[dict[int, float]], int]]:
    """A second reader, in plain Python, that knows just enough protobuf for files without unknown fields."""

    def fields(data: bytes):
        at = 0
        while at < len(data):
            tag, at = data[at], at + 1
            if tag & 7 == 1:
                yield tag >> 3, struct.unpack_from("<d", data, at)[0]
                at += 8
                continue
            value = shift = 0
            while True:
                value |= (data[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if data[at - 1] < 128:
                    break
            if tag & 7 == 2:
                yield tag >> 3, data[at : at + value]
                at += value
            else:
                yield tag >> 3, value

    data, at, out = path.read_bytes(), 0, []
    while at < len(data):
        size = struct.unpack_from("<Q", data, at)[0]
        name, epochs, matrix, ops, text = json.loads(data[at + 12 : at + 12 + size])
        message = list(fields(base64.b64decode(text)))
        evaluations = [dict(fields(value)) for field, value in message if field == 1]
        out.append((name, epochs, matrix, ops.split(","), evaluations, dict(message)[2]))
        at += size + 16
    return out


def check_against_records(table: Table, path: Path) -> int:
    """Every number of every record, by every way to ask for it; returns how many records there were."""
    arrays = table.to_numpy()
    budgets = arrays["epochs"].tolist()
    rows = {hash.decode(): row for row, hash in enumerate(arrays["hashes"].tolist())}
    seen: dict[tuple[str, int], int] = {}
    records = records_of(path)
    for name, epochs, matrix, ops, evaluations, params in records:
        repeat = seen.setdefault((name, epochs), 0)
        seen[name, epochs] += 1
        row, n = rows[name], len(ops)
        adjacency = np.array([int(digit) for digit in matrix]).reshape(n, n)
        assert table.find(adjacency, ops) == table.find_hash(name) == row
        cell = table.row(row)
        np.testing.assert_array_equal(cell.adjacency, adjacency)
        assert cell.ops == ops and cell.params == params == arrays["params"][row]
        np.testing.assert_array_equal(arrays["adjacency"][row, :n, :n], adjacency)
        labels = [-1, *(OPERATIONS.index(op) for op in ops[1:-1]), -2, *[0] * (7 - n)]
        assert arrays["ops"][row].tolist() == labels and arrays["vertices"][row] == n
        for point, halfway in ((1, True), (2, False)):
            wanted = tuple(evaluations[point][field] for field in (2, 3, 4, 5))
            assert table.metrics(row, epochs, repeat, halfway) == wanted
            answer = table.query(adjacency, ops, epochs, repeat, halfway)
            assert (answer["training_time"], answer["test_accuracy"]) == (wanted[0], wanted[3])
            at = row, budgets.index(epochs), repeat, point - 1
            names = ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy")
            assert tuple(float(arrays[key][at]) for key in names) == wanted
    assert list(rows) == list(dict.fromkeys(name for name, *_ in records)) == list(table)
    assert len(records) == table.records == int(np.isfinite(arrays["training_time"]).sum()) // 2
    return len(records)


def test_every_record(table: Table, official: Path) -> None:
    """Nothing of a file of four budgets is lost, moved or rounded."""
    assert check_against_records(table, official) == 200 * 4 * 2
    assert (len(table), table.epochs, table.repeats) == (200, EPOCHS, 2)


def test_every_real_record(shared_data: Path, tmp_path: Path) -> None:
    """The same for 53 real cells; their graphs and parameters are those of the enumeration."""
    path = shared_data / "nasbench101" / MINI
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with Table.convert(path, tmp_path / "table") as table:
        assert check_against_records(table, path) == 159
        arrays = table.to_numpy()
    space = enumerate_cells()
    where = [space.hashes.tolist().index(hash) for hash in arrays["hashes"].tolist()]
    for name in ("adjacency", "ops", "vertices", "params"):
        np.testing.assert_array_equal(arrays[name], getattr(space, name)[where])


def test_missing_repeats(tmp_path: Path) -> None:
    """A cell with fewer records than others has NaN in their place, whatever the order in the file."""
    times = [(108, 8.0), (4, 2.0), (108, 16.0)]
    cells = [((0, 1), "01" + "00", ["input", "output"]), ((0, 1, 2), "010001000", ["input", OPERATIONS[2], "output"])]
    texts = []
    for i, (_, matrix, ops) in enumerate(cells):
        adjacency = np.array([int(digit) for digit in matrix]).reshape(len(ops), -1)
        for epochs, time in times[: 3 - 2 * i]:
            points = [(0, 0, 0, 0, 0), (epochs / 2, time / 2, 0.5, 0.5, 0.5), (epochs, time, 1, 0.75, 0.75)]
            text = record(hash_cell(adjacency, ops), epochs, matrix, ",".join(ops), metrics(points, 300_000 + i))
            texts.append(text)
    (tmp_path / "file").write_bytes(frames(texts))
    with pytest.warns(RuntimeWarning, match="4 records, where 2 of every one of 2 cells and 2 .* would be 8"):
        table = Table.convert(tmp_path / "file", tmp_path / "table")
    arrays = table.to_numpy()
    assert arrays["epochs"].tolist() == [4, 108]
    wanted = [[[2, np.nan], [8, 16]], [[np.nan, np.nan], [8, np.nan]]]
    np.testing.assert_array_equal(arrays["training_time"][..., 1], wanted)
    np.testing.assert_array_equal(arrays["training_time"][..., 0], np.array(wanted) / 2)
    assert [table.repeats_of(row, epochs) for row in (0, 1) for epochs in (4, 12, 108)] == [1, 0, 2, 0, 0, 1]
    assert table.metrics(1, 4) is None
    with pytest.raises(InputError, match="repeat must be less than the 1 records of this cell, got 1"):
        table.record(1, 108, 1)


def test_lookup(table: Table) -> None:
    """A batch of known, unknown, unpruned and invalid cells, against one query each."""
    arrays = table.to_numpy()
    space = enumerate_cells()
    known = set(arrays["hashes"].tolist())
    others = [i for i in range(0, 4000, 7) if space.hashes[i] not in known]
    adjacency = np.concatenate([arrays["adjacency"], space.adjacency[others], np.zeros((1, 7, 7), np.uint8)])
    ops = np.concatenate([arrays["ops"], space.ops[others], [[-1, 0, 0, 0, 0, 0, -2]]]).astype(np.int8)
    for epochs, halfway in ((108, False), (12, True)):
        found = table.lookup(adjacency, ops, epochs=epochs, stop_halfway=halfway)
        assert found["rows"].tolist() == [*range(200), *[-1] * (len(others) + 1)]
        np.testing.assert_array_equal(found["params"], [*arrays["params"], *[0] * (len(others) + 1)])
        for name in ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy"):
            assert found[name].shape == (len(adjacency), 2) and found[name].dtype == np.float32
            np.testing.assert_array_equal(
                found[name][:200], arrays[name][:, EPOCHS.index(epochs), :, 0 if halfway else 1]
            )
            assert np.isnan(found[name][200:]).all()
    with pytest.raises(InputError, match="epochs must be one of 4, 12, 36, 108, got 7"):
        table.lookup(adjacency, ops, epochs=7)
    with pytest.raises(InputError, match="cell 3: ops must end with -2"):
        table.lookup(adjacency[:5], np.where(np.arange(5)[:, None] == 3, 0, ops[:5]))


def test_find_takes_what_hash_cell_takes(table: Table) -> None:
    """Any number type, unpruned and isomorphic cells, more than 7 vertices; mistakes are named, absence is None."""
    row = next(row for row in range(200) if len(table.row(row).ops) == 7)
    cell = table.row(row)
    for kind in (bool, np.int8, np.uint8, np.int32, np.int64, np.float32, np.float64):
        assert table.find(cell.adjacency.astype(kind), cell.ops) == row
        assert table.find(np.asfortranarray(cell.adjacency.astype(kind)), tuple(cell.ops)) == row
    assert table.find(cell.adjacency.tolist(), cell.ops) == row
    wider = np.insert(np.insert(cell.adjacency, 3, 0, axis=0), 3, 0, axis=1)  # 8 vertices, one of them on no path
    wider[0, 3] = 1
    assert table.find(wider, [*cell.ops[:3], OPERATIONS[0], *cell.ops[3:]]) == row
    full = np.triu(np.ones((7, 7), int), 1)
    assert table.find(full, cell.ops) is None
    assert table.find(np.zeros((3, 3), int), ["input", OPERATIONS[0], "output"]) is None
    assert table.find_hash("no hash") is None and "0" * 32 not in table and next(iter(table)) in table
    with pytest.raises(KeyError):
        table.query(full, cell.ops)
    with pytest.raises(InputError, match="zeros and ones only, got 2"):
        table.find(cell.adjacency * 2, cell.ops)
    with pytest.raises(InputError, match=r"must be one of conv3x3.*, got 'sepconv'"):
        table.find(cell.adjacency, [*cell.ops[:2], "sepconv", *cell.ops[3:]])
    with pytest.raises(IndexError, match="row 200 of a table of 200"):
        table.row(200)


def test_closing_and_pickling(table: Table) -> None:
    """A closed table says so instead of reading unmapped memory; arrays survive it; a worker can open its own."""
    other = pickle.loads(pickle.dumps(table))
    arrays = other.to_numpy()
    other.close()
    assert arrays["hashes"][0].decode() == table.hash(0)
    for ask in (len, Table.to_numpy, Table.verify, lambda closed: closed.find_hash("0" * 32), list):
        with pytest.raises(InputError, match="the table was closed"):
            ask(other)


def test_damage(table: Table, tmp_path: Path) -> None:
    """A changed byte anywhere: the table does not open, or the answer that needs it raises. The file is named."""
    good = table.path.read_bytes()
    whole = table.to_numpy()
    path = tmp_path / "damaged"
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, 4096, 20), *rng.integers(4096, len(good), 60)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1 :])
        with pytest.raises(InputError, match=f"^{path}: "):
            Table.open(path).verify()
        if at < 4096:
            with pytest.raises(InputError):
                Table.open(path)
            continue
        damaged = Table.open(path)
        for row in range(0, 200, 37):
            try:
                assert damaged.hash(row) == table.hash(row)
                assert damaged.metrics(row) == table.metrics(row)
            except InputError as error:
                assert "checksum of block" in str(error)
    np.testing.assert_array_equal(whole["params"], table.to_numpy()["params"])


def test_mistakes_of_convert(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line that names file and record, and the folder is as it was."""
    data = official.read_bytes()
    second = struct.unpack_from("<Q", data)[0] + 16
    flipped = bytearray(data)
    flipped[second + 100] ^= 4
    cases = {
        "flipped": (bytes(flipped), f"record 1 at byte {second}: checksum of its data is wrong"),
        "truncated": (data[:-1], "the file ends inside its data"),
        "foreign": (
            b"PK\3\4 this is a zip file, is it not?",
            r"record 0 at byte 0: checksum of its length is wrong \(is",
        ),
        "empty": (b"", "holds no records"),
    }
    out = tmp_path / "out"
    out.mkdir()
    for name, (content, message) in cases.items():
        source = tmp_path / name
        source.write_bytes(content)
        with pytest.raises(InputError, match=f"^{source}: .*{message}"):
            Table.convert(source, out / "table")
        assert main(["nasbench", "convert", str(source), str(out / "table")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"spos-fast: error: {source}: ")
    for target in (tmp_path / "absent" / "table", out):
        assert main(["nasbench", "convert", str(official), str(target)]) == 2
    assert main(["nasbench", "convert", str(tmp_path / "absent"), str(out / "table")]) == 2
    assert list(out.iterdir()) == []


def test_full_disk(official: Path) -> None:
    """A table that does not fit is refused and leaves nothing behind."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no way to fill a disk here")
    code = (
        "import resource, sys, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from spos_fast.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = official.with_name("too_large")
    before = sorted(official.parent.iterdir())
    command = [sys.executable, "-c", code, "nasbench", "convert", str(official), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"spos-fast: error: {target}: could not be written (File too large)\n"
    assert sorted(official.parent.iterdir()) == before


def test_commands(table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """query shows all records of a cell, by hash or by graph; enumerate writes all cells; mistakes exit with 2."""
    cell = table.row(0)
    digits = "".join(map(str, cell.adjacency.ravel().tolist()))
    for how in (["--hash", table.hash(0)], ["--matrix", digits, "--ops", ",".join(cell.ops)]):
        assert main(["nasbench", "query", str(table.path), *how]) == 0
        shown = capsys.readouterr().out
        assert table.hash(0) in shown and str(cell.params) in shown
        assert len(shown.splitlines()) == 5 + 4 * 2 * 2
    for wrong in (
        ["--hash", "0" * 32],
        [],
        ["--hash", "x", "--ops", "y"],
        ["--matrix", "012", "--ops", "input,output"],
    ):
        assert main(["nasbench", "query", str(table.path), *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["nasbench", "query", str(tmp_path / "absent"), "--hash", "0" * 32]) == 2
    assert main(["nasbench", "enumerate", "--out", str(tmp_path / "cells.txt")]) == 2
    assert main(["nasbench", "enumerate", "--out", str(table.path / "cells.npz")]) == 2
    assert main(["nasbench", "enumerate", "--out", str(tmp_path / "cells.npz")]) == 0
    assert "423624 cells" in capsys.readouterr().out
    with np.load(tmp_path / "cells.npz") as cells:
        some = slice(None, None, 5000)
        names = hash_cells(cells["adjacency"][some], cells["ops"][some], cells["vertices"][some])
        assert names == [hash.decode() for hash in cells["hashes"][some].tolist()]
    assert [path.name for path in tmp_path.iterdir()] == ["cells.npz"]


def test_only_regular_files_are_replaced(official: Path, tmp_path: Path) -> None:
    """A pipe or a device of that name stays what it is, whoever writes."""
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is no regular file"):
        Table.convert(official, pipe)
    assert main(["nasbench", "enumerate", "--out", str(pipe)]) == 2
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe.npz"]


def test_threads_that_convert_to_one_name(official: Path, tmp_path: Path) -> None:
    """Each writes a file of its own; whatever stands under the name is whole at any moment."""
    out = tmp_path / "table"
    Table.convert(official, out)
    with ThreadPoolExecutor(4) as pool:
        conversions = [pool.submit(Table.convert, official, out) for _ in range(40)]
        while not all(conversion.done() for conversion in conversions):
            with Table.open(out) as table:
                table.verify()
        for conversion in conversions:
            conversion.result().close()
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


@pytest.mark.parametrize(
    ("epochs", "points", "params", "message"),
    [
        (108, [(0, 0), (108, 2), (54, 1)], 882_570, "current_epoch 108.0+ is not about 54"),
        (108, [(0, 0), (54, 2), (3, 2)], 882_570, "current_epoch 3.0+ is not about 108"),
        (108, [(0, 0), (54, 2), (108, 1)], 882_570, "training_time falls"),
        (108, [(0, 0), (54, 1), (108, 2)], 1, "trainable_parameters 1 is not within 227274 and 49979274"),
    ],
)
def test_impossible_fields(epochs, points, params, message, tmp_path: Path) -> None:
    """Evaluations in another order, of other epochs or with time running backwards, and parameters of no cell."""
    matrix, ops = np.array([[0, 1], [0, 0]]), ["input", "output"]
    content = metrics([(*point, 0.5, 0.5, 0.5) for point in points], params)
    (tmp_path / "file").write_bytes(frames([record(hash_cell(matrix, ops), epochs, "0100", ",".join(ops), content)]))
    with pytest.raises(InputError, match=f"record 0 .*{message}"):
        Table.convert(tmp_path / "file", tmp_path / "table")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_torch() -> None:
    """The package and its commands start without torch."""
    code = (
        "import sys; from spos_fast.cli import main; import spos_fast.nasbench\n"
        "main(['nasbench', 'enumerate']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
