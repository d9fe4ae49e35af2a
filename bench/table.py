"""Tables of what was measured: on the console, and in README.md and docs/performance.md from the committed results.

python -m bench.table
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.run import GREEN, NO_KERNEL, is_ours

RESULTS = ROOT / "bench" / "results"
NO_COMPILERS, BUSY = " *", " †"
DISTURBED = 0.2  # cores that other work may take before a case is said to be disturbed
BEGIN, END = "<!-- benchmarks: begin (written by bench/table.py) -->", "<!-- benchmarks: end -->"


def main() -> int:
    """Rewrite the tables between their markers."""
    records = newest(RESULTS)
    for page, text in pages(records).items():
        page.write_text(replaced(page.read_text(), text))
        print(f"written: {page.relative_to(ROOT)}")
    return 0


def newest(folder: Path) -> list[dict[str, Any]]:
    """The newest record of every device below ``folder``, GPUs first."""
    latest: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".partial.json"):
            continue
        record = json.loads(file.read_text())
        device = record["environment"]["device"]
        if device not in latest or record["date"] >= latest[device]["date"]:
            latest[device] = record
    return sorted(latest.values(), key=lambda record: record["environment"]["device_type"] == "cpu")


def pages(records: Sequence[Mapping[str, Any]]) -> dict[Path, str]:
    """What belongs between the markers of which page."""
    return {
        ROOT / "README.md": "\n".join(markdown(record, headline=True) for record in records),
        ROOT / "docs" / "performance.md": "\n".join(markdown(record, headline=False) for record in records),
    }


def replaced(page: str, text: str) -> str:
    """The page with the text between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"


def line(case: Mapping[str, Any]) -> str:
    """One measured case for the console."""
    ours = case["seconds"].get(case.get("ours", ""), {}).get("median")
    text = f"{case['name']}: {duration(ours) if ours else 'no kernel of ours'}"
    if "best_peer" in case:
        text += f"; best peer {case['best_peer']} {duration(case['seconds'][case['best_peer']]['median'])}"
    return f"{text}; {speedup(case)}"


def full(record: Mapping[str, Any]) -> str:
    """Every contender of every case, for the console."""
    lines = [header(record), ""]
    for case in record["cases"]:
        lines.append(f"{case['name']}   [{case['verdict']}]")
        for name, spread in sorted(case["seconds"].items(), key=lambda item: item[1]["median"]):
            ratio = case.get("ratios", {}).get(name)
            shown = f"{ratio['median']:6.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})" if ratio else ""
            if is_ours(name) and name == case.get("ours"):
                shown = rates(case)
            times = f"{duration(spread['median'])} ({duration(spread['p20'])} to {duration(spread['p80'])})"
            lines.append(f"    {name:32} {times:40} {shown}".rstrip())
        lines += [f"    {name:32} failed: {reason}" for name, reason in case["failed"].items()]
        for name, size in case["peak_bytes"].items():
            lines.append(f"    {name:32} peak memory of a run {size / 1e6:,.1f} MB")
    disturbed = [case["name"] for case in record["cases"] if is_disturbed(case)]
    if disturbed:
        lines += ["", f"other processes took more than {DISTURBED} of a core during: {', '.join(disturbed)}"]
    if record["left_out"]:
        lines += ["", f"left out, the budget was spent: {', '.join(record['left_out'])}"]
    lines += ["", *summaries(record["cases"]), *notes(record["cases"])]
    return "\n".join(lines)


def is_disturbed(case: Mapping[str, Any]) -> bool:
    """Whether other processes took so much of the processor that the figures mean little."""
    return (case["other_work"] or 0.0) > DISTURBED


