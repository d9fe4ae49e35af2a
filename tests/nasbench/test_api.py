"""The official API: the README's example, every message, the counters, the draw of the repeat."""

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from spos_fast.errors import InputError
from spos_fast.nasbench import Table, api

INPUT, OUTPUT = "input", "output"
CONV1X1, CONV3X3, MAXPOOL3X3 = "conv1x1-bn-relu", "conv3x3-bn-relu", "maxpool3x3"


@pytest.fixture(scope="module")
def tfrecord(shared_data: Path) -> Path:
    path = shared_data / "nasbench101" / "mini_only108_53cells.tfrecord"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def table(tfrecord: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "mini.table"
    Table.convert(tfrecord, path).close()
    return path


@pytest.fixture
def nasbench(table: Path) -> api.NASBench:
    return api.NASBench(table, seed=0)


def some_spec(nasbench: api.NASBench, index: int = 0) -> api.ModelSpec:
    fixed, _ = nasbench.get_metrics_from_hash(list(nasbench.hash_iterator())[index])
    return api.ModelSpec(fixed["module_adjacency"], fixed["module_operations"])


def test_readme_example(tfrecord: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the official README, only the import changed: its cell is valid and asked for by the published
    hash; the messages are the official ones and no file is left beside the tfrecord."""
    before = sorted(tfrecord.parent.iterdir())
    nasbench = api.NASBench(str(tfrecord))
    assert capsys.readouterr().out == (
        "Loading dataset from file... This may take a few minutes...\nLoaded dataset in 0 seconds\n"
    )
    assert sorted(tfrecord.parent.iterdir()) == before
    model_spec = api.ModelSpec(
        # Adjacency matrix of the module
        matrix=[
            [0, 1, 1, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0],
        ],
        ops=[INPUT, CONV1X1, CONV3X3, CONV3X3, CONV3X3, MAXPOOL3X3, OUTPUT],
    )
    assert nasbench.is_valid(model_spec)
    # The mini file does not hold this cell; the complete ones do.
    with pytest.raises(KeyError, match="28cfc7874f6d200472e1a9dcd8650aa0"):
        nasbench.query(model_spec)


@pytest.mark.parametrize("form", ["tfrecord", "table"])
def test_blog_example(form: str, tfrecord: Path, table: Path) -> None:
    """Query, counters, all metrics, valid epochs: from either form of the file, with real values of the benchmark."""
    nasbench = api.NASBench({"tfrecord": tfrecord, "table": table}[form])
    matrix = [
        [0, 1, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    spec = api.ModelSpec(matrix=matrix, ops=[INPUT, CONV3X3, MAXPOOL3X3, CONV3X3, CONV3X3, CONV1X1, OUTPUT])
    assert nasbench.valid_epochs == {108}
    data = nasbench.query(spec)
    assert list(data) == [
        "module_adjacency", "module_operations", "trainable_parameters", "training_time", "train_accuracy",
        "validation_accuracy", "test_accuracy",
    ]  # fmt: skip
    assert data["module_adjacency"].dtype == np.int8
    assert data["module_adjacency"].tolist() == matrix
    assert data["module_operations"] == spec.ops
    assert data["trainable_parameters"] == 8_555_530
    fixed, computed = nasbench.get_metrics_from_spec(spec)
    assert list(computed) == [108]
    assert len(computed[108]) == 3
    assert set(computed[108][0]) == {
        f"{when}_{what}"
        for when in ("halfway", "final")
        for what in ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy")
    }
    assert data["validation_accuracy"] in [entry["final_validation_accuracy"] for entry in computed[108]]
    assert fixed["trainable_parameters"] == 8_555_530
    assert nasbench.get_budget_counters() == (data["training_time"], 108)
    half = nasbench.query(spec, stop_halfway=True)
    assert half["training_time"] < data["training_time"]
    assert nasbench.get_budget_counters() == (data["training_time"] + half["training_time"], 108 + 54)
    nasbench.reset_budget_counters()
    assert nasbench.get_budget_counters() == (0.0, 0)
    assert nasbench.history == {}


def test_repeats_follow_the_global_generator(nasbench: api.NASBench, table: Path) -> None:
    """The constructor seeds Python's global generator and every query draws randint(0, 2) from it, and nothing else."""
    nasbench = api.NASBench(table, seed=7)
    specs = [some_spec(nasbench, index) for index in (0, 5, 9)] * 20
    drawn = [nasbench.query(spec)["training_time"] for spec in specs]
    state = random.getstate()
    random.seed(7)
    repeats = [random.randint(0, 2) for _ in specs]
    assert random.getstate() == state
    assert set(repeats) == {0, 1, 2}
    for spec, repeat, time in zip(specs, repeats, drawn, strict=True):
        assert nasbench.get_metrics_from_spec(spec)[1][108][repeat]["final_training_time"] == time
    again = api.NASBench(table, seed=7)
    assert [again.query(spec)["training_time"] for spec in specs] == drawn


def test_failed_queries_cost_nothing(nasbench: api.NASBench) -> None:
    """A query that fails before the draw leaves counters and generator alone."""
    state = random.getstate()
    for spec, epochs in [(some_spec(nasbench), 4), (api.ModelSpec([[0, 0], [0, 0]], [INPUT, OUTPUT]), 108)]:
        with pytest.raises(api.OutOfDomainError):
            nasbench.query(spec, epochs=epochs)
    assert random.getstate() == state
    assert nasbench.get_budget_counters() == (0.0, 0)


def chain(ops: list[str]) -> api.ModelSpec:
    return api.ModelSpec(np.eye(len(ops), k=1, dtype=int), ops)


def ten_edges() -> api.ModelSpec:
    return api.ModelSpec(np.triu(np.ones((5, 5), dtype=int), 1), [INPUT, CONV1X1, CONV1X1, CONV1X1, OUTPUT])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (api.ModelSpec([[0, 0], [0, 0]], [INPUT, OUTPUT]), "invalid spec, provided graph is disconnected."),
        (chain([INPUT, *[CONV3X3] * 6, OUTPUT]), "too many vertices, got 8 (max vertices = 7)"),
        (ten_edges(), "too many edges, got 10 (max edges = 9)"),
        (chain([CONV1X1, OUTPUT]), "first operation should be 'input'"),
        (chain([INPUT, CONV1X1]), "last operation should be 'output'"),
        (
            chain([INPUT, "conv5x5", OUTPUT]),
            "unsupported op conv5x5 (available ops = ['conv3x3-bn-relu', 'conv1x1-bn-relu', 'maxpool3x3'])",
        ),
        # The order of the checks: many faults at once give the first message.
        (chain(["a", *["b"] * 12, "c"]), "too many vertices, got 14 (max vertices = 7)"),
        (chain(["a", "b", "c"]), "first operation should be 'input'"),
        (chain([INPUT, "b", "c"]), "last operation should be 'output'"),
    ],
)
def test_messages(nasbench: api.NASBench, spec: api.ModelSpec, message: str) -> None:
    """Every official message, and the check that comes first; such cells are not valid, in is_valid's words too."""
    assert nasbench.is_valid(spec) is False
    for ask in (nasbench.query, nasbench.get_metrics_from_spec):
        with pytest.raises(api.OutOfDomainError) as caught:
            ask(spec)
        assert str(caught.value) == message


