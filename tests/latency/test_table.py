"""A latency table is a metric like the others: exact, checked against its space, and read back whole or refused."""

import itertools
import json

import numpy as np
import pytest

from spos_fast import (
    CheckpointError,
    Constraint,
    InputError,
    LatencySettings,
    LatencyTable,
    Score,
    UniformSampler,
    evolve,
    sampling,
)
from spos_fast.latency import Spread
from spos_fast.latency.settings import describe_machine, describe_versions
from spos_fast.latency.table import plain_config
from spos_fast.spaces import ShuffleNetV2

TINY = dict(
    input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
    stage_repeats=(2, 2), stage_strides=(1, 2), head_channels=32,
)  # fmt: skip


def invented(space, seed=0, scale=1_000_000):
    """A table of random times."""
    import torch

    rng = np.random.default_rng(seed)

    def spread(shape):
        median = rng.integers(scale // 10, scale, size=shape)
        return Spread(median - 7, median, median + 9)

    return LatencyTable(
        space={"name": space.name, "config": plain_config(space)},
        settings=LatencySettings(threads=1),
        machine=describe_machine(torch.device("cpu")),
        versions=describe_versions(),
        stem=spread(()),
        head=spread(()),
        layers=tuple(spread(shape) for shape in space.layer_shapes),
    )


@pytest.fixture()
def space():
    return ShuffleNetV2(**TINY)


@pytest.fixture()
def timed(space):
    invented(space).attach(space)
    return space


def _everything(space):
    return [space.architecture(genes) for genes in itertools.product(*(range(len(c)) for c in space.choices))]


@pytest.mark.parametrize("channels", [None, (0.4, 1.0, 1.6)], ids=["blocks", "blocks and widths"])
def test_latency_is_the_sum_of_the_medians(channels):
    """Block and width of a layer pick one entry; without a table there is no latency, and none is recorded."""
    space = ShuffleNetV2(**TINY, channels=channels)
    arch = space.sample(np.random.default_rng(1))
    assert space.cost(arch).latency_ms is None and set(space.cost(arch).known()) == {"macs", "params"}
    table = invented(space)
    table.attach(space)
    step = len(space.kinds)
    chosen = [arch.genes[first : first + step] for first in range(0, len(arch.genes), step)]
    parts = [int(layer.median[genes]) for layer, genes in zip(table.layers, chosen, strict=True)]
    expected = (int(table.stem.median) + int(table.head.median) + sum(parts)) / 1e6
    assert space.cost(arch).latency_ms == expected and space.cost(arch).known()["latency_ms"] == expected


def test_limits_hold_to_the_nanosecond(timed):
    """With any network's own latency as the limit that network is still counted, and none above it."""
    everything = [timed.cost(arch).latency_ms for arch in _everything(timed)]
    for limit in sorted(everything)[::8]:
        below = sum(value <= limit for value in everything)
        assert UniformSampler(timed, Constraint(latency_ms=(None, limit))).count == below
        above = sum(value >= limit for value in everything)
        assert UniformSampler(timed, Constraint(latency_ms=(limit, None))).count == above


def test_limits_hold_together_with_others_and_in_evolution(timed):
    """Latency and MACs at once, in sampling and in every candidate of evolution."""
    everything = _everything(timed)
    latency = sorted(timed.cost(arch).latency_ms for arch in everything)[100]
    macs = sorted(timed.cost(arch).macs for arch in everything)[180]
    constraint = Constraint(macs=(None, macs), latency_ms=(None, latency))
    allowed = {arch for arch in everything if constraint.allows(timed.cost(arch))}
    sampler, rng = UniformSampler(timed, constraint), np.random.default_rng(0)
    assert {sampler.sample(rng) for _ in range(2000)} == allowed
    found = evolve(timed, lambda archs: [Score(0.5, 1.0, 10) for _ in archs], population=20, generations=2,
                   crossover=5, mutation=5, top_k=5, constraint=constraint)  # fmt: skip
    assert {c.architecture for c in found.candidates} <= allowed


def test_a_space_with_too_many_sums_is_sampled_within_the_limit(monkeypatch):
    """20 layers in nanoseconds: sums are counted coarser, and the rest is rejected (a lower bound saves seconds)."""
    monkeypatch.setattr(sampling, "_MAX_PAIRS", 200_000)
    space = ShuffleNetV2()
    invented(space).attach(space)
    table = space.cost_tables["latency_ms"]
    limit = table.value(table.smallest + (table.largest - table.smallest) // 3)
    sampler = UniformSampler(space, Constraint(latency_ms=(None, limit)))
    assert sampler.count is None
    rng = np.random.default_rng(0)
    assert max(space.cost(sampler.sample(rng)).latency_ms for _ in range(50)) <= limit


def test_limits_that_cannot_be_met_are_refused(space):
    """Without a table, with a limit below everything (the message is in milliseconds), and with a wrong range."""
    with pytest.raises(InputError, match="spos-fast latency"):
        UniformSampler(space, Constraint(latency_ms=(None, 5.0)))
    with pytest.raises(InputError, match="spos-fast latency"):
        Constraint(latency_ms=(None, 5.0)).allows(space.cost(space.everywhere(0)))
    invented(space).attach(space)
    table = space.cost_tables["latency_ms"]
    least, most = table.smallest / 1e6, table.largest / 1e6
    for limits in ((None, 0.001), (None, -1.0)):
        with pytest.raises(InputError, match=rf"latency_ms: .*the space has {least:.4g} to {most:.4g}"):
            UniformSampler(space, Constraint(latency_ms=limits))
    with pytest.raises(InputError, match="latency_ms"):
        Constraint(latency_ms=(2.0, 1.0))


def test_a_file_comes_back_as_it_was(tmp_path, space):
    """Everything that was measured, and on what."""
    table = invented(space)
    table.write(tmp_path / "t.json")
    again = LatencyTable.read(tmp_path / "t.json")
    assert again.plain() == table.plain()
    again.attach(space)
    assert space.cost_tables["latency_ms"].fixed == int(table.stem.median) + int(table.head.median)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(stage_channels=(16, 48)), "stage_channels"),
        (dict(input_size=32), "input_size 8, and the space has 32"),
        (dict(channels=(0.5, 1.0)), "channels"),
    ],
)
def test_the_table_of_another_space_is_refused(space, change, says):
    """With the first size that differs; the space keeps no trace of it."""
    other = ShuffleNetV2(**{**TINY, **change})
    with pytest.raises(InputError, match=says):
        invented(space).attach(other)
    assert "latency_ms" not in other.cost_tables


