"""The paper's analysis: the published sample against recorded figures, and a made-up space against plain loops."""

from __future__ import annotations

import gzip
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from spos_fast.errors import InputError
from spos_fast.nasbench import graphs, statistics
from spos_fast.nasbench.locality import locality, noise_distance
from spos_fast.nasbench.results import CellResults, read_results


def test_distribution_of_the_sample(sample: CellResults) -> None:
    """Quantiles, shares and medians that were computed independently from the same file."""
    accuracy = sample.mean("validation")
    assert len(sample) == 30_001
    assert (accuracy.mean(), accuracy.std()) == pytest.approx((0.9105, 0.0377), abs=1e-4)
    shares = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1)
    wanted = (0.829, 0.870, 0.883, 0.900, 0.9162, 0.9280, 0.9359, 0.9392, 0.9434, 0.9469, 0.9491)
    assert np.quantile(accuracy, shares) == pytest.approx(wanted, abs=6e-4)
    above = [(accuracy > limit).mean() for limit in (0.9, 0.92, 0.93, 0.94, 0.945)]
    assert above == pytest.approx([0.754, 0.420, 0.208, 0.0404, 0.0037], abs=6e-4)
    assert (accuracy < 0.15).sum() == 34
    for epochs, median, most in ((36, 0.866, 0.936), (12, 0.552, 0.878), (4, 0.234, 0.723)):
        values = sample.mean("validation", epochs)
        assert (np.median(values), values.max()) == pytest.approx((median, most), abs=6e-4)
    time = sample.mean("time")
    assert (np.median(time), time.mean(), time.min(), time.max()) == pytest.approx((1554, 1925, 284, 5411), abs=1)
    assert np.median(sample.params) == pytest.approx(5.36e6, abs=1e4)


def test_correlations_of_the_sample(sample: CellResults) -> None:
    """Rank correlation between budgets, over all and over the best cells, and of cost with accuracy."""
    found = statistics.budget_correlations(sample)
    assert {pair: entry.count for pair, entry in found.items()} == dict.fromkeys(found, 30_001)
    wanted = {(4, 108): 0.451, (12, 108): 0.618, (36, 108): 0.879, (4, 12): 0.790, (4, 36): 0.660, (12, 36): 0.805}
    assert {pair: entry.spearman for pair, entry in found.items()} == pytest.approx(wanted, abs=6e-4)
    # Recorded from 8,000 of the cells.
    kendall = {epochs: found[epochs, 108].kendall for epochs in (4, 12, 36)}
    assert kendall == pytest.approx({4: 0.314, 12: 0.440, 36: 0.699}, abs=0.01)
    best = statistics.budget_correlations(sample, 0.1)
    assert [best[epochs, 108].spearman for epochs in (4, 12, 36)] == pytest.approx([0.067, 0.127, 0.372], abs=3e-3)
    top = statistics.budget_correlations(sample, 0.01)
    assert [top[epochs, 108].spearman for epochs in (4, 12, 36)] == pytest.approx([-0.03, 0.0, 0.07], abs=0.03)
    params, time, accuracy = sample.params.astype(float), sample.mean("time"), sample.mean("validation")
    both = statistics.correlation(params, time)
    assert (both.pearson, both.spearman) == pytest.approx((0.914, 0.870), abs=6e-4)
    assert statistics.correlation(params, accuracy).spearman == pytest.approx(0.448, abs=6e-4)
    assert statistics.correlation(time, accuracy).spearman == pytest.approx(0.355, abs=6e-4)


