"""The HTML report: whatever a run folder holds, the page comes out whole, right, and without anything to load."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spos_fast.analysis.commands import again_commands
from spos_fast.analysis.report import page, write_report
from spos_fast.analysis.run_data import read_run
from spos_fast.analysis.summary import (
    comparison,
)
from spos_fast.config import SECTIONS, Config
from spos_fast.config_io import config_from, merged, parse_flag, plain, settings_of
from spos_fast.errors import InputError
from spos_fast.sampling import UniformSampler
from spos_fast.spaces import ShuffleNetV2
from spos_fast.widening import WideningSampler

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Collects tags with their attributes, and the exact values of the comparison by label and column."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[str | None]] = {}
        self.open: list[str] = []
        self.label: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "tr" and "data-label" in values:
            self.label = values["data-label"]
            self.rows[str(self.label)] = []
        elif tag == "td" and self.label is not None:
            self.rows[self.label].append(None)
        elif tag == "data" and self.label is not None:
            self.rows[self.label][-1] = values["value"]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "tr":
            self.label = None


def read(run: Path) -> str:
    return write_report(run).read_text()


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> str:
    return read(full_run)


@pytest.fixture(scope="module")
def paper_page(paper_run: Path) -> str:
    return read(paper_run)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_shows_what_the_files_hold(full_run: Path, full_page: str) -> None:
    """Guards against a column that is swapped, rounded before it is stored, or taken from another architecture."""
    rows = Page(full_page).rows
    results = {path.parent.name: json.loads(path.read_text()) for path in full_run.glob("retrain/*/result.json")}
    scores = {tuple(row["genes"]): row["accuracy"] for row in lines(full_run / "search/candidates.jsonl")}
    best = json.loads((full_run / "search/best.json").read_text())
    assert set(rows) == set(results) and len(rows) == 8
    for label, (validation, test, _, macs, params, _) in rows.items():
        expected = scores.get(tuple(results[label]["architecture"]))
        assert (validation is None) == (expected is None)
        assert expected is None or float(str(validation)) == expected
        assert float(str(test)) == results[label]["test_accuracy"]
        assert (int(str(macs)), int(str(params))) == (results[label]["macs"], results[label]["params"])
    for phase in ("evolution", "random_search"):
        assert float(str(rows[phase][0])) == best[phase]["accuracy"]


def test_the_rows_come_in_the_order_of_the_comparison(full_run: Path) -> None:
    """Evolution first, its rival second, then the baselines: the page is read from the top."""
    everywhere = ["all_shuffle_k3", "all_shuffle_k5", "all_shuffle_k7", "all_xception"]
    labels = [row.label for row in comparison(read_run(full_run))]
    assert labels == ["evolution", "random_search", *everywhere, "random_0", "genes_0-1-2-3-0-1-2"]


def test_nothing_is_loaded_from_anywhere(full_page: str) -> None:
    """A report that is mailed or archived must look the same without a network, and must run no script."""
    text = full_page
    assert re.findall(r"https?://[^\"<\s]*", text) == ["https://arxiv.org/abs/1904.00420"]
    assert not re.search(r"@import|url\((?!#)", text)
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "iframe", "object", "embed", "img")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert tag == "a" or (attributes.get(name) or "#").startswith(("#", "data:"))


def test_the_page_is_well_formed_and_every_figure_is_described(full_page: str, paper_page: str) -> None:
    """Duplicate ids would let one figure use another's clip path; a figure without a name is lost to screen readers."""
    for text in (full_page, paper_page):
        parsed = Page(text)
        assert not parsed.open
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
        assert used <= set(ids)
        figures = [attributes for tag, attributes in parsed.tags if tag == "svg" and "aria-hidden" not in attributes]
        assert len(figures) == 7
        assert all(len(attributes["aria-label"] or "") > 30 for attributes in figures)


