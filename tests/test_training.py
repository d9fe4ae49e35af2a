"""Training follows the paper's recipe, resumes to the same bits, and stops with a clear line when it cannot go on."""

import contextlib

import pytest
import torch

from spos_fast import CheckpointError, InputError, Metrics, TrainConfig, UniformSampler, data, evaluate, train
from spos_fast.checkpoint import kept_checkpoints, load_checkpoint, save_checkpoint
from spos_fast.spaces import ShuffleNetV2
from spos_fast.training import _mix


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def _trained(space, source, steps, *, supernet=True, checkpoint=None, total=12, keep_checkpoints=0, **options):
    """A network trained for ``steps`` of ``total`` steps: a process that is killed there."""
    torch.manual_seed(0)
    net = space.supernet() if supernet else space.build(space.everywhere(0))
    sampler = UniformSampler(space) if supernet else None
    config = TrainConfig(**{"steps": total, "batch_size": 32, "log_every": 2, "checkpoint_seconds": 0, **options})
    rows = []

    def stop(metrics: Metrics):
        rows.append(metrics)
        if metrics.step > steps:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(
            net, source, config, sampler=sampler, seed=5, checkpoint=checkpoint, on_metrics=stop,
            keep_checkpoints=keep_checkpoints,
        )  # fmt: skip
    return net, rows


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("supernet", [True, False])
@pytest.mark.parametrize("options", [{}, {"amp": "bf16", "clip_norm": 1.0, "channels_last": True}, {"amp": "fp16"}])
def test_resuming_gives_the_same_bits(tiny_space, digits, tmp_path, supernet, options):
    """Stopped after 4 and after 10 of 12 steps: weights, statistics and metrics equal an uninterrupted run's."""
    whole, rows = _trained(tiny_space, digits, 12, supernet=supernet, **options)
    path = tmp_path / "checkpoint.pt"
    parts = []
    for steps in (4, 10, 12):
        net, some = _trained(tiny_space, digits, steps, supernet=supernet, checkpoint=path, **options)
        parts += [row for row in some if row.step <= steps]
    assert _equal(whole, net)
    seen = {row.step: (row.loss, row.accuracy, row.lr) for row in parts}
    assert seen == {row.step: (row.loss, row.accuracy, row.lr) for row in rows}
    again, none = _trained(tiny_space, digits, 12, supernet=supernet, checkpoint=path, **options)
    assert _equal(whole, again) and not none


def test_states_on_the_way_are_those_of_shorter_runs(tiny_space, digits, tmp_path):
    """Three states of 12 steps, at 3, 6 and 9 or the row of metrics behind, resumed or not; training is the same."""
    whole, _ = _trained(tiny_space, digits, 12)
    path = tmp_path / "one" / "checkpoint.pt"
    for steps in (4, 12):
        kept, _ = _trained(tiny_space, digits, steps, checkpoint=path, keep_checkpoints=3)
    assert _equal(whole, kept) and list(kept_checkpoints(path)) == [4, 6, 10]
    for step, file in kept_checkpoints(path).items():
        expected = tmp_path / f"{step}" / "checkpoint.pt"
        _trained(tiny_space, digits, step, checkpoint=expected)
        found, shorter = load_checkpoint(file), load_checkpoint(expected)
        assert found["step"] == shorter["step"] == step
        assert all(torch.equal(found["model"][name], value) for name, value in shorter["model"].items())
    with pytest.raises(CheckpointError, match="optimizer is missing"):
        _trained(tiny_space, digits, 12, checkpoint=file)


def test_a_state_is_kept_before_the_checkpoint_behind_it(tiny_space, digits, tmp_path, monkeypatch):
    """Killed between the two writes, the run comes to that step again: no state is ever lacking."""
    written = []
    monkeypatch.setattr("spos_fast.training.save_checkpoint", lambda path, content: written.append(path.name))
    _trained(tiny_space, digits, 12, checkpoint=tmp_path / "checkpoint.pt", keep_checkpoints=1)
    at = written.index("checkpoint_at_000000006.pt")
    assert written[at - 1 : at + 2] == ["checkpoint.pt", "checkpoint_at_000000006.pt", "checkpoint.pt"]
    assert len(written) == 7