def test_groups_of_the_sample(sample: CellResults) -> None:
    """Means by operations, depth and width."""
    means = [[group.mean for group in groups] for groups in statistics.by_operation(sample)]
    assert means[0] == pytest.approx([0.873, 0.911, 0.919, 0.923, 0.925, 0.926], abs=6e-4)
    assert means[1] == pytest.approx([0.909, 0.913, 0.914, 0.909, 0.890, 0.726], abs=6e-4)
    assert means[2] == pytest.approx([0.921, 0.917, 0.909, 0.897, 0.882, 0.863], abs=6e-4)
    times = [groups[place].time for groups in statistics.by_operation(sample) for place in (0, -1)]
    assert times == pytest.approx([1479, 3016, 2233, 1213, 2006, 1672], abs=1)
    depth, width = statistics.by_depth(sample), statistics.by_width(sample)
    assert [group.value for group in depth] == [1, 2, 3, 4, 5, 6]
    assert [group.mean for group in depth[1:]] == pytest.approx([0.902, 0.920, 0.916, 0.911, 0.906], abs=6e-4)
    assert [group.mean for group in width] == pytest.approx([0.868, 0.893, 0.907, 0.913, 0.919, 0.891], abs=6e-4)
    assert sum(group.count for group in depth) == sum(group.count for group in width) == 30_001


def test_noise_of_full_cells(shared_data: Path) -> None:
    """52 real cells with three trainings each: noise, gap and correlation of validation and test."""
    path = shared_data / "nasbench101" / "mini_only108_53cells.tfrecord"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    results = read_results(path)
    assert (len(results), results.repeats, results.epochs) == (53, 3, (108,))
    # Recorded over 52 of the 53 cells.
    assert statistics.noise(results).mean() == pytest.approx(0.0045, abs=5e-4)
    assert statistics.noise(results, "test").mean() == pytest.approx(0.0048, abs=5e-4)
    assert statistics.repeat_correlation(results).spearman == pytest.approx(0.954, abs=0.02)
    validation, test = results.mean("validation"), results.mean("test")
    assert (validation - test).mean() == pytest.approx(0.0056, abs=5e-4)
    assert statistics.correlation(validation, test).pearson == pytest.approx(0.9966, abs=2e-3)


def test_replacements(small_space: CellResults) -> None:
    """Every pair of cells that differ in one label is found once, and the effect that was put in comes out."""
    found = statistics.replacements(small_space)
    rows = small_space.row_of
    from spos_fast.nasbench import hash_cells

    pairs = set()
    for row in range(len(small_space)):
        for vertex in range(1, int(small_space.vertices[row]) - 1):
            if small_space.ops[row, vertex] != 0:
                continue
            ops = small_space.ops[row].copy()
            ops[vertex] = 2
            (name,) = hash_cells(small_space.adjacency[row][None], ops[None])
            pairs.add((row, rows[name or ""]))
    by = {(entry.before, entry.after): entry for entry in found}
    assert len(by[0, 2].accuracy) == len(pairs) > 1000
    for (before, after), effect in {(0, 1): -0.01, (0, 2): -0.015, (1, 2): -0.005}.items():
        entry = by[before, after]
        assert entry.accuracy.mean() == pytest.approx(effect, abs=3 * entry.interval)
        assert entry.time.mean() == pytest.approx(-300 if before == 0 else 0)


def test_pareto_front() -> None:
    """Nothing on the front is beaten; ties and unknown values stay out."""
    cost = np.array([1.0, 2, 2, 3, 4, np.nan, 0.5])
    accuracy = np.array([0.5, 0.6, 0.7, 0.7, 0.9, 1.0, np.nan])
    assert statistics.pareto_front(cost, accuracy).tolist() == [0, 2, 4]


def test_unknown_values() -> None:
    """Correlations of next to nothing are NaN with the count, not an error."""
    nothing = statistics.correlation(np.array([np.nan, 1.0]), np.array([1.0, 2.0]))
    assert nothing.count == 1
    assert np.isnan(nothing.spearman)
    assert statistics.correlation(np.ones(5), np.arange(5.0)).count == 5


def test_locality(small_space: CellResults) -> None:
    """Walks reach other cells only; accuracies that the operations decide are correlated one edit away and less so
    further off; with all accuracies shuffled nothing is left; the same seed gives the same numbers."""
    found = locality(small_space, walks=600, steps=4)
    assert found.by_step[0].accuracy > 0.5 > found.by_step[3].accuracy > 0
    assert found.by_edit[0].accuracy > found.by_edit[3].accuracy
    low, high = found.by_step[0].accuracy_interval
    assert low < found.by_step[0].accuracy < high
    assert noise_distance(found.by_step) is None
    assert locality(small_space, walks=600, steps=4) == found
    order = np.random.default_rng(3).permutation(len(small_space))
    mixed = locality(replace(small_space, validation=small_space.validation[order]), walks=600, steps=2)
    assert abs(mixed.by_step[0].accuracy) < 0.1
    assert noise_distance(mixed.by_step) == 1