def test_figures_take_their_colours_from_the_page(full_page: str) -> None:
    """A colour that is written out would be unreadable in the dark page."""
    text = full_page
    assert not re.search(r"#[0-9a-f]{6}", text[text.index("</style>") :])
    names = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert names <= set(re.findall(r"(--[\w-]+):", text))


def test_the_same_run_gives_the_same_bytes(full_run: Path, full_page: str) -> None:
    """Reports are compared and archived; a date or a random id in them would look like a change."""
    assert page(read_run(full_run)) == full_page


def test_nothing_but_the_report_is_written(make_run: MakeRun) -> None:
    """Another process may be working in the folder: its files, torn line included, stay as they are."""
    run = make_run(rows=5)
    with open(run / "search/candidates.jsonl", "a") as file:
        file.write('{"phase": "evol')

    def digests() -> dict[Path, str]:
        files = [path for path in run.rglob("*") if path.is_file() and path.name != "report.html"]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    write_report(run)
    assert digests() == before


@pytest.mark.parametrize(
    ("stages", "missing", "present"),
    [
        (("train",), ["spos-fast search", "spos-fast retrain"], ["Supernet training"]),
        (("train", "search"), ["spos-fast retrain"], ["Comparison", "Best so far"]),
        (("train", "search", "retrain"), [], ["Comparison", "Best so far", "Retraining"]),
    ],
)
def test_stages_that_have_not_run_are_named_with_their_command(
    make_run: MakeRun, stages: tuple[str, ...], missing: list[str], present: list[str]
) -> None:
    """A partial run is the usual case while it is being made; the page must say what to do next."""
    run = make_run(stages=stages)
    text = read(run)
    Page(text)
    notices = re.findall(r'<p class="missing">[^<]*<code>([^<]*)</code>', text)
    assert notices == [f"{command} --folder {run}" for command in missing]
    assert all(title in text for title in present)


def test_a_run_that_has_only_settings(make_run: MakeRun) -> None:
    """The folder of a run that was killed in its first second."""
    run = make_run(stages=())
    text = read(run)
    assert f"spos-fast train --folder {run}" in text and "<h2>Comparison" not in text


@pytest.mark.parametrize("what", ["missing", "empty", "torn", "list", "foreign"])
def test_other_folders_are_refused(tmp_path: Path, what: str) -> None:
    """``spos-fast report`` on a mistyped folder must say so and write nothing."""
    contents = {"empty": "", "torn": '{"seed": ', "list": "[]", "foreign": '{"epochs": 3}'}
    if what in contents:
        (tmp_path / "config.json").write_text(contents[what])
    with pytest.raises(InputError):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_torn_and_damaged_lines(make_run: MakeRun) -> None:
    """The line that is being written is left out without a word; damage further up is reported and survived."""
    run = make_run(rows=5)
    for name in ("evolution", "random_search", "best"):
        (run / f"search/{name}.json").unlink()
    path = run / "search/candidates.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:30]) + whole[30][:20])
    data = read_run(run)
    assert (len(data.evolution), data.problems, data.search_finished) == (30, (), False)
    assert [c.generation for c in data.evolution] == [0] * 20 + [1] * 10
    assert "30 candidates of evolution and 0 of random search are scored, of at most 220 each" in read(run)

    foreign = {**json.loads(whole[5]), "genes": [9] * 7}
    path.write_bytes(b"".join(whole[:5]) + b"\x00\xff<b>\n" + json.dumps(foreign).encode() + b"\nnull\n" + whole[6])
    (run / "retrain/evolution/result.json").write_text('{"label": ')
    data = read_run(run)
    assert len(data.evolution) == 6 and len(data.problems) == 3
    text = read(run)
    assert all(name in text for name in ("candidates.jsonl: 2 of 9 lines", "retrain/evolution/result.json"))


