"""Tables of NAS-Bench-201 and NAS-Bench-Macro: what users look up, in every form, and what they are told when wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spos_fast import Architecture, InputError
from spos_fast.nasbench import TABLES, NASBench201, NASBenchMacro

FIRST = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"


def _cells(rows: int = 8) -> dict[str, np.ndarray]:
    """A small compact file's columns: some cells with made-up accuracies."""
    rng = np.random.default_rng(0)
    ops = np.array(np.unravel_index(rng.permutation(5**6)[:rows], (5,) * 6), dtype=np.uint8).T
    columns = {
        "ops": ops,
        "op_names": np.array(NASBench201.OPS),
        "params": np.arange(rows),
        "flops": np.arange(rows) * 10,
        "hw_pixel3_latency": np.linspace(1, 2, rows),
    }
    for name in ("c10_valid_12", "c10_valid_200", "c10_test_200", "c100_test_200"):
        columns[name] = rng.uniform(10, 95, rows).astype(np.float32)
    return columns


@pytest.fixture
def small(tmp_path: Path) -> NASBench201:
    np.savez(tmp_path / "cells.npz", **_cells())
    return NASBench201.open(tmp_path / "cells.npz")


@pytest.fixture(scope="module")
def whole(shared_data: Path) -> NASBench201:
    return NASBench201.open(shared_data / "nasbench201" / "nasbench201.npz")


@pytest.fixture(scope="module")
def macro(shared_data: Path) -> NASBenchMacro:
    return NASBenchMacro.open(shared_data / "nasbench_macro" / "nas_bench_macro.csv")


def test_every_form_of_an_architecture_finds_its_row(small: NASBench201) -> None:
    """Index, string, genes and Architecture name the same cell, and its own numbers come back."""
    for row in range(len(small)):
        arch = small.architecture(row)
        forms = (row, small.string(row), list(arch.genes), np.array(arch.genes), arch)
        assert {small.index(form) for form in forms} == {row}
        assert small.accuracy(arch) == pytest.approx(_cells()["c10_test_200"][row] / 100, rel=1e-12)
    assert small.genes.tolist() == _cells()["ops"].tolist() and small.datasets == ("cifar10", "cifar100")
    assert small.latencies("pixel3")[1] == pytest.approx(1 + 1 / 7) and small.devices == ("pixel3",)


def test_operations_of_the_file_may_have_another_order(tmp_path: Path) -> None:
    """Genes are indices into OPS whatever the file numbers its operations by."""
    columns, order = _cells(), [2, 0, 4, 1, 3]
    columns["op_names"] = columns["op_names"][order]
    columns["ops"] = np.argsort(order)[columns["ops"]]
    np.savez(tmp_path / "other.npz", **columns)
    assert NASBench201(tmp_path / "other.npz").genes.tolist() == _cells()["ops"].tolist()


def test_genes_of_a_reduced_space_are_translated_by_name(small: NASBench201) -> None:
    """A reduced space numbers its operations anew; rows are found by their names."""
    kept = ("skip_connect", "nor_conv_3x3", "none", "avg_pool_3x3", "nor_conv_1x1")
    genes = [[kept.index(small.OPS[gene]) for gene in cell] for cell in small.genes.tolist()]
    assert small.rows(genes, (kept,) * 6).tolist() == list(range(len(small)))
    with pytest.raises(InputError, match="'zero'"):
        small.rows([[0] * 6], (("zero",),) * 6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (8, "rows 0 to 7"),
        (-1, "rows 0 to 7"),
        ("|none~0|", "cell"),
        (Architecture("shufflenet_v2", (0,) * 6), "shufflenet_v2"),
        ((0,) * 5, r"\[n, 6\]"),
        ((5, 0, 0, 0, 0, 0), "gene 0 must be 0 to 4"),
        ((0, 0, 0, 0, 0, 0), "does not hold"),
        ((0.5,) * 6, "gene 0 is 0.5"),
    ],
)
def test_what_the_table_does_not_hold_is_named(small: NASBench201, wrong: object, says: str) -> None:
    """No wrong look-up gives a number."""
    assert (0,) * 6 not in {tuple(genes) for genes in small.genes.tolist()}
    with pytest.raises(InputError, match=says):
        small.index(wrong)  # type: ignore[arg-type]