def test_learning_rate_falls_linearly_to_zero(tiny_space, digits):
    """lr, then lr x (1 - step / steps) per step."""
    _, rows = _trained(tiny_space, digits, 12, lr=0.4, log_every=1)
    assert [row.lr for row in rows] == pytest.approx([0.4 * (1 - s / 12) for s in range(12)])
    assert [row.step for row in rows] == list(range(1, 13))


def test_learning_rate_falls_as_a_cosine(tiny_space, digits):
    """From lr to lr_end along half a cosine; linearly to lr_end too."""
    _, rows = _trained(tiny_space, digits, 12, lr=0.4, lr_end=0.1, schedule="cosine", log_every=1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=0.4), 12, eta_min=0.1)
    for row in rows:
        assert row.lr == pytest.approx(cosine.get_last_lr()[0])
        cosine.optimizer.step(), cosine.step()
    config = TrainConfig(steps=4, lr=0.4, lr_end=0.2)
    assert [config.lr_at(step) for step in range(4)] == pytest.approx([0.4, 0.35, 0.3, 0.25])
    for wrong in (dict(schedule="step"), dict(lr_end=-0.1), dict(nesterov=True, momentum=0.0)):
        with pytest.raises(InputError, match=next(iter(wrong))):
            TrainConfig(**wrong)