def test_epochs_are_checked_first(nasbench: api.NASBench) -> None:
    """The epochs come before the cell, and the message shows the set."""
    with pytest.raises(api.OutOfDomainError) as caught:
        nasbench.query(ten_edges(), epochs=36)
    assert str(caught.value) == "invalid number of epochs, must be one of {108}"


def test_cells_that_the_file_lacks(nasbench: api.NASBench) -> None:
    """A valid cell that is not in the file is a KeyError with its hash, as in the official code."""
    spec = next(s for n in range(1, 4) if (s := chain([INPUT, *[MAXPOOL3X3] * n, OUTPUT])).valid_spec)
    name = spec.hash_spec(nasbench.config["available_ops"])
    assert name not in nasbench.hash_iterator()
    assert nasbench.is_valid(spec)
    for ask in (nasbench.query, nasbench.get_metrics_from_spec):
        with pytest.raises(KeyError, match=name):
            ask(spec)
    with pytest.raises(KeyError, match=name):
        nasbench.get_metrics_from_hash(name)


@pytest.mark.parametrize("kind", [bool, np.int8, np.int64, np.uint8, np.float32, float])
def test_any_number_type(nasbench: api.NASBench, kind: type) -> None:
    """The dtype of the matrix does not matter; a float one is a KeyError in the official code."""
    spec = some_spec(nasbench, 3)
    other = api.ModelSpec(spec.matrix.astype(kind), spec.ops)
    assert nasbench.query(other)["trainable_parameters"] == nasbench.query(spec)["trainable_parameters"]


def test_config_is_live(nasbench: api.NASBench) -> None:
    """Programs narrow the space by changing config; queries follow."""
    spec = some_spec(nasbench, 0)
    edges = int(spec.matrix.sum())
    nasbench.config["max_edges"] = edges - 1
    with pytest.raises(api.OutOfDomainError, match=f"too many edges, got {edges} "):
        nasbench.query(spec)
    nasbench.config["max_edges"] = 9
    nasbench.config["num_repeats"] = 1
    first = nasbench.get_metrics_from_spec(spec)[1][108][0]["final_training_time"]
    assert {nasbench.query(spec)["training_time"] for _ in range(20)} == {first}
    nasbench.config["num_repeats"] = 50
    random.seed(1)
    with pytest.raises(IndexError):
        for _ in range(20):
            nasbench.query(spec)