def notes(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the reader must know about ops, each said once."""
    found = {case["op"]: case["note"] for case in cases if case["note"]}
    return [f"{op}: {note}" for op, note in found.items()]


def rates(case: Mapping[str, Any]) -> str:
    """GB/s, GFLOP/s, items a second and the share of the roof, as far as they say something."""
    shown = []
    found = case["rates"]
    if case["bytes"]:
        shown.append(f"{found['bytes_per_second'] / 1e9:.1f} GB/s")
    if case["flops"]:
        shown.append(f"{found['flops_per_second'] / 1e9:.0f} GFLOP/s")
    if case["items"]:
        shown.append(f"{found['items_per_second']:,.0f} {case['unit']}/s")
    if case["bound"]:
        shown.append(f"{found['percent_of_roof']:.0f} % of the roof ({case['bound']})")
    return ", ".join(shown)


def summaries(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Per op with several shapes: geometric mean of the ratio to each case's best peer, and the range of the roof."""
    ratios: dict[str, list[float]] = {}
    roofs: dict[str, list[float]] = {}
    for case in cases:
        if case.get("ratios") and not is_disturbed(case):
            ratios.setdefault(_family(case["op"]), []).append(case["ratios"][case["best_peer"]]["median"])
            if case["bound"]:
                roofs.setdefault(_family(case["op"]), []).append(case["rates"]["percent_of_roof"])
    lines = []
    for op, values in ratios.items():
        if len(values) == 1:
            continue
        mean = math.exp(sum(map(math.log, values)) / len(values))
        line = f"{op}: {mean:.2f}x the best peer, geometric mean of {len(values)} cases "
        line += f"({min(values):.2f} to {max(values):.2f})"
        if op in roofs:
            line += f"; {min(roofs[op]):.0f} to {max(roofs[op]):.0f} % of the roof"
        lines.append(line)
    return lines


def _family(op: str) -> str:
    """Both units share a mean, mode by mode."""
    return op.replace("shuffle_unit", "unit").replace("xception_unit", "unit")


def header(record: Mapping[str, Any]) -> str:
    """Device, date, versions and roofs in one line."""
    env, roofs = record["environment"], record["roofs"]
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in roofs["matrix_flops_per_second"].items())
    where = (
        f"{env['device']}, driver {env['driver']}, CUDA {env['cuda']}"
        if env["device_type"] == "cuda"
        else env["device"]
    )
    where += f", {env['threads']} threads" if env["device_type"] == "cpu" else ""
    commit = (env["commit"] or "commit unknown") + (" with changes" if env["uncommitted_changes"] else "")
    return (
        f"{where}; {record['date']}; PyTorch {env['torch']}; {commit}. "
        f"Roofs of the same run: copy {roofs['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix product {rates}"
    )


def markdown(record: Mapping[str, Any], *, headline: bool) -> str:
    """A table of one device; ``headline`` keeps the cases that the README shows."""
    lines = [
        f"{header(record)}.",
        "",
        "| | spos_fast | of the roof | best peer | its time | ratio (20 to 80 % of rounds) |",
        "|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        if headline and not (case["headline"] and "ours" in case):
            continue
        ours = duration(case["seconds"][case["ours"]]["median"]) if "ours" in case else ""
        if case["items"] and ours:
            ours += f" ({case['rates']['items_per_second']:,.0f} {case['unit']}/s)"
        roof = f"{case['rates']['percent_of_roof']:.0f} % {case['bound']}" if "ours" in case and case["bound"] else ""
        best = case.get("best_peer", "")
        if best and not case["compile_peers"]:
            best += NO_COMPILERS
        peer = duration(case["seconds"][case["best_peer"]]["median"]) if best else ""
        name = case["name"] + (BUSY if is_disturbed(case) else "")
        lines.append(f"| {name} | {ours} | {roof} | {best} | {peer} | {speedup(case)} |")
    shown = [case for case in record["cases"] if not headline or (case["headline"] and "ours" in case)]
    under = [f"- {line}" for line in [*summaries(record["cases"]), *notes(shown)]]
    if any(NO_COMPILERS in row for row in lines):
        under.append("- * without torch.compile among the peers")
    if any(BUSY in row for row in lines):
        under.append(f"- † other processes took more than {DISTURBED} of a core; not in the means")
    if under:
        lines += ["", *under]
    return "\n".join(lines) + "\n"


def speedup(case: Mapping[str, Any]) -> str:
    """The ratio to the best peer with its spread; for a case that is not green, why there is none."""
    if case["verdict"] == NO_KERNEL:
        return NO_KERNEL
    if case["verdict"] != GREEN:
        return f"not shown ({case['verdict']})"
    if not case.get("ratios"):
        return "no peer"
    ratio = case["ratios"][case["best_peer"]]
    return f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


if __name__ == "__main__":
    sys.exit(main())
