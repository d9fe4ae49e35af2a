"""Two ranks search as one process does; a rank that dies or raises is named; the search then goes on where it was."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

# Seconds of computing; minutes on cores that other work keeps busy.
pytestmark = pytest.mark.timeout(300)

# One process imports PyTorch once and forks the ranks of every job, which is what keeps this test short. Jobs are not
# started by torchrun: it would end the surviving rank before that finds out by itself.
PROGRAM = textwrap.dedent("""
    import contextlib, io, json, os, shutil, signal, socket, sys, time
    import sklearn.datasets, torch
    import spos_fast.analysis.report, spos_fast.console, spos_fast.pipeline
    from spos_fast import Architecture, DistributedEvaluator, Evaluator, Score, distributed
    from spos_fast.cli import main

    root, flags = sys.argv[1], sys.argv[2:]

    def job(ranks, work):
        # Every rank's work() in a process of its own; what they return or raise, None for a rank that was killed.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ends = []
        for rank in range(ranks):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                begun = time.monotonic()
                try:
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
                        value = work(rank)
                    said = error.getvalue()
                except Exception as caught:
                    value, said = "raised", f"{type(caught).__name__}: {caught}"
                os.write(write, json.dumps([value, said, time.monotonic() - begun]).encode())
                os._exit(0)
            os.close(write)
            ends.append(read)
        told = [os.fdopen(end).read() for end in ends]
        for _ in ends:
            os.wait()
        return [json.loads(text) if text else None for text in told]

    def die(number):
        # SIGKILL in the middle of a generation: the part of this rank has been scored, nobody knows.
        calls, score = [], Evaluator.__call__
        def scored(self, archs):
            calls.append(score(self, archs))
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return calls[-1]
        Evaluator.__call__ = scored

    def search(folder, victim=None, more=()):
        def work(rank):
            if rank == victim:
                die(3)
            return main(["search", "--folder", f"{root}/{folder}", "--rank-timeout", "1", "--threads", "1", *flags[1:],
                         *more])
        return work

    def evaluate(kind):
        def score(rank):
            def scores(archs):
                if kind == "raise" and rank == 1:
                    raise ArithmeticError("no such luck")
                return [Score(arch.genes[0] / 3, float("nan") if rank else 0.1, rank) for arch in archs]
            return scores
        def work(rank):
            with distributed.process_group(torch.device("cpu"), 1.0) as exchange:
                both = DistributedEvaluator(score(rank), exchange=exchange)
                archs = [Architecture("any", (gene,)) for gene in (3, 0, 2, 1, 0)]
                for number in range(3):
                    if kind == "leave" and rank == 1 and number == 2:
                        return "left"
                    out = both(archs[rank:] if kind == "other" and number == 2 else archs)
                return [[s.accuracy, repr(s.loss), s.images] for s in out]
        return work

    report = {kind: job(2, evaluate(kind)) for kind in ("agree", "raise", "leave", "other")}
    os.environ.pop("WORLD_SIZE", None)
    assert job(1, lambda rank: main(["train", "--folder", f"{root}/alone", "--threads", "1", *json.loads(flags[0])]))
    for name in ("two", "second_dies", "stopping", "first_dies"):
        shutil.copytree(f"{root}/alone", f"{root}/{name}")
    report["alone"] = job(1, search("alone"))
    report["two"] = job(2, search("two"))
    stopping = ["--search.early_stopping", "0.5", "--search.batch_size", "16", "--search.top_k", "1"]
    report["stopping"] = job(1, search("stopping", more=stopping))
    for victim, name, more in ((1, "second_dies", ()), (0, "first_dies", stopping)):
        report[name] = job(2, search(name, victim, more))
        with open(f"{root}/{name}/search/candidates.jsonl") as file:
            report[name + "_rows"] = len(file.readlines())
        report[name + "_again"] = job(2, search(name, more=more))
    nothing = ["--search.population", "1", "--search.crossover", "0", "--search.mutation", "0"]
    report["idle_rank"] = job(2, lambda rank: main(["demo", "--folder", f"{root}/none", *nothing]))
    print(json.dumps(report))
