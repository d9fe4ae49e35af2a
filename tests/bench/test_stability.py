"""Ranking stability is measured on a run folder, goes on where it was stopped, and ends in a table and a figure."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from scipy import stats

from bench import stability
from spos_fast import Score
from spos_fast.errors import InputError

SCORED = []


class Scorer:
    """Stands for the Evaluator: a score that depends on the architecture, the mode, the set and nothing else."""

    def __init__(self, net, calibration, validation, *, mode, calibration_batch, batch_size):
        assert (len(validation), calibration_batch) == (100, 128)
        self.mode, self.mean = mode, calibration.pixels.float().mean()
        SCORED.append((mode, len(calibration)))

    def __call__(self, archs):
        weights = [sum(gene * place for place, gene in enumerate(arch.genes, 2)) for arch in archs]
        return [Score(float((self.mean * weight + len(self.mode)) % 1), 0.0, 100) for weight in weights]


def _measure(folder, **changes):
    given = dict(sizes=(16, 256), draws=2, architectures=5, reference=300, validation=100, device=torch.device("cpu"))
    return stability.measure(folder, **(given | changes))


def test_measuring_and_going_on(tmp_path: Path, monkeypatch):
    """A row for every mode and size with one correlation a draw, against the reference; a second call scores nothing;
    scores of other architectures are refused, and so are sizes that the data does not have."""
    monkeypatch.setattr(stability, "Evaluator", Scorer)
    monkeypatch.setattr(stability.pipeline, "load_supernet", lambda job: None)
    rows = _measure(tmp_path)
    assert [(row.mode, row.images) for row in rows] == [(m, n) for m in stability.MODES for n in (16, 256)]
    recorded = [json.loads(line) for line in (tmp_path / "stability" / "scores.jsonl").read_text().splitlines()]
    by_key = {(row["mode"], row["images"], row["draw"]): row["accuracy"] for row in recorded[1:]}
    reference = by_key["pooled", 300, 0]
    for row, key in ((rows[-1], "ema"), (rows[3], "pooled")):
        drawn = [by_key[key, 256, draw] for draw in (1, 2)]
        assert row.spearman == pytest.approx([stats.spearmanr(draw, reference).statistic for draw in drawn])
        assert row.kendall == pytest.approx([stats.kendalltau(draw, reference).statistic for draw in drawn])
    assert rows[0].kendall == rows[2].kendall and ("pooled", 16, 1) not in by_key  # of one batch both are the same
    assert len(SCORED) == len(by_key) == 11

    assert [row.accuracy for row in _measure(tmp_path)] == [row.accuracy for row in rows] and len(SCORED) == 11
    with pytest.raises(InputError, match="scores of another measurement"):
        _measure(tmp_path, architectures=4)
    for wrong in ({"draws": 0}, {"architectures": 2}, {"sizes": ()}, {"sizes": (1, 16)}, {"sizes": (5000,)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            _measure(tmp_path, **wrong)


def test_mistakes_leave_nothing_behind(tmp_path: Path, monkeypatch, capsys):
    """A folder that a mistake was made in can be measured in afterwards; a reference of one batch is a reference."""
    monkeypatch.setattr(stability, "Evaluator", Scorer)
    monkeypatch.setattr(stability.pipeline, "load_supernet", lambda job: None)
    for wrong in ({"reference": 0}, {"validation": -5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            _measure(tmp_path, **wrong)
    for arguments, says in ((["--device", "cuda:77"], "--device"), (["--threads", "0"], "--threads"), ([], "--folder")):
        monkeypatch.setattr("sys.argv", ["stability", "--folder", str(tmp_path), *arguments])
        assert stability.main() == 2 and says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert len(_measure(tmp_path, reference=100, sizes=(16,))) == len(stability.MODES)


def test_table_and_figure():
    """Mean and range of the draws, a column group a mode; a figure that stands alone, in colours of its own."""
    rows = [
        stability.Stability(mode, images, (0.5, 0.6, 0.7), (0.3, 0.4, 0.5), 0.41)
        for mode in stability.MODES
        for images in (16, 1024)
    ]
    line = stability.table(rows).splitlines()[3]
    assert line.startswith("| 1,024 | 0.60 (0.50 to 0.70) | 0.40 (0.30 to 0.50) | 41.0% | 0.60")
    drawing = ElementTree.fromstring(stability.figure(rows, 40))
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg" and "0.60 with 1,024" in drawing.attrib["aria-label"]
    text = "".join(drawing.itertext())
    assert "calibration images" in text and all(mode in text for mode in stability.MODES)
    style = drawing.find("{http://www.w3.org/2000/svg}style").text
    assert "--evolution:#00785f" in style and "--font:" in style