def test_columns_that_are_not_there_are_named(small: NASBench201) -> None:
    """Data sets, epochs and devices that the file lacks."""
    with pytest.raises(InputError, match="imagenet16-120"):
        small.accuracies("imagenet16-120")
    with pytest.raises(InputError, match="expected valid or test, and 12 or 200"):
        small.accuracies("cifar10", "test", 90)
    with pytest.raises(InputError, match="pixel3"):
        small.latencies("toaster")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"params": None}, "no column 'params'"),
        ({"flops": np.arange(3)}, "flops has 3 values for 8 cells"),
        ({"c10_test_200": np.full(8, np.nan)}, "c10_test_200: holds a value"),
        ({"ops": np.zeros((8, 6), np.uint8)}, "occurs twice"),
        ({"ops": np.full((8, 6), 5, np.uint8)}, "0 to 4"),
        ({"op_names": np.array(["a"] * 5)}, "op_names"),
        ({"c10_test_200": None, "c100_test_200": None}, "no column of test accuracies"),
    ],
)
def test_a_wrong_compact_file_is_refused(tmp_path: Path, change: dict, says: str) -> None:
    """A file with a hole or with impossible values never answers; the message names file and column."""
    columns = {name: value for name, value in {**_cells(), **change}.items() if value is not None}
    np.savez(tmp_path / "wrong.npz", **columns)
    with pytest.raises(InputError, match=says) as caught:
        NASBench201(tmp_path / "wrong.npz")
    assert "wrong.npz" in str(caught.value)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    """A pickle is never run, a cut-off archive is no table, a missing file is named."""
    (tmp_path / "official.pth").write_bytes(b"\x80\x04cos\nsystem\n")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "whole.npz", **_cells())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:900])
    for name in ("official.pth", "array.npy", "cut.npz", "absent.npz"):
        with pytest.raises(InputError, match=name):
            NASBench201(tmp_path / name)
        with pytest.raises(InputError, match=name):
            NASBenchMacro(tmp_path / name)


class _Api:
    """What the official API answers for the cells of :func:`_cells`; its networks were not trained 12 epochs on C10."""

    columns = _cells()

    def __len__(self) -> int:
        return len(self.columns["ops"])

    def __getitem__(self, index: int) -> str:
        a, b, c, d, e, f = (NASBench201.OPS[op] for op in self.columns["ops"][index])
        return f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"

    def get_cost_info(self, index: int, dataset: str, hp: str = "12") -> dict[str, float]:
        return {"params": self.columns["params"][index] / 1e6, "flops": self.columns["flops"][index] / 1e6}

    def get_more_info(self, index: int, dataset: str, hp: str, is_random: bool) -> dict[str, float]:
        assert not is_random
        trained = {"cifar10-valid": "c10_valid", "cifar10": "c10_test", "cifar100": "c100_test"}[dataset]
        return {f"{trained.split('_')[1]}-accuracy": self.columns[f"{trained}_{hp}"][index]}


def test_the_official_api_converts_to_a_compact_file(tmp_path: Path, small: NASBench201) -> None:
    """Strings, millions and percents of the official API become the file's columns; what it lacks is left out."""
    table = NASBench201.convert(_Api(), tmp_path / "converted.npz")
    assert table.genes.tolist() == small.genes.tolist()
    assert table.params.tolist() == small.params.tolist() and table.flops.tolist() == small.flops.tolist()
    for split, epochs in (("test", 200), ("valid", 200), ("valid", 12)):
        assert (table.accuracies("cifar10", split, epochs) == small.accuracies("cifar10", split, epochs)).all()
    assert table.datasets == ("cifar10", "cifar100")
    with pytest.raises(InputError, match="'test' and 12"):
        table.accuracies("cifar10", "test", 12)


def test_isomorphism_classes_come_from_the_cells_where_the_file_has_none(small: NASBench201) -> None:
    """Two cells with the same function have one id."""
    assert len(small.iso_id) == len(small) and small.iso_id.max() < len(small)


