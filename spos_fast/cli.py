"""The command line: ``spos-fast`` or ``python -m spos_fast``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from spos_fast.errors import CheckpointError, InputError, RankError
from spos_fast.nasbench.commands import add_subcommands

DESCRIPTION = """\
Single Path One-Shot architecture search (arXiv 1904.00420).

A search is three stages on one run folder; each can be stopped at any moment and goes on when started again:
  spos-fast train   --folder runs/mine --config cifar10 --data.path ~/cifar-10-batches-py
  spos-fast search  --folder runs/mine
  spos-fast retrain --folder runs/mine
  spos-fast report  --folder runs/mine
`spos-fast demo` does all four on scikit-learn's digits in a few minutes."""

COMMANDS = {
    "demo": "all stages on the embedded digits (or on what --config says)",
    "train": "train the supernet by uniform path sampling",
    "search": "evolutionary search with the supernet's weights, and random search under the same budget",
    "retrain": "train the architectures that were found, and the baselines, as networks of their own",
    "consistency": "how well the supernet ranks architectures, against a table of networks trained one by one",
    "report": "write report.html from what the run folder holds",
}
LATENCY = "measure the latency of every choice on this device, as a table that a search can be limited by"
EXPORT = "write a retrained network as an ONNX file, or as a checkpoint packed to its bits"
NASBENCH = "NAS-Bench-101: every cell, and the benchmark as a table"
PRESET_NAMES = sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.toml"))
# Settings that a command shows; the ones of earlier stages come from the run folder.
SECTIONS_OF = {
    "demo": ("data", "space", "train", "search", "retrain"),
    "train": ("data", "space", "train"),
    "search": ("data", "space", "train", "search"),
    "retrain": ("data", "space", "train", "search", "retrain"),
    "consistency": ("data", "space", "train", "consistency"),
    "report": (),
    "latency": ("data", "space"),
}
STAGES_OF = {
    "demo": ("train", "search", "retrain"),
    "train": ("train",),
    "search": ("search",),
    "retrain": ("retrain",),
    "consistency": ("train", "consistency"),
    "report": (),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a lost rank, 2 for an error of the user's, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["nasbench"]:
            _nasbench(given[1:])
        else:
            _run(_parser().parse_args(given))
    except (InputError, CheckpointError) as error:
        print(f"spos-fast: error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"spos-fast: error: {error}; run the same command again to go on", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output (head, less) has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 0
    except KeyboardInterrupt:
        begun = given[:1] not in (["latency"], ["export"])
        further = "run the same command again to go on" if begun else "nothing was written"
        print(f"\nspos-fast: interrupted; {further}", file=sys.stderr)
        return 130
    return 0


def _nasbench(arguments: Sequence[str]) -> None:
    # A parser of its own: that of the stages reads their settings, and with them imports torch.
    parser = _Parser("spos-fast nasbench", description=NASBENCH + ".", allow_abbrev=False)
    add_subcommands(parser)
    options = parser.parse_args(arguments)
    options.run(options)


def _run(options: argparse.Namespace) -> None:
    # Imported late: --help and a mistyped flag answer at once.
    import torch

    from spos_fast import distributed, pipeline
    from spos_fast.analysis.report import write_report
    from spos_fast.config_io import config_from, merged, read_config
    from spos_fast.job import Job, check_settings, make_space, require_stage_before
    from spos_fast.latency.settings import MAX_THREADS
    from spos_fast.run import Run, resolve

    if options.command == "report":
        print(f"report: {write_report(_existing(options.folder))}")
        return
    if options.command == "export":
        from spos_fast.export import commands as export

        _existing(options.folder)
        export.run(options, _device(options.device))
        return
    preset, flags = read_config(options.config) if options.config else {}, _flags(options)
    _drop_other_sizes(preset, flags)
    device = _device(options.device)
    if options.command == "latency":
        from spos_fast.latency import commands

        settings = merged(preset, flags)
        if not settings.get("data") and options.folder is None:
            raise InputError(f"--config: name a preset ({', '.join(PRESET_NAMES)}), a TOML file, or a run by --folder")
        folder = _existing(options.folder) if options.folder is not None else None
        commands.run(options, resolve(folder, preset, flags) if folder else config_from(settings, "settings"), device)
        return
    if not 0 <= options.threads <= MAX_THREADS:
        raise InputError(f"--threads: got {options.threads}; expected 0 to {MAX_THREADS:,}")
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers: got {options.workers}; expected 0 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not 0 < options.rank_timeout < float("inf"):
        raise InputError(f"--rank-timeout: got {options.rank_timeout:g}; expected a positive number of seconds")
    with ExitStack() as stack:
        # Joined first: what one rank alone refuses from here on ends the others too.
        exchange = stack.enter_context(distributed.process_group(device, options.rank_timeout))
        config = resolve(options.folder, preset, flags)
        if not merged(preset, flags).get("data") and not (options.folder / "config.json").exists():
            raise InputError(f"--config: a new run needs one; name a preset ({', '.join(PRESET_NAMES)}) or a TOML file")
        # Everything that can be refused is refused before a folder is made.
        source = config.data.load(options.workers)
        space = make_space(config, source, options.folder, _warn if exchange.rank == 0 else None)
        for stage in STAGES_OF[options.command]:
            check_settings(stage, config, source, space)
        table = None
        if options.command == "consistency":
            from spos_fast.consistency import open_table

            table = open_table(config, source, space)
        if options.command in ("search", "retrain"):
            require_stage_before(options.command, options.folder, config)
        job = Job(
            options.folder,
            config,
            source,
            space,
            device,
            workers=options.workers,
            tensorboard=not options.no_tensorboard,
            exchange=exchange,
        )
        chosen = _chosen(options, job) if options.command == "retrain" else {}
        if exchange.rank == 0:  # the others write and say nothing
            stack.enter_context(Run(options.folder, preset, flags, STAGES_OF[options.command]))
            console = job.listener = stack.enter_context(_console())
        exchange.barrier()  # a folder that rank 0 cannot have ends all ranks here
        if options.command in ("demo", "train", "consistency"):
            pipeline.train_supernet(job)
        if table is not None:
            _consistency(job, table)
            return
        if options.command in ("demo", "search"):
            pipeline.search(job)
        if options.command in ("demo", "retrain"):
            pipeline.retrain(job, chosen if options.command == "retrain" else pipeline.baselines(job))
        if exchange.rank == 0:
            console.say(f"report: {write_report(options.folder)}")


def _consistency(job: Any, table: Any) -> None:
    from spos_fast.analysis.consistency_report import tau_text, title, write_consistency_report
    from spos_fast.consistency import consistency, missing_states

    if job.exchange.rank == 0 and (missing := missing_states(job)):
        steps = ", ".join(f"{step:,}" for step in missing)
        _warn(f"states that training kept are missing and not scored: of step {steps}")
    result = consistency(job, table)
    if job.exchange.rank == 0:
        for ranking in (*result.scored, *result.references):
            name = title(ranking.way) if ranking.way else ranking.name
            job.listener.say(f"{name}: tau {tau_text(ranking.statistics)}")
        job.listener.say(f"report: {write_consistency_report(job.folder, result)}")


def _drop_other_sizes(preset: dict[str, Any], flags: dict[str, Any]) -> None:
    """Leave out the ranges of cost of a preset for another space than ``--space`` names, and its sizes if the space is
    of another kind.
    """
    from spos_fast.config import Config
    from spos_fast.spaces.settings import SPACE_CONFIGS

    theirs, own = ((values.get("space") or {}) for values in (preset, flags))
    if isinstance(theirs, dict) and "name" in own:
        before = theirs.get("name", Config().space.name)
        if own["name"] != before:
            for section in filter(lambda value: isinstance(value, dict), preset.values()):
                for name in [name for name in section if name.endswith(("_min", "_max"))]:
                    del section[name]
        if SPACE_CONFIGS.get(own["name"]) is not SPACE_CONFIGS.get(before):
            preset.pop("space", None)


def _chosen(options: argparse.Namespace, job: Any) -> dict[str, Any]:
    """Architectures to retrain, by label."""
    from spos_fast import pipeline
    from spos_fast.architecture import Architecture

    names = getattr(options, "arch", None) or ["all"]
    chosen: dict[str, Architecture] = {}
    for name in names:
        if name == "all":
            chosen.update(pipeline.baselines(job))
        elif name == "best":
            chosen.update(pipeline.searched(job))
        elif name == "front":
            front = pipeline.pareto_front(job)
            if not front:
                raise InputError(f"--arch: {job.folder} has no Pareto front; search with --search.objectives for one")
            chosen.update(front)
        elif name.endswith(".json"):
            try:
                text = Path(name).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--arch: {name} could not be read ({error})") from None
            arch = job.space.architecture(Architecture.from_json(text))
            chosen[f"genes_{arch}"] = arch
        elif name.replace(",", "").replace("-", "").isdecimal():
            arch = job.space.architecture([int(gene) for gene in name.replace("-", ",").split(",") if gene])
            chosen[f"genes_{arch}"] = arch
        else:
            known = pipeline.baselines(job) | pipeline.pareto_front(job)
            if name not in known:
                raise InputError(
                    f"--arch: got {name!r}; expected all, best, front, {', '.join(known)}, genes such as 0,1,2, "
                    "or a JSON file"
                )
            chosen[name] = known[name]
    return chosen


def _warn(text: str) -> None:
    print(f"spos-fast: warning: {text}", file=sys.stderr)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"--device: {name!r} cannot be used here ({first})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _existing(run: Path) -> Path:
    if not (run / "config.json").exists():
        raise InputError(f"--folder: {run} is not a run folder; name one that train or demo made")
    return run


class _Parser(argparse.ArgumentParser):
    """Mistakes become one line and exit code 2, as every other error."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("spos-fast", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            usage=f"spos-fast {name} "
            + ("--folder FOLDER" if name == "report" else "--folder FOLDER [--config NAME] ..."),
            allow_abbrev=False,
        )
        default = Path("runs/demo") if name == "demo" else None
        begins = (
            "made if it is not there, gone on with if it is" if "train" in STAGES_OF[name] else "of an earlier stage"
        )
        command.add_argument(
            "--folder",
            type=Path,
            default=default,
            required=default is None,
            metavar="FOLDER",
            help=f"run folder, {begins}" + (f" (default {default})" if default else ""),
        )
        if name == "report":
            continue
        if name == "retrain":
            command.add_argument(
                "--arch",
                action="append",
                metavar="WHAT",
                help="what to retrain; may be repeated. all (default): the best of evolution and of random search, "
                "each choice everywhere, random ones; best: the first two; front: the Pareto front; one of their "
                "names, such as pareto_0; genes such as 0,1,2; or a .json file with an architecture",
            )
        command.add_argument(
            "--config",
            default="digits" if name == "demo" else "",
            metavar="NAME",
            help=f"TOML file with settings, or a preset: {', '.join(PRESET_NAMES)}",
        )
        command.add_argument("--seed", metavar="N", help="of every random choice (default 0)")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
        # Networks as small as the demo's gain little from a second thread; with busy cores every barrier waits.
        threads = 1 if name == "demo" else 0
        command.add_argument(
            "--threads",
            type=int,
            default=threads,
            metavar="N",
            help=f"CPU threads; 0: PyTorch's choice (default {threads})",
        )
        command.add_argument(
            "--workers", type=int, metavar="N", help="processes that decode images (default: by the cores)"
        )
        command.add_argument(
            "--rank-timeout",
            type=float,
            default=30.0,
            metavar="SECONDS",
            help="under torchrun: a process counts as gone after this time without a sign of life (default 30)",
        )
        command.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard scalars")
        _add_settings(command, SECTIONS_OF[name])
    _add_latency(commands)
    _add_export(commands)
    commands.add_parser("nasbench", help=NASBENCH)  # for the list of commands; _nasbench takes what follows
    return parser


def _add_latency(commands: Any) -> None:
    usage = "spos-fast latency --out FILE (--config NAME | --folder FOLDER) ..."
    command = commands.add_parser(
        "latency", help=LATENCY, description=LATENCY[0].upper() + LATENCY[1:] + ".", usage=usage, allow_abbrev=False
    )
    # Here and not at the top: the options come with torch.
    from spos_fast.latency.commands import add_options

    add_options(command)
    presets = ", ".join(PRESET_NAMES)
    command.add_argument("--config", default="", metavar="NAME", help=f"TOML file, or a preset: {presets}")
    command.add_argument("--seed", metavar="N", help="of random images and networks (default 0)")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: PyTorch's choice")
    _add_settings(command, SECTIONS_OF["latency"])


def _add_export(commands: Any) -> None:
    usage = "spos-fast export --folder FOLDER --out FILE ..."
    command = commands.add_parser(
        "export", help=EXPORT, description=EXPORT[0].upper() + EXPORT[1:] + ".", usage=usage, allow_abbrev=False
    )
    from spos_fast.export.commands import add_options

    add_options(command)
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def _add_settings(command: argparse.ArgumentParser, sections: Sequence[str]) -> None:
    from spos_fast.config import SECTIONS
    from spos_fast.config_io import documented_fields

    for section in sections:
        there: set[str] = set()
        for variant in SECTIONS[section]:
            first_line = (variant.__doc__ or "").strip().splitlines()[0]
            group = command.add_argument_group(f"{section}: {first_line.rstrip('.')}")
            shared: list[str] = []
            for name, _, default, text in documented_fields(variant):
                shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
                if name in there:  # spaces share some settings
                    if name != "name":
                        shared.append(f"{name} (default {shown})" if shown != "" else name)
                    continue
                there.add(name)
                text = text.rstrip(".").replace("%", "%%")
                flags = [f"--{section}.{name}"]
                if section == "consistency":  # the settings of this command alone
                    flags.insert(0, "--" + name.replace("_", "-"))
                if (section, name) == ("space", "name"):
                    flags.append("--space")
                group.add_argument(
                    *flags,
                    dest=f"{section}.{name}",
                    metavar="VALUE",
                    help=f"{text} (default {shown})" if shown != "" else text,
                )
            if shared:
                group.description = f"and, as above: {', '.join(shared)}"


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    """Settings given as flags, as nested plain values."""
    from spos_fast.config_io import TABLES, parse_flag, settings_of

    values: dict[str, Any] = {}
    if options.seed is not None:
        values["seed"] = parse_flag("--seed", options.seed, int)
    for section in SECTIONS_OF[options.command]:
        for name, kind, _, _ in settings_of(section):
            text = getattr(options, f"{section}.{name}")
            if text is not None:
                values.setdefault(section, {})[name] = parse_flag(f"--{section}.{name}", text, kind)
    for section, name in (("data", "path"), *TABLES):
        path = values.get(section, {}).get(name)
        if path:
            # A run goes on from another working directory too.
            values[section][name] = str(Path(path).expanduser().resolve())
    return values


@contextmanager
def _console() -> Iterator[Any]:
    from spos_fast.console import Console

    console = Console()
    try:
        yield console
    finally:
        console.close()
