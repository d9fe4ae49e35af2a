"""A run that is killed at random moments and started again gives the numbers of a run that was left alone."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

KILLS = 20

# One process imports PyTorch once and forks a child for every attempt: 20 starts cost seconds, not minutes. The child
# is the command itself, killed by SIGKILL after a random time; attempts go on until the run is finished, and with a new
# folder until there were enough kills.
PROGRAM = textwrap.dedent("""
    import json, os, random, signal, sys, time
    import sklearn.datasets, torch, torch._dynamo, torch.utils.tensorboard
    import spos_fast.analysis.report, spos_fast.console, spos_fast.pipeline
    from spos_fast.cli import main

    root, kills, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

    def child(folder):
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os._exit(main(["demo", "--folder", folder, *flags]))
        return pid

    def stage(folder):
        if os.path.exists(f"{folder}/search/best.json"):
            return "retrain"
        return "search" if os.path.exists(f"{folder}/search/candidates.jsonl") else "train"

    begun = time.monotonic()
    assert os.waitpid(child(f"{root}/alone"), 0)[1] == 0
    whole = time.monotonic() - begun
    rng, hit, number = random.Random(0), [], 0

    def enough():  # a short stage may need more than the usual number to be hit
        return len(hit) >= kills and ({"train", "search"} <= set(hit) or len(hit) >= 4 * kills)

    while not enough():
        folder, finished = f"{root}/killed_{number}", False
        number += 1
        while not finished:
            pid = child(folder)
            end = time.monotonic() + rng.uniform(0.0, whole / 2)
            while not finished and (enough() or time.monotonic() < end):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    assert status == 0, f"attempt ended with {status}"
                    finished = True
                time.sleep(0.002)
            if not finished:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                hit.append(stage(folder))
    print(json.dumps({"hit": hit, "folders": number}))
""")

FLAGS = [
    "--config", "digits", "--threads", "1", "--device", "cpu",
    "--space.stem_channels", "8", "--space.stage_channels", "16,32", "--space.stage_repeats", "2,2",
    "--space.stage_strides", "1,2", "--space.head_channels", "32",
    "--train.steps", "90", "--train.batch_size", "32", "--train.log_every", "3", "--train.checkpoint_seconds", "0.05",
    "--search.population", "10", "--search.generations", "8", "--search.crossover", "5", "--search.mutation", "5",
    "--search.top_k", "4", "--search.calibration_images", "512", "--search.calibration_batch", "64",
    "--retrain.steps", "20", "--retrain.batch_size", "32", "--retrain.log_every", "3",
    "--retrain.checkpoint_seconds", "0.05", "--retrain.random_architectures", "0", "--retrain.bn_steps", "2",
]  # fmt: skip


def _numbers(folder):
    """Everything that a run computes: records without speeds, results, and every tensor."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            out[name] = json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            out[name] = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
        elif path.suffix == ".pt":
            out[name] = torch.load(path, weights_only=True)
    return out


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(tmp_path):
    """SIGKILL at 20 random moments across training, search and retraining: bit for bit the same in the end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(KILLS), *FLAGS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["hit"]) >= KILLS and {"train", "search"} <= set(told["hit"]), told
    expected = _numbers(tmp_path / "alone")
    assert len(expected) > 15 and "search/candidates.jsonl" in expected and "supernet/checkpoint.pt" in expected
    for number in range(told["folders"]):
        found = _numbers(tmp_path / f"killed_{number}")
        assert list(found) == list(expected)
        for name in expected:
            assert _same(found[name], expected[name]), name
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