def test_the_whole_benchmark(whole: NASBench201) -> None:
    """All cells of the real file: official index 0, the best accuracies, the closed forms of the costs, the classes."""
    assert len(whole) == 15625 and whole.string(0) == FIRST and whole.index(FIRST) == 0
    for dataset, best in (("cifar10", 0.94373), ("cifar100", 0.73513), ("imagenet16-120", 0.47311)):
        assert whole.accuracies(dataset).max() == pytest.approx(best, abs=5e-6)
    assert whole.accuracy(FIRST, "ImageNet16-120") == whole.accuracies("imagenet16-120")[0]
    n1x1, n3x3 = ((whole.genes == whole.OPS.index(name)).sum(1) for name in ("nor_conv_1x1", "nor_conv_3x3"))
    assert (whole.params == 73306 + 243040 * n3x3 + 28000 * n1x1).all()
    assert (whole.flops == 7783040 + 35389440 * n3x3 + 3932160 * n1x1).all()
    assert len(np.unique(whole.iso_id)) == 6466 and "raspi4" in whole.devices
    assert (whole.rows(whole.genes) == np.arange(15625)).all()


def _macro_rows() -> dict[str, dict]:
    """The official JSON of four networks."""
    names = ("00000000", "01201201", "22222222", "20000001")
    return {
        name: {"test_acc": [90.0 + at, 91.0, 92.5], "mean_acc": 0.0, "std": 0.0, "params": 10 + at, "flops": 7 * at}
        for at, name in enumerate(names)
    }


def test_the_official_json_and_its_csv_are_one_table(tmp_path: Path) -> None:
    """Both layouts give the same rows, genes are the digits, and the mean is over the three trainings."""
    rows = _macro_rows()
    (tmp_path / "official.json").write_text(json.dumps(rows))
    lines = [f"{k},{','.join(map(str, v['test_acc']))},0,0,{v['params']},{v['flops']}" for k, v in rows.items()]
    (tmp_path / "rows.csv").write_text("\n".join(["arch,acc0,acc1,acc2,mean,std,params,flops", *lines]))
    for name in ("official.json", "rows.csv"):
        table = NASBenchMacro(tmp_path / name)
        assert table.index("01201201") == table.index([0, 1, 2, 0, 1, 2, 0, 1]) == 1 and table.string(2) == "2" * 8
        assert table.accuracy("20000001") == pytest.approx((93 + 91 + 92.5) / 300) and table.params[3] == 13
        assert table.architecture(1) == Architecture("nasbench_macro", (0, 1, 2, 0, 1, 2, 0, 1))
        with pytest.raises(InputError, match="8 digits"):
            table.index("0120120")
        with pytest.raises(InputError, match="cifar10"):
            table.truth("cifar100")


@pytest.mark.parametrize(
    "text",
    ['{"01201201": {"test_acc": [1, 2], "params": 1, "flops": 1}}', '{"01201201": 3}', "{", "arch,acc0\n00000000,1\n",
     "arch,acc0,acc1,acc2,params,flops\n00000003,1,1,1,1,1\n", "arch,acc0,acc1,acc2,params,flops\n", "",
     "arch,acc0,acc1,acc2,params,flops\n00000000,1,1,nan,1,1\n"],
)  # fmt: skip
def test_a_wrong_macro_file_is_refused(tmp_path: Path, text: str) -> None:
    """Missing columns, too few trainings, digits out of range, no network, no number."""
    (tmp_path / "wrong").write_text(text)
    with pytest.raises(InputError, match="wrong"):
        NASBenchMacro(tmp_path / "wrong")


def test_the_whole_macro_benchmark(macro: NASBenchMacro) -> None:
    """All networks of the real file, with the best one where the paper has it."""
    assert len(macro) == 3**8 and len(np.unique(macro.genes, axis=0)) == 3**8
    best = int(macro.accuracies().argmax())
    assert macro.string(best) == "22212220" and macro.accuracy("22212220") == pytest.approx(0.931267, abs=1e-6)


def test_tables_are_found_by_their_space() -> None:
    """The names that a supernet's space and its table share."""
    assert TABLES["nasbench201"] is NASBench201 and TABLES["nasbench_macro"] is NASBenchMacro


def test_tables_and_statistics_need_no_torch() -> None:
    """A script that only looks things up, or that only computes statistics, starts without torch."""
    code = (
        "import sys; from spos_fast.nasbench import NASBench201, NASBenchMacro; import spos_fast.analysis.ranks; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
