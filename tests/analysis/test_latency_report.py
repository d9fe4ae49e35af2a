"""What the report shows of latency and of a Pareto search, and that it shows neither where there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from spos_fast.analysis.run_data import read_run
from spos_fast.analysis.summary import comparison, pareto_front
from tests.analysis.test_report import Page, lines, read


def _with_latency(run: Path) -> list[int]:
    """Gives every row of a run a latency, and the run a Pareto search over half of its evolution; the front's genes."""

    def timed(row: dict) -> dict:
        return {**row, "latency_ms": row["macs"] / 1e5 + sum(row.get("genes") or row["architecture"]) / 100}

    for name in ("evolution", "random_search"):
        path = run / f"search/{name}.json"
        path.write_text(json.dumps([timed(row) for row in json.loads(path.read_text())]))
    for path in run.glob("retrain/*/result.json"):
        path.write_text(json.dumps(timed(json.loads(path.read_text()))))
    rows = json.loads((run / "search/evolution.json").read_text())[::2]
    (run / "search/pareto.json").write_text(json.dumps([{**row, "origin": "child"} for row in rows]))
    scored = sorted(rows, key=lambda row: row["latency_ms"])[:3]
    (run / "search/front.json").write_text(json.dumps(scored))
    settings = json.loads((run / "config.json").read_text())
    settings["search"] |= {"latency_table": "t.json", "latency_ms_max": 50.0, "objectives": ["accuracy", "latency_ms"]}
    (run / "config.json").write_text(json.dumps(settings))
    return scored[1]["genes"]


def test_latency_and_the_front_are_shown(make_run: Callable[..., Path]) -> None:
    """A column with the exact latencies, a plot with the limit, the front by label, the search's dots."""
    run = make_run(rows=5)
    genes = _with_latency(run)
    data, text = read_run(run), read(run)
    parsed = Page(text)
    assert not parsed.open and not data.problems
    tested = json.loads((run / "retrain/all_xception/result.json").read_text())
    assert parsed.rows["all_xception"][5] == repr(tested["latency_ms"])
    assert "latency_ms_max 50.0\N{NO-BREAK SPACE}ms" in text and "Accuracy against latency" in text
    assert [re.search(rf"pareto_{number}</th>", text) is not None for number in range(4)] == [True] * 3 + [False]
    assert list(data.front[1].genes) == genes and len(data.pareto) == len(data.evolution[::2])
    assert f"{len(data.pareto)} Pareto search" in text and "search/latency.json" in text
    costs = [c.latency_ms for c in pareto_front(data.scored, "latency_ms")]
    assert costs == sorted(costs) and len(costs) > 1


def test_failed_and_stopped_candidates_are_counted_and_on_no_front(make_run: Callable[..., Path]) -> None:
    """However cheap or accurate they seem; the commands for another run name the table that the search kept."""
    run = make_run(rows=5)
    _with_latency(run)
    (run / "search/latency.json").write_text("{}")
    path = run / "search/evolution.json"
    rows = json.loads(path.read_text())
    rows[0] |= {"macs": 1, "failed": True, "accuracy": 0.0}
    rows[1] |= {"macs": 2, "stopped": True, "accuracy": 1.0}
    path.write_text(json.dumps(rows))
    front = pareto_front(read_run(run).scored)
    assert front and not any(c.failed or c.stopped for c in front)
    text = read(run)
    assert "Failed (NaN or infinity): 1." in text and "Stopped early, shown as far as they got: 1." in text
    assert f"--search.latency_table {run / 'search' / 'latency.json'}" in text


def test_members_of_the_front_are_retrained_under_their_label(make_run: Callable[..., Path]) -> None:
    """They stand behind the best of the searches, in the order of their numbers."""
    run = make_run(rows=5, custom=["pareto_10", "pareto_9"])
    _with_latency(run)
    rows = comparison(read_run(run))
    assert [row.title for row in rows[:4]] == ["Evolution", "Random search", "Pareto 9", "Pareto 10"]
    assert "Pareto front" in read(run)


def test_runs_without_them_show_neither(make_run: Callable[..., Path]) -> None:
    """No column, no plot, no table; nor where only some candidates have a latency."""
    run = make_run(rows=5)
    text = read(run)
    assert not re.search(
        "Latency|latency|pareto_0|Pareto search", text.split("<h2>Settings</h2>")[0].split("</style>")[1]
    )
    rows = lines(run / "search/candidates.jsonl")
    rows[0]["latency_ms"] = 1.0
    (run / "search/evolution.json").unlink()
    (run / "search/candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Accuracy against latency" not in read(run)