def test_answers_are_the_callers_own(nasbench: api.NASBench) -> None:
    """Changing what a query returned changes nothing in the benchmark."""
    spec = some_spec(nasbench)
    data = nasbench.query(spec)
    data["module_adjacency"][:] = 9
    data["module_operations"].clear()
    fixed, computed = nasbench.get_metrics_from_spec(spec)
    computed[108].clear()
    assert fixed["module_adjacency"].max() == 1
    assert len(fixed["module_operations"]) == len(spec.ops)
    assert len(nasbench.get_metrics_from_spec(spec)[1][108]) == 3


def test_mappings(nasbench: api.NASBench) -> None:
    """Programs go through the statistics as dictionaries: same keys everywhere, 53 cells, three repeats each."""
    names = list(nasbench.hash_iterator())
    assert len(names) == len(nasbench.hash_iterator()) == len(set(names)) == 53
    assert list(nasbench.fixed_statistics) == list(nasbench.computed_statistics) == names
    assert "no hash" not in nasbench.fixed_statistics
    for name, fixed in nasbench.fixed_statistics.items():
        spec = api.ModelSpec(fixed["module_adjacency"], fixed["module_operations"])
        assert spec.hash_spec(nasbench.config["available_ops"]) == name
        assert len(nasbench.computed_statistics[name][108]) == 3


def test_parameters_are_the_networks(nasbench: api.NASBench) -> None:
    """The network of each of the 53 cells has exactly the parameters that the file says."""
    torch = pytest.importorskip("torch")
    from spos_fast.nasbench import network

    for fixed in nasbench.fixed_statistics.values():
        with torch.device("meta"):
            net = network(api.ModelSpec(fixed["module_adjacency"], fixed["module_operations"]))
        assert sum(p.numel() for p in net.parameters()) == fixed["trainable_parameters"]


def test_evaluate(nasbench: api.NASBench, tmp_path: Path) -> None:
    """Training through the official method, by its config: the dictionary of a query, metadata on disk, and no cost."""
    pytest.importorskip("torch")
    from spos_fast.checkpoint import read_json
    from spos_fast.data import load

    spec = chain([INPUT, CONV1X1, OUTPUT])
    with pytest.raises(InputError, match="data: give the folder of CIFAR-10"):
        nasbench.evaluate(spec, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    nasbench.config.update(train_epochs=1, batch_size=128, stem_filter_size=4, num_stacks=1, num_modules_per_stack=1)
    data = nasbench.evaluate(spec, tmp_path / "model", load("digits"))
    assert list(data) == list(nasbench.query(some_spec(nasbench)))
    # stem 9*4 + 8, projection 16 + 8, conv1x1 16 + 8, classifier 40 + 10
    assert data["trainable_parameters"] == 36 + 8 + 24 + 24 + 50
    assert [e["epoch"] for e in read_json(tmp_path / "model" / "metadata.json")["evaluation_results"]] == [0, 0.5, 1]
    assert data["training_time"] > 0


@pytest.mark.parametrize("content", [None, b"", b"hash,vertices\n", b"\x00" * 100])
def test_wrong_files(tmp_path: Path, content: bytes | None) -> None:
    """A file that is none of the forms, or is not there, is named in one line."""
    path = tmp_path / "file.tfrecord"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.tfrecord") as caught:
        api.NASBench(path)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == ([path] if content is not None else [])


def test_copies_and_pickles_open_the_file_again(tfrecord: Path) -> None:
    """As the official object, it can be sent to another process or copied; counters go with it."""
    bench = api.NASBench(tfrecord, seed=1)
    spec = some_spec(bench)
    bench.query(spec)
    for other in (pickle.loads(pickle.dumps(bench)), copy.deepcopy(bench)):
        assert other.get_budget_counters() == bench.get_budget_counters()
        assert other.get_metrics_from_spec(spec)[1] == bench.get_metrics_from_spec(spec)[1]


def test_epochs_of_other_number_types(tfrecord: Path) -> None:
    """108.0 is in valid_epochs, so it is a question that has an answer."""
    bench = api.NASBench(tfrecord)
    spec = some_spec(bench)
    for epochs in (108.0, np.float64(108), np.int32(108)):
        random.seed(3)
        answer = bench.query(spec, epochs=epochs)
        random.seed(3)
        assert answer["test_accuracy"] == bench.query(spec)["test_accuracy"]