def test_locality_of_a_sample(small_space: CellResults, monkeypatch: pytest.MonkeyPatch) -> None:
    """From uniform samples comes, on average, the correlation of the whole, from fewer pairs: cells that a walk comes
    back to, which are known more often, do not push it up."""
    whole = locality(small_space, walks=2531, steps=3)
    found = []
    for seed in range(16):
        chosen = np.random.default_rng(seed).random(len(small_space)) < 0.3
        parts = {}
        for field in fields(small_space):
            value = getattr(small_space, field.name)
            parts[field.name] = value[chosen] if isinstance(value, np.ndarray) else value
        parts["hashes"] = [name for name, kept in zip(small_space.hashes, chosen, strict=True) if kept]
        # The space that this is a sample of.
        monkeypatch.setattr("spos_fast.nasbench.locality.CELLS", len(small_space))
        found.append(locality(CellResults(**parts), walks=2531, steps=3).by_step)
    for gap, entry in enumerate(whole.by_step):
        assert all(part[gap].pairs < 0.3 * entry.pairs for part in found)
        assert np.mean([part[gap].accuracy for part in found]) == pytest.approx(entry.accuracy, abs=0.04)


def test_two_vertex_cell_ends_a_walk(small_space: CellResults) -> None:
    """No single edit leads from the smallest cell to another; its walk ends instead of going on for ever."""
    genes = graphs.genes_of(small_space.adjacency[:1], small_space.ops[:1], small_space.vertices[:1])
    assert small_space.vertices[0] == 2
    assert set(small_space.find(graphs.one_edit(np.repeat(genes, 2000, 0), np.random.default_rng(0)))) <= {0, -1}
    assert locality(small_space, walks=len(small_space), steps=1).walks == len(small_space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("val_acc_4,", "val_4,", 1), "expected the columns hash"),
        (lambda text: text.split("\n", 1)[0] + "\n", "holds no cells"),
        (lambda text: text.replace(",7,9,", ",6,9,", 1), "line 2: 6 vertices, 49 entries and 5 operations"),
        (lambda text: text.replace("8555530", "many", 1), "line 2: invalid literal"),
        (lambda text: text.replace("0100110", "0200110", 1), "line 2: expected 0 and 1 in the matrix"),
        (lambda text: text.replace("edges,", "x,", 1), "expected the columns hash"),
        (lambda text: text.replace("val_acc_4,", "val_acc_x,", 1), "expected the columns hash"),
        (lambda text: text.replace("8555530", "9" * 30, 1), "line 2: 9+ parameters .* impossible"),
        (lambda text: text.replace("0.3604767620563507", "17.5", 1), "line 2: an accuracy is not within 0 and 1"),
        (lambda text: text.replace("00005c14", "10005c14", 1), "line 2: hash '10005c14.*' is not that of the graph"),
        (lambda text: text + text.split("\n")[1] + "\n", "line 4: the cell 00005c14.* comes twice"),
        (lambda text: text.replace("0100110", "0" * 200_000, 1), "line 2: field larger than field limit"),
    ],
)
def test_wrong_csv(sample_path: Path, tmp_path: Path, change, message: str) -> None:
    """A damaged CSV file is named with its line."""
    text = "\n".join(gzip.decompress(sample_path.read_bytes()).decode().split("\n")[:3]) + "\n"
    path = tmp_path / "cells.csv"
    path.write_text(text)
    assert len(read_results(path)) == 2
    path.write_text(change(text))
    with pytest.raises(InputError, match=message):
        read_results(path)
    path.write_bytes(sample_path.read_bytes()[:5000])
    with pytest.raises(InputError, match="could not be read"):
        read_results(path)
