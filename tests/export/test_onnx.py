"""ONNX files of quantized networks: valid, small, and the same results in onnxruntime."""

import pytest
import torch
from torch import nn

from spos_fast import CheckpointError, InputError
from spos_fast.export import export_onnx
from spos_fast.export.codes import act_grid
from spos_fast.nn import QuantAct, QuantConv2d, quantize_model
from spos_fast.spaces import QuantResNet, ShuffleNetV2
from tests.export.networks import Mixed, Together, border_distances, settled

MISSING = "is not installed: pip install 'spos-fast[export]' onnxruntime"
onnx = pytest.importorskip("onnx", reason=f"onnx {MISSING}")
pytest.importorskip("onnxscript", reason=f"onnxscript {MISSING}")
onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {MISSING}")

ALL_BITS = range(1, 9)


def _run(path, images):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _types(path):
    """Names of the types of the stored weight codes, by the name of the layer."""
    names = onnx.TensorProto.DataType.Name
    stored = onnx.load(path).graph.initializer
    return {
        tensor.name.partition("weights.")[0].rstrip("."): names(tensor.data_type)
        for tensor in stored
        if tensor.name.endswith("weight_codes")
    }


def _set_steps(layer, size):
    """All steps the same power of two: quotients, products and sums of small integers are exact then."""
    with torch.no_grad():
        for act in layer.modules():
            if isinstance(act, QuantAct):
                for entry, bits in zip(act.step, act.bits, strict=True):
                    entry.fill_(size * (2**bits - 1) if act.quantizer.startswith("pact") else size)
                if act.offset is not None:
                    act.offset.fill_(-1.5 * size)
            elif isinstance(act, QuantConv2d) and act.weight_step is not None:
                act.weight_step.fill_(size)
    return layer


def _quarters(step):
    """Values on borders between codes, between them, negative and beyond all codes: [2, 3, 48, 48]."""
    return (torch.arange(-6912, 6912).reshape(2, 3, 48, 48) / 4 * step).contiguous()


def test_every_quantizer_rounds_ties_and_clips_as_the_graph_does(tmp_path):
    """Activations of 1 to 8 bits, all quantizers, signed ones, a step a channel: bit for bit, ties and values far
    outside included. A 3-bit code must stop at 7 although its type goes to 15."""
    layers = [QuantAct(bits, quantizer="pact") for bits in ALL_BITS]
    layers += [QuantAct(bits, quantizer="lsq+") for bits in ALL_BITS]
    layers += [QuantAct(bits, quantizer="lsq", signed=True) for bits in ALL_BITS]
    layers += [
        QuantAct(bits, quantizer="lsq", channels=3, signed=signed) for bits in (3, 4) for signed in (False, True)
    ]
    layers += [QuantAct(2, quantizer="pact_residual"), QuantAct(1, quantizer="lsq+", signed=True)]
    net = _set_steps(Together(layers), 0.125)
    export_onnx(net, tmp_path / "acts.onnx", input_size=48)
    images = _quarters(0.125)
    expected = net(images).detach()
    assert [len(expected[bits - 1].unique()) for bits in ALL_BITS] == [2**bits for bits in ALL_BITS]
    assert torch.equal(_run(tmp_path / "acts.onnx", images), expected)


def test_convolutions_of_exact_codes_are_exact(tmp_path):
    """LSQ with steps of powers of two, 1 to 8 bits of both, per tensor and per channel, padded, strided, dilated and
    grouped: every product and sum is a float, so the graph's result is ours bit for bit."""
    torch.manual_seed(0)
    shapes = [dict(padding=1), dict(padding=2, stride=1, dilation=2), dict(padding=1, groups=3)]
    layers = []
    for bits in ALL_BITS:
        quantizers = dict(weight_quantizer="lsq", act_quantizer="lsq+", per_channel=bits % 2 == 0)
        layers.append(QuantConv2d(3, 6, 3, weight_bits=bits, act_bits=bits, **shapes[bits % 3], **quantizers))
    net = _set_steps(Together(layers), 0.125)
    with torch.no_grad():
        for layer in layers:
            layer.weight.uniform_(-6, 6)
            layer.bias.copy_(torch.arange(6))
    export_onnx(net, tmp_path / "convolutions.onnx", input_size=48)
    assert list(_types(tmp_path / "convolutions.onnx").values()) == ["INT2"] * 2 + ["INT4"] * 2 + ["INT8"] * 4
    images = _quarters(0.125)
    assert torch.equal(_run(tmp_path / "convolutions.onnx", images), net(images).detach())


