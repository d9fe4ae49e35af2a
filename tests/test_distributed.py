"""Two processes with half of every batch train as one process with the whole batch does."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.timeout(300)  # several processes, on whatever cores are left

# One process imports PyTorch once and forks the ranks of every job, one job after another, as torchrun would start
# them: a process that is started imports for seconds. Batch normalisation is fixed to its initial statistics
# (evaluation mode) and dropout is off: batch statistics of half a batch differ from those of the whole one by
# definition.
PROGRAM = textwrap.dedent("""
    import json, os, socket, sys, traceback
    import torch, torch._dynamo
    from torch import nn
    from spos_fast import TrainConfig, UniformSampler, cli, data, distributed, train
    from spos_fast.spaces import ShuffleNetV2
    from spos_fast.supernet import Supernet

    def trained(folder, kind, *checkpoints):
        nn.BatchNorm2d.forward = lambda self, x: nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        os.makedirs(folder, exist_ok=True)
        with distributed.process_group(torch.device("cpu")):
            space = ShuffleNetV2(input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1,
                                 stage_channels=(16, 32), stage_repeats=(2, 2), stage_strides=(1, 2), head_channels=32,
                                 dropout=0.0)
            torch.manual_seed(0)
            supernet = kind == "supernet"
            net = space.supernet() if supernet else space.build(space.everywhere(0))
            paths, seen = [], Supernet.forward
            Supernet.forward = lambda self, x, arch: (paths.append(arch.genes), seen(self, x, arch))[1]
            rows = []
            train(net, data.load("digits"), TrainConfig(steps=6, batch_size=32, lr=0.02, log_every=2),
                  sampler=UniformSampler(space) if supernet else None, seed=5, on_metrics=rows.append,
                  checkpoint=f"{checkpoints[0]}/{distributed.rank()}/checkpoint.pt" if checkpoints else None)
            untouched = [name for name, p in net.named_parameters() if p.grad is None]
            torch.save({"model": net.state_dict(), "paths": paths, "untouched": untouched,
                        "rows": [(row.loss, row.accuracy) for row in rows]}, f"{folder}/{distributed.rank()}.pt")

    def rank(number, processes, port, arguments):
        os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(processes),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if arguments[0] == "cli":
            return cli.main(arguments[1:])
        trained(*arguments)
        return 0

    for processes, arguments in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in range(processes):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = rank(number, processes, port, arguments)
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(codes), flush=True)
        if any(codes):
            break
""")


def _run(*jobs):
    """Run jobs one after another, until one fails: (processes, arguments) each. Returns what they said, and the exit
    codes of the last one's ranks."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """What the ranks saw, by kind of network and number of processes."""
    root = tmp_path_factory.mktemp("ranks")
    pairs = [(kind, processes) for kind in ("supernet", "plain") for processes in (1, 2)]
    done, codes = _run(*((processes, [f"{root}/{kind}{processes}", kind]) for kind, processes in pairs))
    assert not any(codes), done.stderr
    return {
        (kind, processes): [torch.load(root / f"{kind}{processes}" / f"{rank}.pt") for rank in range(processes)]
        for kind, processes in pairs
    }


@pytest.mark.parametrize("kind", ["supernet", "plain"])
def test_two_ranks_of_half_a_batch_are_one_rank_of_the_whole(trainings, kind):
    """Same paths on all ranks, same weights up to rounding, no gradients off the path, metrics over all images."""
    (one,), (first, second) = trainings[kind, 1], trainings[kind, 2]
    assert first["paths"] == second["paths"] == one["paths"]
    assert first["untouched"] == second["untouched"] == one["untouched"]
    if kind == "supernet":
        assert len(set(one["paths"])) > 3 and one["untouched"]
    for name, value in one["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(first["rows"]), torch.tensor(one["rows"]), rtol=1e-5, atol=1e-6)
    assert second["rows"] == []


def test_ranks_that_read_different_checkpoints_are_refused(tmp_path):
    """Hosts that do not share the run folder: an error on resuming, not a silent mixture of steps."""
    arguments = [str(tmp_path / "out"), "supernet", str(tmp_path / "apart")]
    done, codes = _run((1, arguments), (2, arguments))
    assert codes == [1, 1]
    assert "one process is at step 6, another at 0; share the folder" in done.stderr


def test_the_command_line_under_torchrun(tmp_path):
    """Two ranks train; a search under ``torchrun`` takes that up, to the report, and says everything once."""
    sizes = ["--space.stem_channels", "8", "--space.stage_channels", "16", "--space.stage_repeats", "2"]
    sizes += ["--space.stage_strides", "2"]
    flags = ["--folder", str(tmp_path / "run"), "--config", "digits", "--train.steps", "4", "--no-tensorboard", *sizes]
    search = ["--search.population", "3", "--search.generations", "0", "--search.crossover", "0"]
    search += ["--search.mutation", "0", "--search.calibration_images", "64"]
    trained, codes = _run((2, ["cli", "train", *flags]))
    assert codes == [0, 0], trained.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spos_fast"]
    done = subprocess.run(
        [*launch, "search", *flags, *search],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert torch.load(tmp_path / "run" / "supernet" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert len((tmp_path / "run" / "search" / "candidates.jsonl").read_text().splitlines()) == 2 * 3
