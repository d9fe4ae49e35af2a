"""The table of docs/results.md is computed from run folders, with honest intervals."""

import json

import pytest
from scipy import stats

from bench import seeds


def _folder(path, seed):
    for number, label in enumerate(seeds.ROWS):
        (path / "retrain" / label).mkdir(parents=True)
        result = {"test_accuracy": 0.6 + 0.01 * number + 0.001 * seed * seed, "macs": 2_500_000 + 100_000 * (seed % 2)}
        (path / "retrain" / label / "result.json").write_text(json.dumps(result))
    (path / "search").mkdir()
    best = {label: {"accuracy": 0.5 + 0.1 * seed} for label in ("evolution", "random_search")}
    (path / "search" / "best.json").write_text(json.dumps(best))
    return path


def test_the_table_holds_means_intervals_and_every_seed(tmp_path):
    """Student's interval as scipy gives it; differences are taken within a seed."""
    folders = [_folder(tmp_path / str(seed), seed) for seed in range(3)]
    text = seeds.table(folders)
    row = next(line for line in text.splitlines() if line.startswith("| all shuffle k3"))
    values = [60.0, 60.1, 60.4]
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert f"60.17 ± {half:.2f} %" in row and "60.00, 60.10, 60.40" in row and "2.50 to 2.60 M" in row
    assert "| evolution | 2.50 to 2.60 M | 60.00 % |" in text
    assert "| evolution minus random search | 1.00 ± 0.00 |" in seeds.differences(folders)


def test_quantiles_of_t():
    """The built-in table of quantiles is scipy's."""
    for degrees, quantile in enumerate(seeds.T_95, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)
