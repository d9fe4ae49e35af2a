"""The report of rank consistency says what the statistics hold: which number under which head, which axis is which."""

from __future__ import annotations

import dataclasses
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from spos_fast.analysis import consistency_figures, consistency_report
from spos_fast.analysis.ranks import RankStatistics, TopK, rank_statistics
from spos_fast.consistency import Consistency, Ranking, Way

NAN = float("nan")
WAY = Way("cumulative", 1024, 128)
# No two numbers are alike, so that none can stand in for another.
STATISTICS = RankStatistics(
    architectures=50,
    tau=0.512,
    interval=(0.401, 0.623),
    spearman=0.734,
    tau_top_half=0.345,
    tau_top_tenth=0.156,
    partial_tau=0.267,
    top=(TopK(1, 0.0, 0.9134, 0.9134, 0.0311), TopK(10, 0.3, 0.9245, 0.8956, 0.0178)),
)
PARAMETERS = dataclasses.replace(STATISTICS, tau=0.478, interval=(0.4, 0.56), partial_tau=NAN)
COLUMNS = ["", "tau", "95% interval", "Spearman", "tau, best 50%", "tau, best 10%", "partial tau"]
TOPS = ["", "accuracy, first 1", "precision, first 10", "best, first 10", "mean, first 10"]


def result(own: RankStatistics = STATISTICS, parameters: float = PARAMETERS.tau) -> Consistency:
    """Made-up scores, which the statistics are not those of."""
    predicted, true = np.linspace(0.2, 0.5, 50), np.linspace(0.6, 0.9, 50)[::-1]
    scored = Ranking(WAY.name, predicted, true, own, WAY)
    reference = dataclasses.replace(PARAMETERS, tau=parameters)
    references = (Ranking("random order", np.zeros(50), true, dataclasses.replace(PARAMETERS, tau=0.0)),
                  Ranking("parameters", predicted, true, reference))  # fmt: skip
    return Consistency("nasbench201", "cifar10", 15625, 50, {WAY.name: 0}, (scored,), references, 100)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The page's figures by name; its settings, which want a run folder, are left out."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(consistency_report, "_settings", lambda run: "")

    def keep(figure: Figure, name: str, _: str) -> str:
        figures[name] = figure
        return ""

    monkeypatch.setattr(consistency_figures, "inline_svg", keep)
    return figures


def page(given: Consistency) -> str:
    """The report without its style."""
    return unescape(consistency_report.page(Path("run"), given)).split("</style>")[1]


def rows(text: str, head: list[str]) -> list[list[str]]:
    """The cells of the table with this head."""
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    cells = [
        [
            [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        for table in tables
    ]
    (found,) = [table for table in cells if table[0] == head]
    return found[1:]


@pytest.mark.usefixtures("drawn")
def test_every_number_stands_in_its_column() -> None:
    """Correlations, and what the first architectures are worth, of the supernet and of what it is compared with."""
    text = page(result())
    own, _, parameters = rows(text, COLUMNS)
    assert own == ["cumulative, 1,024 images", "0.512", "0.401 to 0.623", "0.734", "0.345", "0.156", "0.267"]
    assert parameters[:3] == ["parameters", "0.478", "0.400 to 0.560"] and parameters[-1] == "–"
    own, *_ = rows(text, TOPS)
    assert own == ["cumulative, 1,024 images", "91.34%", "30%", "92.45%", "89.56%"]
    tiles = re.sub(r"<[^>]*>", " ", text.split("Predictors of the ranking")[0])
    for name, value in (
        ("Kendall's tau", "0.512"),
        ("Partial tau", "0.267"),
        ("Tau, best 50%", "0.345"),
        ("Tau, best 10%", "0.156"),
        ("Precision", "30%"),
        ("Best of the first 10", "92.45%"),
    ):
        assert re.search(rf"{name}\s+{value}|{value}\s+{name}", tiles), name


def test_predictions_go_across_and_the_truth_upwards(drawn: dict[str, Figure]) -> None:
    """The dots of the scatter plot, its labels and its limits, on the right axes."""
    given = result()
    page(given)
    (axes,) = drawn["scatter-cumulative"].axes
    (cloud,) = axes.patches
    dots = cloud.get_path().vertices[::2]
    assert np.allclose(dots[:, 0], given.scored[0].predicted) and np.allclose(dots[:, 1], given.scored[0].true)
    assert axes.get_xlabel() == "accuracy with the supernet's weights" and axes.get_ylabel() == "true test accuracy"
    for limits, values in ((axes.get_xlim(), given.scored[0].predicted), (axes.get_ylim(), given.scored[0].true)):
        assert limits[0] < values.min() and values.max() < limits[1] and limits[1] - limits[0] < 0.4


def test_bars_are_the_intervals(drawn: dict[str, Figure]) -> None:
    """Each predictor's marker at its tau, on a bar from one end of its interval to the other, under its name."""
    page(result())
    (axes,) = drawn["taus"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["cumulative, 1,024 images", "random order", "parameters"]
    bars = [bar.get_segments()[0] for bar in axes.collections]
    markers = [line.get_xydata()[0] for line in axes.lines if line.get_marker() in ("D", "o")]
    for place, statistics in ((0, STATISTICS), (2, PARAMETERS)):
        assert np.allclose(bars[place], [(statistics.interval[0], place), (statistics.interval[1], place)])
        assert np.allclose(markers[place], (statistics.tau, place))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("interval", "parameters", "verdict"),
    [
        ((0.401, 0.623), 0.3, "is above that"),
        ((0.401, 0.623), 0.7, "is below that"),
        ((0.401, 0.623), 0.45, "is not told apart from that"),
        ((0.401, 0.623), 0.6, "is not told apart from that"),
        ((NAN, NAN), 0.1, "is not told apart from that"),
    ],
)
def test_the_headline_claims_what_the_interval_carries(
    interval: tuple[float, float], parameters: float, verdict: str
) -> None:
    """Above where the whole interval is above the parameters' tau, below where it is below, and neither in between."""
    text = page(result(dataclasses.replace(STATISTICS, interval=interval), parameters))
    assert f"parameters alone reach {parameters:.3f} on the same ones; the supernet {verdict}." in text


def test_few_architectures_show_no_interval(drawn: dict[str, Figure]) -> None:
    """Text, tiles, table and figure of 9 architectures say tau alone."""
    rng = np.random.default_rng(0)
    few = rank_statistics(rng.normal(size=9), rng.normal(size=9), resamples=20)
    text = page(result(few))
    tau = f"{few.tau:.3f}".replace("-", "\N{MINUS SIGN}")
    assert f"Kendall's tau <b>{tau}</b> against" in text and "no interval" in text
    assert rows(text, COLUMNS)[0][1:3] == [tau, "–"] and "nan" not in text.lower()
    assert consistency_report.tau_text(few) == tau
    assert not len(drawn["taus"].axes[0].collections[0].get_segments()[0])