def test_everything_from_outside_is_escaped(make_run: MakeRun) -> None:
    """Names of folders and paths are text, whatever characters they hold, in HTML, in a drawing and in a command."""
    run = make_run(rows=5, name="<b>&\"'$x_1$", custom=["<i>$a$&"])
    text = read(run)
    parsed = Page(text)
    assert not any(tag == "i" and "style" not in values for tag, values in parsed.tags)
    assert "<i>$a$" not in text and "&lt;i&gt;$a$&amp;" in text
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text
    assert not parsed.open


def test_one_candidate_one_row_nan_and_zero(make_run: MakeRun) -> None:
    """Numbers of a failed training reach the page as they are, and axes of no width do not stop it."""
    run = make_run(rows=1)
    row = {"phase": "evolution", "number": 0, "genes": [0] * 7, "images": 10, "macs": 5, "params": 5}
    for name in ("evolution", "random_search", "best"):
        (run / f"search/{name}.json").unlink()
    values = [(0.0, math.nan), (math.nan, math.nan), (1.0, 0.0)]
    for count in (1, 3):
        rows = [{**row, "number": n, "accuracy": a, "loss": b} for n, (a, b) in enumerate(values[:count])]
        (run / "search/candidates.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (run / "supernet/metrics.jsonl").write_text(
            '{"step": 1, "loss": NaN, "accuracy": NaN, "lr": 0.1, "images_per_second": Infinity}\n'
        )
        Page(read(run))
    (run / "search/candidates.jsonl").write_text(json.dumps({**row, "accuracy": math.nan, "loss": 1}) + "\n")
    assert "no number" in read(run)
    (run / "search/candidates.jsonl").write_text("")
    (run / "supernet/metrics.jsonl").write_text("")
    assert "The search has not run yet" in read(run)


def test_retraining_that_has_not_finished(make_run: MakeRun) -> None:
    """A network that is still being trained has a row with its step, and no test accuracy."""
    run = make_run(rows=10)
    (run / "retrain/all_xception/result.json").unlink()
    (run / "retrain/random_0/result.json").unlink()
    (run / "retrain/random_0/metrics.jsonl").write_text("")
    text = read(run)
    assert "training: step 1,000 of 1,000" in text and "training began" in text
    assert Page(text).rows["random_0"] == [None] * 6
    by_label = {row.label: row for row in comparison(read_run(run))}
    assert by_label["all_xception"].genes == (3,) * 7 and by_label["all_xception"].result is None


def test_a_run_of_the_papers_size(paper_page: str) -> None:
    """20 layers and 2,100 candidates: under 2 MB, with every candidate drawn and the constraint shown."""
    text = paper_page
    assert len(text.encode()) < 2e6
    assert "macs_min 290\N{NO-BREAK SPACE}M" in text and "macs_max 330\N{NO-BREAK SPACE}M" in text
    dots = [len(re.findall("M", path)) for path in re.findall(r' d="([^"]*)"', text)]
    assert dots.count(1050) == 4


def test_many_candidates_become_a_picture(make_run: MakeRun) -> None:
    """A drawing of tens of thousands of dots would be larger than a picture of them, and slow to scroll."""
    run = make_run(rows=5)
    rows = lines(run / "search/candidates.jsonl")[:200]
    (run / "search/evolution.json").unlink()
    with open(run / "search/candidates.jsonl", "w") as file:
        for number in range(20000):
            file.write(json.dumps({**rows[number % 200], "phase": "evolution", "number": number}) + "\n")
    text = read(run)
    assert len(text.encode()) < 2e6 and 'href="data:image/png' in text