""")

TRAIN = [
    "--config", "digits", "--no-tensorboard", "--device", "cpu", "--data.validation", "0.1",
    "--space.stem_channels", "8", "--space.stage_channels", "16,32", "--space.stage_repeats", "2,2",
    "--space.stage_strides", "1,2", "--space.head_channels", "32",
    "--train.steps", "100", "--train.batch_size", "32", "--space.init", "pytorch",
]  # fmt: skip
SEARCH = [
    "--search.population", "5", "--search.generations", "3", "--search.crossover", "2", "--search.mutation", "2",
    "--search.top_k", "3", "--search.calibration_images", "64", "--no-tensorboard", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What every job did: for each of its ranks what it returned, what it said and its seconds."""
    root = tmp_path_factory.mktemp("jobs")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), json.dumps(TRAIN), *SEARCH],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    return {"root": root, **json.loads(done.stdout.splitlines()[-1])}


def _found(jobs, folder):
    search = jobs["root"] / folder / "search"
    return {path.name: path.read_bytes() for path in sorted(search.iterdir())}


def test_two_ranks_find_what_one_process_finds(jobs):
    """Every record and result, byte for byte; each candidate once, written by rank 0 alone."""
    assert [code for code, *_ in jobs["alone"] + jobs["two"] + jobs["stopping"]] == [0, 0, 0, 0]
    alone = _found(jobs, "alone")
    assert len(alone) == 4 and len(alone["candidates.jsonl"].splitlines()) == 2 * 5 * 4
    assert _found(jobs, "two") == alone


@pytest.mark.parametrize(
    ("folder", "survivor", "says", "undisturbed"),
    [("second_dies", 0, "rank 1", "alone"), ("first_dies", 1, "rank 0", "stopping")],
)
def test_a_killed_rank_is_named_and_the_search_goes_on(jobs, folder, survivor, says, undisturbed):
    """SIGKILL in the third generation: an error on the other rank soon after; the same command then ends as in one
    process that nothing disturbed, with early stopping too."""
    ranks = jobs[folder]
    assert ranks[1 - survivor] is None
    code, error, seconds = ranks[survivor]
    assert code == 1 and f"error: {says} is gone" in error and "run the same command again to go on" in error
    assert seconds < 30
    assert jobs[f"{folder}_rows"] == 10
    assert [code for code, *_ in jobs[f"{folder}_again"]] == [0, 0]
    found = _found(jobs, folder)
    assert found == _found(jobs, undisturbed)
    assert (b'"stopped": true' in found["candidates.jsonl"]) == (undisturbed == "stopping")


def test_scores_come_back_in_the_given_order_on_every_rank(jobs):
    """Bit for bit, NaN included, duplicates too; both ranks took part."""
    (first, *_), (second, *_) = jobs["agree"]
    assert first == second
    assert [accuracy for accuracy, _, _ in first] == [gene / 3 for gene in (3, 0, 2, 1, 0)]
    assert {(loss, rank) for _, loss, rank in first} == {("0.1", 0), ("nan", 1)}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("raise", "RankError: rank 1 failed (ArithmeticError: no such luck)"),
        ("leave", "RankError: rank 1 has ended while other ranks wait for it"),
        ("other", "RankError: ranks 1 and 0 were asked for different architectures"),
    ],
)
def test_a_rank_that_fails_ends_the_others_at_once(jobs, kind, says):
    """Without waiting for the timeout, with its own error; likewise ranks that ended or that ask for something else."""
    (value, said, _), _ = jobs[kind]
    assert (value, said) == ("raised", says)
    if kind == "raise":
        assert jobs[kind][1][1] == "ArithmeticError: no such luck"


def test_more_ranks_than_architectures_are_refused(jobs):
    """A rank that would never have anything to do is a mistake; no folder appears."""
    assert not (jobs["root"] / "none").exists()
    for code, error, _ in jobs["idle_rank"]:
        assert code == 2 and "search.population: 1 architectures cannot be shared out to 2 processes" in error