def _assert_same(network, images, theirs, least):
    """Logits of a graph are the network's.

    Float rounding is all that may differ, and it may push an activation on the border between two codes to the other
    one, which is a step and no rounding. So images whose activations all keep away from borders (at least ``least``)
    must agree to rounding; the others must have the same class where it is decided by more than a step can be.
    """
    ours = network(images).detach()
    away = border_distances(network, images) > 2e-6
    assert away.sum() >= least
    scale = ours.std(0).mean()  # from image to image
    assert ((theirs - ours).abs().amax(1)[away] < 1e-5 * scale).all()
    ends = ours.topk(2).values
    decided = away | ((ends[:, 0] - ends[:, 1]) > 0.05 * scale)
    assert torch.equal(theirs.argmax(1)[decided], ours.argmax(1)[decided])


@pytest.mark.parametrize("quantizers", [("dorefa", "pact"), ("lsq", "lsq+")], ids="-".join)
def test_networks_give_our_logits(tmp_path, quantizers):
    """Whole networks with layers of 1 to 8 bits: residual blocks with both shortcuts, depthwise and strided layers."""
    torch.manual_seed(0)
    images = torch.randn(128, 3, 8, 8)
    bits = (((1, 3), (2, 2), (3, 4), (4, 1)), ((7, 5), (5, 8), (6, 6), (8, 7)))
    networks = [settled(Mixed(pairs, *quantizers), images) for pairs in bits]
    export_onnx(Together(networks), tmp_path / "net.onnx", input_size=8)
    for network, theirs in zip(networks, _run(tmp_path / "net.onnx", images), strict=True):
        _assert_same(network, images, theirs, least=40)


def test_types_and_sizes_shrink_with_the_bits(tmp_path):
    """DoReFa's odd grid too keeps to the type of its bits; half the bits are half the file, but for what is not
    quantized. Opsets before 25 have no 2-bit types and take 4."""
    sizes = {}
    for bits, opset, kind in ((1, 25, "INT2"), (2, 25, "INT2"), (2, 21, "INT4"), (4, 25, "INT4"), (8, 25, "INT8")):
        torch.manual_seed(0)
        net = QuantConv2d(64, 128, 3, weight_bits=bits, act_bits=bits).eval()
        path = tmp_path / f"{bits}_{opset}.onnx"
        export_onnx(net, path, input_size=4, in_channels=64, opset=opset)
        assert _types(path) == {"": kind}
        sizes[bits, opset] = path.stat().st_size
        images = torch.randint(0, 2**bits, (3, 64, 4, 4)) * act_grid(net.act).step  # far from borders
        torch.testing.assert_close(_run(path, images), net(images).detach(), rtol=1e-5, atol=1e-4)
    weights = 64 * 128 * 9
    for bits, opset, used in ((1, 25, 2), (2, 25, 2), (2, 21, 4), (4, 25, 4), (8, 25, 8)):
        assert weights * used / 8 < sizes[bits, opset] < weights * used / 8 + 4000