def test_blocks_and_widths_are_shown_layer_by_layer(widths_run: Path, make_run: MakeRun) -> None:
    """Genes alternate between blocks and widths; taking one for the other would show a wrong architecture."""
    data, text = read_run(widths_run), read(widths_run)
    assert data.kinds == ("block", "width") and data.layers == 7
    parsed = Page(text)
    assert not parsed.open and "Which block where" in text and "Which width where" in text
    best = json.loads((widths_run / "search/best.json").read_text())["evolution"]["genes"]
    strips = [values.get("aria-label") for _, values in parsed.tags if (values.get("class") or "") == "strip roomy"]
    strips = [label for label in strips if label is not None]
    assert strips[0] == ", ".join(data.choices[0][gene] for gene in best[::2])
    assert strips[1] == ", ".join(f"{0.2 * (gene + 1):.1f}x".replace(".0x", "x") for gene in best[1::2])
    rows = {row.label: row.genes for row in comparison(data)}
    assert rows["all_shuffle_k5"] == (1, 4) * 7  # ratio 1
    only_widths = {"channels": [0.5, 1.0], "blocks": [3], "stage_channels": [32, 64], "stage_repeats": [2, 3]}
    run = make_run({"space": {**only_widths, "stage_strides": [1, 2]}, "search": {"population": 60}}, rows=3)
    text = read(run)
    assert "Which width where" in text and "Which block where" not in text and "1x everywhere" in text


@pytest.mark.parametrize("ratios", [[0.5, 1.0], [0.5, 1.0, 1.5]], ids=len)
def test_the_note_on_widths_is_the_schedules(make_run: MakeRun, ratios: list[float]) -> None:
    """The step from which all widths are drawn: with two ratios that is where the second joins, not the schedule's
    end."""
    space = {"channels": ratios, "stage_channels": [32, 64], "stage_repeats": [2, 3], "stage_strides": [1, 2]}
    schedule = {"steps": 1000, "widening_start": 0.3, "widening_end": 0.6}
    run = make_run({"space": space, "train": schedule}, stages=("train",), rows=3)
    sampler = WideningSampler(UniformSampler(ShuffleNetV2(**space)), 1000, 0.3, 0.6)
    first = next(step for step in range(1000) if sampler.widths(step) == len(ratios))
    assert first == (300 if len(ratios) == 2 else 600)
    assert f"at their widest for 300 steps; all widths are drawn from step {first} on" in read(run)


def test_the_commands_make_the_same_settings(full_run: Path, paper_run: Path, widths_run: Path) -> None:
    """Whoever copies the commands gets every setting that the folder stores, and the same architectures retrained."""
    for run in (full_run, paper_run, widths_run):
        data = read_run(run)
        given: dict[str, Any] = {}
        commands = [shlex.split(command) for command in again_commands(data)]
        assert [words[:4] for words in commands] == [
            ["spos-fast", stage, "--folder", "runs/again"] for stage in ("train", "search", "retrain")
        ]
        architectures = []
        for words in commands:
            for flag, text in zip(words[4::2], words[5::2], strict=True):
                name = flag.removeprefix("--")
                section, _, key = name.partition(".")
                if name == "arch":
                    architectures.append(text)
                elif name == "seed":
                    given["seed"] = int(text)
                else:
                    kind = next(kind for name, kind, _, _ in settings_of(section) if name == key)
                    given = merged(given, {section: {key: parse_flag(name, text, kind)}})
        assert set(given) - {"seed"} <= set(SECTIONS)
        stored = json.loads((run / "config.json").read_text())
        assert plain(config_from(given, "commands")) == {**plain(Config()), **stored}
        assert architectures == (["all", "0-1-2-3-0-1-2"] if run == full_run else [])


def test_a_published_supernet_needs_no_training(make_run: MakeRun) -> None:
    """The commands then begin with the search, which names data and space."""
    run = make_run(stages=("train", "search"))
    stored = json.loads((run / "config.json").read_text())
    stored["search"]["supernet"] = "/models/<published>.pth"
    (run / "config.json").write_text(json.dumps(stored))
    (run / "supernet/metrics.jsonl").unlink()
    text = read(run)
    assert "published supernet <code>/models/&lt;published&gt;.pth</code>" in text
    (command,) = again_commands(read_run(run))
    assert command.startswith("spos-fast search --folder runs/again --seed 3 --data.name digits --space.stem_stride 1")