def test_damaged_files_are_refused(tmp_path, space):
    """Truncated, foreign, of another version, with missing or impossible entries: named, not used."""
    path = tmp_path / "t.json"
    whole = json.loads(json.dumps(invented(space).plain()))

    def written(**changes):
        path.write_text(json.dumps({**whole, **changes}))

    def refused(says):
        with pytest.raises(CheckpointError, match=says) as caught:
            LatencyTable.read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("could not be read")
    path.write_text(json.dumps(whole)[:-40])
    refused("not JSON")
    path.write_text("[1, 2]")
    refused("not a latency table")
    written(version=99)
    refused("version 99")
    written(settings={"batch_size": 0})
    refused("damaged, batch_size")
    written(stem=[1, 2])
    refused("damaged")
    for name in ("space", "machine", "layers", "stem"):
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        refused(f"{name} is missing")
    for entry in (None, 0, -5, 1.5):
        layers = json.loads(json.dumps(whole["layers"]))
        layers[2]["median"][1] = entry
        written(layers=layers)
        refused("layer 3 has entries that are missing or no positive integers")
    layers = json.loads(json.dumps(whole["layers"]))
    layers[1]["p80"].pop()
    written(layers=layers)
    refused("layer 2 has entries that are missing")
    for layers, says in (
        ([{key: values[:3] for key, values in layer.items()} for layer in whole["layers"]], "layer 1 has entries of"),
        (whole["layers"][:3], "it has 3 layers; expected 4"),
    ):
        written(layers=layers)
        with pytest.raises(InputError, match=says):
            LatencyTable.read(path).attach(space)


def test_another_machine_is_said(space):
    """A warning that names what differs; none where nothing does."""
    table = invented(space)
    heard = []
    table.attach(space, heard.append)
    assert heard == []
    table.machine["device"], table.versions["torch"] = "a phone", "1.0"
    table.attach(space, heard.append)
    assert len(heard) == 2 and "'a phone'" in heard[0] and "PyTorch '1.0'" in heard[1]
    table.versions.update(describe_versions())
    with pytest.warns(UserWarning, match="a phone"):
        table.attach(space)


@pytest.mark.parametrize(
    "wrong",
    [dict(batch_size=0), dict(rounds=0), dict(warmup=-1), dict(threads=-1), dict(dtype="int8"), dict(rounds=1.5)],
)
def test_settings_that_measure_nothing_are_refused(wrong):
    """The name of the setting is in the message."""
    with pytest.raises(InputError, match=next(iter(wrong))):
        LatencySettings(**wrong)