def test_networks_of_the_spaces(tmp_path):
    """A mixed-precision ResNet and a quantized ShuffleNetV2 network (with signed codes) from their supernets, and one
    without quantized layers (of channels_last, in which its units run as ops of ours), at another batch than the
    exporter saw."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    small = dict(input_size=16, num_classes=7, stem_channels=8, stage_channels=(16, 32), stage_repeats=(1, 2))
    small |= dict(stage_strides=(1, 2), head_channels=32, init="pytorch")
    resnet = QuantResNet(18, input_size=16, num_classes=7, stem="cifar", stage_channels=(8, 16), stage_repeats=(2, 1))
    shuffle = ShuffleNetV2(**small, channels=(0.5, 1.0), bits=((2, 4), (5, 6)), uniform_bits=())
    plain = ShuffleNetV2(**small)
    for space, genes, kinds in (
        (resnet, [0, 2, 4, 0, 2, 1], {"INT2", "INT4"}),
        (shuffle, [3, 0, 0, 1, 1, 0, 0, 0, 1], {"INT2", "INT8"}),
        (plain, [3, 0, 1], set()),
    ):
        net = space.supernet().to(memory_format=torch.channels_last).extract(space.architecture(genes))
        settled(net, images)
        export_onnx(net, tmp_path / "net.onnx", input_size=16)
        assert set(_types(tmp_path / "net.onnx").values()) == kinds
        _assert_same(net, images, _run(tmp_path / "net.onnx", images), least=16)


def test_models_of_ones_own(tmp_path):
    """A torch model after quantize_model: shared layers, another padding mode, several bit-widths of which calls pick
    one; the network itself, its mode included, stays as it was, and the file tells nothing of this machine."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
            self.conv3 = QuantConv2d(8, 4, 1, weight_bits=[2, 4, 8], act_bits=[3, 6])

        def forward(self, x):
            x = self.conv2(self.conv2(self.conv1(x).relu()).relu()).relu()
            return self.conv3(x, 1, 1) + self.conv3(x, 2, 0)

    torch.manual_seed(0)
    net = quantize_model(Net(), weight_bits=8, act_bits=8)
    images = torch.randn(4, 3, 8, 8)
    settled(net, images).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export_onnx(net, tmp_path / "net.onnx", input_size=8)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert _types(tmp_path / "net.onnx") == {"conv2": "INT8", "conv3": "INT8"}
    stored = [tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer if "codes" in tensor.name]
    assert sorted(stored) == ["conv2.weights.0.weight_codes", *(f"conv3.weights.{i}.weight_codes" for i in (1, 2))]
    content = (tmp_path / "net.onnx").read_bytes()
    assert b"site-packages" not in content and b"test_onnx.py" not in content
    given, expected = _run(tmp_path / "net.onnx", images), net.eval()(images).detach()
    assert (given - expected).abs().median() < 1e-6 * expected.std()


def test_mistakes_are_named_and_write_nothing(tmp_path, monkeypatch):
    """One line of what is wrong; no file, and an old one stays."""
    path = tmp_path / "net.onnx"

    def refused(network, says, error=InputError, **given):
        with pytest.raises(error, match=says) as caught:
            export_onnx(network, given.pop("path", path), **{"input_size": 8, **given})
        assert "\n" not in str(caught.value)
        assert not path.exists()

    class OnTensor(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QuantConv2d(3, 4, 1, weight_bits=[2, 4])

        def forward(self, x):
            return self.conv(x, torch.tensor(1))

    class Branching(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x

    broken = QuantConv2d(3, 4, 1)
    with torch.no_grad():
        broken.weight[0, 0, 0, 0] = torch.nan
    space = QuantResNet(18, input_size=8, num_classes=2, stem="cifar", stage_channels=(8,), stage_repeats=(1,))
    refused(space.supernet(), "network: is a supernet; extract")
    refused(nn.Sequential(broken), "0: quantized weights are NaN")
    refused(nn.Sequential(QuantConv2d(3, 4, 1).double()), r"0: weights are torch\.float64")
    refused(OnTensor(), "conv: an index of bit-widths must be an int")
    refused(Branching(), "network: PyTorch could not export it")
    refused(QuantConv2d(3, 4, 1), "opset: got 20; expected 21 to 25", opset=20)
    refused(QuantConv2d(3, 4, 1), "input_size: got 0", input_size=0)
    refused(QuantConv2d(3, 4, 1), "no regular file", CheckpointError, path=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(QuantConv2d(3, 4, 1), r"onnx and onnxscript; pip install 'spos-fast\[export\]'")
