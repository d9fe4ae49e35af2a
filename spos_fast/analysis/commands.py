"""Command lines for a run: the one that goes on with a stage, and those that do all of it again elsewhere."""

from __future__ import annotations

import shlex
from typing import Any

from spos_fast.analysis.run_data import RunData
from spos_fast.config import SECTIONS, Config, DataConfig
from spos_fast.config_io import documented_fields, plain


def stage_command(data: RunData, stage: str) -> str:
    """The command that begins a stage of this run or goes on with it."""
    return f"spos-fast {stage} --folder {shlex.quote(str(data.path))}"


def again_commands(data: RunData) -> list[str]:
    """Commands that make the same run in another folder; settings that are the default are left out."""
    began = {
        "search": bool(data.evolution or data.random_search),
        "retrain": bool(data.retrained),
        "consistency": any(data.path.glob("consistency/*.jsonl")),
    }
    # A search with a published supernet needs no training, and then is the first to name data and space.
    stages = [] if data.config.search.supernet and not data.supernet else ["train"]
    stages += [stage for stage, done in began.items() if done]
    out, given = [], {"data", "space"}
    for number, stage in enumerate(stages):
        sections = [name for name in SECTIONS if name == stage or (number == 0 and name in given)]
        words = ["spos-fast", stage, "--folder", "runs/again"]
        if number == 0:
            words += ["--seed", str(data.config.seed)]
            if data.config.data.name == DataConfig().name:
                words += ["--data.name", data.config.data.name]  # a new run must name its data, the default too
        for section in sections:
            words += _flags(data, section)
        if stage == "retrain":
            words += _labels(data)
        out.append(shlex.join(words))
    return out


def _flags(data: RunData, section: str) -> list[str]:
    values, words = plain(data.config)[section], []
    for name, _, default, _ in documented_fields(type(getattr(data.config, section))):
        value = values[name]
        if (section, name) == ("space", "name"):
            default = Config().space.name  # the program's, not that of the settings that the name stands for
        kept = data.path / "search" / "latency.json"
        if name == "latency_table" and value and kept.exists():
            value = str(kept)  # what the search went by; the file that was given may have changed
        if value != (list(default) if isinstance(default, tuple) else default):
            words += [f"--{section}.{name}", _flag_text(value)]
    return words


def _flag_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _labels(data: RunData) -> list[str]:
    """``--arch`` for what the plain command would not retrain."""
    labels = [entry.label for entry in data.retrained]
    usual = {"evolution", *data.baselines}
    usual |= {f"random_{number}" for number in range(data.config.retrain.random_architectures)}
    usual |= {"random_search"} if data.config.search.random_search else set()
    named = [label for label in labels if label not in usual]
    if not usual <= set(labels):
        named = labels
    elif named:
        named = ["all", *named]
    return [word for label in named for word in ("--arch", label.removeprefix("genes_"))]
