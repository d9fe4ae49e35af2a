"""The cases are what they say: all contenders compute the same, counts of bytes and flops are right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import registry
from bench.cases import blocks, residual, supernet, units
from bench.environment import ROOT
from bench.registry import OURS, disagreement
from spos_fast.spaces import ShuffleNetV2

CPU = torch.device("cpu")


def test_cases_have_unique_names_and_tests():
    """Every case of both devices names peers, and tests that exist; ours is there or the case says that it is not."""
    for device in ("cpu", "cuda"):
        found = registry.cases(device)
        assert {"bn_moments", "shuffle_unit forward+backward", "supernet step", "scoring candidates"} <= {
            case.op for case in found
        }
        for case in found:
            assert len(case.contenders) >= 2 or OURS not in case.contenders or "takes minutes" in case.note, case.name
            assert case.device == device
            for test in case.tests:
                assert (ROOT / test.partition("::")[0]).exists(), test
            assert bool(case.tests) == (OURS in case.contenders), case.name


@pytest.mark.parametrize("choice", units.CHOICES)
@pytest.mark.parametrize("mode", units.MODES)
@pytest.mark.parametrize(("before", "channels", "stride"), [(16, 16, 1), (8, 24, 2)])
def test_unit_peers_compute_what_our_units_do(choice, mode, before, channels, stride):
    """Outputs and all gradients, every layout, both strides; compiled peers are the same functions."""
    case = units._case("cpu", "float32" if mode != "train" else "float64", 2, mode, choice, before, channels, 8, stride)
    given = case.inputs(CPU)
    outputs = {name: bind(given)() for name, bind in case.all_contenders(False).items()}
    assert len(outputs) == 4
    for name, output in outputs.items():
        assert disagreement(output, outputs[OURS]) < (1e-10 if mode == "train" else 1e-5), name
    if mode == "train":
        assert len(outputs[OURS]) == 2 + len(list(given.unit.parameters()))


def test_peers_of_the_blocks_compute_what_they_do():
    """Every contender of a building block gives the same, gradients too."""
    for case in [*blocks.cases("cpu"), *residual.cases("cpu")]:
        given = case.inputs(CPU)
        outputs = {name: bind(given)() for name, bind in case.all_contenders(False).items()}
        for name, output in outputs.items():
            assert disagreement(output, outputs[OURS]) < 1e-5, (case.name, name)


def test_supernet_peers_compute_what_our_supernet_does():
    """Losses of three successive steps agree: forward, gradients and the optimiser's steps are the same.

    In double: at initial weights the gradients amplify rounding some 100,000 times.
    """
    case = supernet._step("cpu", 64, 8, "float64")
    given = case.inputs(CPU)
    losses = {}
    for name, bind in case.all_contenders(False).items():
        run = bind(given)
        losses[name] = torch.stack([run()[0] for _ in range(3)])
    assert losses[OURS][2] < losses[OURS][0]
    for name, values in losses.items():
        torch.testing.assert_close(values, losses[OURS], rtol=1e-9, atol=0, msg=name)


def test_published_scoring_is_the_published_procedure():
    """Statistics after the peer ran are those of batch norm with momentum 0.1 from a reset, dropout on."""
    sizes = supernet.ScoringSizes(2, 2, 8, 10)
    case = supernet._scoring("cpu", 32, sizes, "float32")
    given = case.inputs(CPU)
    scores = {name: bind(given)() for name, bind in case.all_contenders(False).items()}
    assert all(len(values) == 2 and all(0 <= value <= 1 for value in values) for values in scores.values())
    assert case.items == 2 * (2 * 8 + 10)
    # The stem comes first: its statistics do not depend on the path or on dropout.
    layer = supernet.shufflenet.layer(
        supernet.layered(given.net.state_dict(keep_vars=True), torch.contiguous_format, False),
        "first_conv.0",
        "first_conv.1",
    )
    mean, var = torch.zeros(16), torch.ones(16)
    for part in given.calibration.pixels.split(8):
        out = torch.nn.functional.conv2d(supernet.NORMALIZATION(part), layer.weight, None, 2, 1)
        mean = 0.9 * mean + 0.1 * out.mean((0, 2, 3))
        var = 0.9 * var + 0.1 * out.var((0, 2, 3))
    state = supernet.layered(given.net.state_dict(keep_vars=True), torch.contiguous_format, False)
    path = supernet.shufflenet.network_layers(state, supernet.prefixes(given.archs[0].genes), supernet.STRIDES)
    calibration = [supernet.NORMALIZATION(part) for part in given.calibration.pixels.split(8)]
    supernet.published_scores(
        lambda images, path, training: supernet.shufflenet.network(
            images, path, training, supernet.shufflenet.split_by_reshape
        ),
        state,
        [path],
        calibration,
        [(calibration[0], torch.zeros(8, dtype=torch.int64))],
    )
    torch.testing.assert_close(path.stem.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.stem.var, var, rtol=1e-4, atol=1e-5)


def test_macs_are_the_spaces():
    """The units' closed form adds up to the space's cost, which other tests hold to the published table."""
    space = ShuffleNetV2()
    for genes in (supernet.PATH, (0,) * 20, (3,) * 20):
        side, before, total = 112, 16, 0
        for gene, stride, channels in zip(genes, supernet.STRIDES, supernet.CHANNELS, strict=True):
            total += units.unit_macs(units.CHOICES[gene], before, channels, side, stride)
            side, before = side // stride, channels
        assert space.cost(space.architecture(genes)).macs - total == 112 * 112 * 27 * 16 + 49 * 640 * 1024 + 1024 * 1000


def test_bytes_of_the_units_are_the_documented_floor():
    """10 A forwards, 16 A backwards, 4 A for inference at stride 1 with A = bytes of half the channels."""
    a = 4 * 32 * 32 * 56 * 56
    found = {mode: units.unit_bytes(mode, "k5", 32, 64, 64, 56, 1, 4) / a for mode in units.MODES}
    assert found == {"train": 26.0, "forward": 10.0, "infer": 4.0}


def test_the_end_of_a_block_is_measured_forwards_and_backwards():
    """With both kinds of shortcut; of the backward pass all gradients are compared."""
    found = residual.cases("cpu")
    assert {(case.op, case.shape.split()[1]) for case in found} == {
        ("bn_add_relu", "identity"),
        ("bn_add_relu", "projected"),
        ("bn_add_relu forward+backward", "identity"),
    }
    for case in found:
        outputs = registry.tensors_of(case.contenders[OURS](case.inputs(CPU))())
        assert len(outputs) == (5 if "backward" in case.op else 1)
        image = outputs[0].numel() * outputs[0].element_size()
        assert case.bytes == (8 if "backward" in case.op else 3) * image


def test_outputs_hold_no_graph():
    """What a contender returns keeps no autograd graph alive: that would spoil the capture of CUDA graphs."""
    for case in registry.cases("cpu"):
        if "7x7" in case.shape or case.op.startswith("quantize"):
            given = case.inputs(CPU)
            for name, bind in case.all_contenders(False).items():
                assert all(tensor.grad_fn is None for tensor in registry.tensors_of(bind(given)())), (case.name, name)


def test_cases_of_a_gpu_name_tests_that_run_on_it():
    """CPU tests alone say nothing about CUDA kernels."""
    for case in registry.cases("cuda"):
        if OURS in case.contenders:
            assert {"tests/test_gpu.py", "tests/ops/test_every_op.py"} & set(case.tests), case.name
    for file in ("tests/test_gpu.py", "tests/ops/test_every_op.py"):
        assert "pytest.mark.gpu" in (ROOT / file).read_text()


def test_disagreement():
    """Relative 2-norm, the worst output counts; NaN, other shapes and other hashes are infinitely far."""
    x = torch.tensor([3.0, 4.0])
    assert disagreement((x, x), (x, x)) == 0
    assert disagreement((x, x * 1.1), (x, x)) == pytest.approx(0.1, rel=1e-5)
    assert disagreement(x * torch.nan, x) == float("inf")
    assert disagreement(x[:1], x) == float("inf")
    assert disagreement(["a", None], ["a", None]) == 0
    assert disagreement(["a"], ["b"]) == float("inf")


def test_two_cases_of_one_name_are_refused(monkeypatch):
    """Results are found by name."""
    twice = [dataclasses.replace(registry.cases("cpu")[0])] * 2
    monkeypatch.setattr("bench.cases.units.cases", lambda device: twice)
    with pytest.raises(ValueError, match="exist more than once"):
        registry.cases("cpu")