def test_nesterov_looks_ahead(tiny_space, digits):
    """Its first step is 1 + momentum times as long as that of plain momentum."""
    options = dict(total=1, weight_decay=0.0)
    ahead, _ = _trained(tiny_space, digits, 1, lr=0.1, nesterov=True, **options)
    plain, _ = _trained(tiny_space, digits, 1, lr=0.1 * 1.9, **options)
    for one, other in zip(ahead.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(tiny_space, digits, tmp_path):
    """Written without schedule and nesterov: it resumes as it was, and is refused with anything but their defaults."""
    path = tmp_path / "checkpoint.pt"
    _trained(tiny_space, digits, 4, checkpoint=path)
    content = load_checkpoint(path)
    for name in ("schedule", "lr_end", "nesterov"):
        del content["identity"][name]
    save_checkpoint(path, content)
    with pytest.raises(CheckpointError, match="schedule = 'linear'"):
        _trained(tiny_space, digits, 12, checkpoint=path, schedule="cosine")
    net, _ = _trained(tiny_space, digits, 12, checkpoint=path)
    assert _equal(net, _trained(tiny_space, digits, 12)[0])


def test_one_step_is_sgd_with_label_smoothing(tiny_space, digits):
    """Against PyTorch's own pieces put together by hand, weight decay on weights only."""
    torch.manual_seed(0)
    expected = tiny_space.build(tiny_space.everywhere(2)).train()
    torch.manual_seed(0)
    net = tiny_space.build(tiny_space.everywhere(2))
    config = TrainConfig(steps=1, batch_size=32, lr=0.2, weight_decay=0.1, label_smoothing=0.1)
    train(net, digits, config, seed=5)
    images, labels = next(digits.train_stream(32, seed=5))
    torch.manual_seed(_mix(5, 0, 0))
    loss = torch.nn.functional.cross_entropy(expected(images), labels, label_smoothing=0.1)
    loss.backward()
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.2 * (p.grad + (0.1 * p if p.dim() > 1 else 0))
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_training_learns_and_a_supernet_path_beats_chance(tiny_space, digits):
    """A hundred steps are enough for digits to come out far above the 10 percent of chance."""
    torch.manual_seed(0)
    network = tiny_space.build(tiny_space.everywhere(1))
    train(network, digits, TrainConfig(steps=100, batch_size=64), full=True)
    assert evaluate(network, digits.test_batches(100)).accuracy > 0.5


def test_a_checkpoint_of_something_else_is_refused(tiny_space, digits, tmp_path):
    """Truncated, foreign, of another seed or of another network: one line that names the file."""
    path = tmp_path / "checkpoint.pt"
    _trained(tiny_space, digits, 12, checkpoint=path)
    content = path.read_bytes()
    config = TrainConfig(steps=20, batch_size=32)
    net = tiny_space.supernet()
    sampler = UniformSampler(tiny_space)
    with pytest.raises(CheckpointError, match="steps = 12"):
        train(net, digits, config, sampler=sampler, seed=5, checkpoint=path)
    config = TrainConfig(steps=12, batch_size=32)
    with pytest.raises(CheckpointError, match="seed = 5"):
        train(net, digits, config, sampler=sampler, seed=6, checkpoint=path)
    with pytest.raises(CheckpointError, match="another network"):
        train(tiny_space.build(tiny_space.everywhere(0)), digits, config, seed=5, checkpoint=path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: truncated"):
        train(net, digits, config, sampler=sampler, seed=5, checkpoint=path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of spos_fast"):
        train(net, digits, config, sampler=sampler, seed=5, checkpoint=path)


def test_a_checkpoint_of_another_space_is_refused(tiny_space, digits, tmp_path):
    """Both spaces are named by what differs, also where the weights would fit; a checkpoint that does not know its
    space is resumed from as before."""
    path = tmp_path / "checkpoint.pt"
    whole, _ = _trained(tiny_space, digits, 12, checkpoint=path)
    fitting = ShuffleNetV2(**tiny_space.config() | {"stage_strides": (1, 1)})
    said = (
        r"checkpoint\.pt: was trained in the space shufflenet_v2 \(stage_strides=\(1, 2\)\), "
        r"not shufflenet_v2 \(stage_strides=\(1, 1\)\)"
    )
    with pytest.raises(CheckpointError, match=said):
        _trained(fitting, digits, 12, checkpoint=path)
    wider = ShuffleNetV2(**tiny_space.config() | {"channels": (0.5, 1.0)})
    with pytest.raises(CheckpointError, match=r"\(channels=None\), not shufflenet_v2\+widths \(channels=\(0.5, 1.0\)"):
        _trained(wider, digits, 12, checkpoint=path)
    old = load_checkpoint(path)
    del old["space"]
    save_checkpoint(path, old)
    again, rows = _trained(tiny_space, digits, 12, checkpoint=path)
    assert _equal(whole, again) and not rows


def test_divergence_is_an_error(tiny_space, digits):
    """A loss that is not finite ends training with the settings to change, instead of days of NaN."""
    with pytest.raises(InputError, match=r"diverged.*lr"):
        _trained(tiny_space, digits, 12, supernet=False, lr=1e30, total=12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(steps=0), "steps"),
        (dict(batch_size=-1), "batch_size"),
        (dict(lr=-1.0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(label_smoothing=1.0), "label_smoothing"),
        (dict(amp="int8"), "amp"),
        (dict(log_every=0), "log_every"),
    ],
)
def test_settings_out_of_range_are_refused(options, says):
    """Named, with the value."""
    with pytest.raises(InputError, match=says):
        TrainConfig(**options)


def test_a_network_for_other_classes_is_refused(digits):
    """A classifier of another size than the data."""
    space = ShuffleNetV2(input_size=8, in_channels=1, num_classes=5, stem_stride=1, stage_channels=(32,),
                         stage_repeats=(1,), stage_strides=(2,), head_channels=16)  # fmt: skip
    network = space.build(space.everywhere(0))
    with pytest.raises(InputError, match=r"5 logits.*10 classes"):
        train(network, digits, TrainConfig(steps=1))
    with pytest.raises(InputError, match="5 logits"):
        evaluate(network, digits.test_batches(100))


def test_a_supernet_needs_a_sampler(tiny_space, digits):
    """And a plain network takes none."""
    for net, sampler in (
        (tiny_space.supernet(), None),
        (tiny_space.build(tiny_space.everywhere(0)), UniformSampler(tiny_space)),
    ):
        with pytest.raises(InputError, match="sampler"):
            train(net, digits, TrainConfig(steps=1), sampler=sampler)
