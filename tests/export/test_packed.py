"""Packed checkpoints: as small as the bits, the same bits out, and nothing but what was written in."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from spos_fast import CheckpointError, InputError
from spos_fast.checkpoint import load_checkpoint, save_checkpoint
from spos_fast.export import load_packed, save_packed
from spos_fast.export.codes import weight_codes
from spos_fast.export.packed import pack_bits, unpack_bits
from spos_fast.nn import QuantConv2d
from spos_fast.spaces import QuantResNet
from tests.export.networks import Mixed, settled

ALL_BITS = range(1, 9)
LOW, HIGH = ((1, 3), (2, 2), (3, 4), (4, 1)), ((7, 5), (5, 8), (6, 6), (8, 7))


@pytest.fixture(scope="module")
def images():
    """A batch."""
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bits_stand_one_behind_the_other(bits):
    """Every code comes back; k bits of each and not one more; the lowest bit of the first code is that of the first
    byte, which files depend on."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, 1001)
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-1001 * bits // 8)
    assert (unpack_bits(packed, bits, 1001) == codes).all()
    number = sum(int(code) << (bits * position) for position, code in enumerate(codes))
    assert int.from_bytes(packed.tobytes(), "little") == number


@pytest.mark.parametrize("quantizers", [("dorefa", "pact"), ("dorefa", "lsq"), ("lsq", "lsq+")], ids="-".join)
@pytest.mark.parametrize("bits", [LOW, HIGH], ids=["1-4", "5-8"])
def test_a_loaded_network_gives_the_same_bits(tmp_path, images, quantizers, bits):
    """All weight bit-widths, per tensor and per channel, in evaluation; a loaded one can be saved again as the same."""
    torch.manual_seed(0)
    net = settled(Mixed(bits, *quantizers), images)
    save_packed(net, tmp_path / "net.pt")
    torch.manual_seed(5)
    loaded = load_packed(tmp_path / "net.pt", Mixed(bits, *quantizers).eval())
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))
    save_packed(loaded, tmp_path / "again.pt")
    assert load_checkpoint(tmp_path / "again.pt")["digest"] == load_checkpoint(tmp_path / "net.pt")["digest"]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("quantizer", ["dorefa", "lsq"])
def test_codes_of_odd_weights(tmp_path, quantizer, per_channel):
    """Weights that are all zero (DoReFa gives them all the code beside the middle), channels that are, one far outlier,
    codes on the border: what was quantized is what comes back."""
    torch.manual_seed(0)
    for bits in range(2, 9):
        layers = [QuantConv2d(4, 6, 3, weight_bits=bits, weight_quantizer=quantizer, per_channel=per_channel)]
        layers += [QuantConv2d.from_float(layers[0], weight_bits=bits, weight_quantizer=quantizer) for _ in range(2)]
        for layer in layers[1:]:
            layer.weight = nn.Parameter(layer.weight.detach().clone())
        with torch.no_grad():
            layers[0].weight[2] = 0
            layers[1].weight.zero_()
            layers[2].weight[0, 0, 0, 0] = 30
        net = nn.Sequential(*layers)
        save_packed(net, tmp_path / "net.pt")
        other = [
            QuantConv2d(4, 6, 3, weight_bits=bits, weight_quantizer=quantizer, per_channel=layer.per_channel)
            for layer in layers
        ]
        load_packed(tmp_path / "net.pt", nn.Sequential(*other))
        for given, made in zip(layers, other, strict=True):
            assert torch.equal(made.quantized_weight(), given.quantized_weight())
            assert torch.equal(weight_codes(made).codes, weight_codes(given).codes)


def test_size_shrinks_with_the_bits(tmp_path):
    """A network of 74,304 quantized weights: each bit less is their number less of bits, 1 to 8; the rest of the file
    is a few kilobytes."""
    sizes = []
    for bits in ALL_BITS:
        torch.manual_seed(0)
        save_packed(nn.Sequential(QuantConv2d(64, 128, 3, weight_bits=bits, bias=False)), tmp_path / "net.pt")
        sizes.append((tmp_path / "net.pt").stat().st_size)
    weights = 64 * 128 * 9
    for bits, size in zip(ALL_BITS, sizes, strict=True):
        assert weights * bits / 8 <= size < weights * bits / 8 + 5000
    assert sizes == sorted(sizes)


def test_a_space_builds_what_it_loads(tmp_path, images):
    """A searched network comes back from the file and the space alone, in its memory format; not from another space."""
    space = QuantResNet(18, input_size=8, num_classes=7, stem="cifar", stage_channels=(8, 16), stage_repeats=(1, 1))
    torch.manual_seed(0)
    arch = space.architecture([0, 2, 4, 0])
    net = settled(space.supernet().to(memory_format=torch.channels_last).extract(arch), images)
    save_packed(net, tmp_path / "net.pt", architecture=arch)
    loaded = load_packed(tmp_path / "net.pt", space)
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))
    assert not loaded.training and not loaded.first_conv[0].weight.is_contiguous()
    deep = QuantResNet(34, input_size=8, num_classes=7, stem="cifar", stage_channels=(8, 16), stage_repeats=(1, 1))
    wide = QuantResNet(18, input_size=8, num_classes=7, stem="cifar", stage_channels=(8, 24), stage_repeats=(1, 1))
    for other, says in ((deep, "is of space 'quant_resnet18', not 'quant_resnet34'"), (wide, "is of another network")):
        with pytest.raises(CheckpointError, match=says):
            load_packed(tmp_path / "net.pt", other)
    save_packed(net, tmp_path / "net.pt")
    with pytest.raises(InputError, match="holds no architecture"):
        load_packed(tmp_path / "net.pt", space)


def test_other_networks_are_named_and_stay_as_they_were(tmp_path, images):
    """Other bits, quantizers, sizes, layers: one line with the layer's name, nothing loaded."""
    torch.manual_seed(0)
    save_packed(settled(Mixed(HIGH, "dorefa", "pact"), images), tmp_path / "net.pt")
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    others = [
        (Mixed(LOW, "dorefa", "pact"), r"depthwise has bits 6, not 3"),
        (Mixed(HIGH, "lsq", "pact"), r"depthwise has quantizer dorefa, not lsq"),
        (Mixed(HIGH, "dorefa", "lsq+"), r"act\.offset differs"),
        (plain, "quantized in one of them only"),
    ]
    for other, says in others:
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=says):
            load_packed(tmp_path / "net.pt", other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        assert before.keys() == other.state_dict().keys()


def test_what_cannot_be_packed_is_refused(tmp_path):
    """One line, and no file: nothing quantized, several bit-widths, NaN, other types, a single bit without a size."""
    broken, empty = QuantConv2d(3, 4, 1, weight_bits=8), QuantConv2d(3, 4, 1, weight_bits=1)
    with torch.no_grad():
        broken.weight[0, 0, 0, 0] = torch.nan
        empty.weight.zero_()
    for layer, says in (
        (nn.Conv2d(3, 4, 1), "network: has no quantized convolutions"),
        (QuantConv2d(3, 4, 1, weight_bits=[2, 4]), "0: can have 2, 4 weight bits"),
        (broken, "0: quantized weights are NaN or infinite"),
        (QuantConv2d(3, 4, 1).half(), r"0: weights are torch\.float16"),
        (empty, "0: weights of 1 bit have a mean magnitude below"),
    ):
        with pytest.raises(InputError, match=says):
            save_packed(nn.Sequential(layer), tmp_path / "net.pt")
    assert not any(tmp_path.iterdir())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    """Cut short, a byte changed anywhere, an ordinary checkpoint, another program's file, one with code in it."""
    path = tmp_path / "net.pt"
    net = nn.Sequential(QuantConv2d(4, 8, 3, weight_bits=3))
    save_packed(net, path)
    whole, before = path.read_bytes(), net[0].weight.detach().clone()

    def refused(says="net.pt: "):
        with pytest.raises(CheckpointError, match=says):
            load_packed(path, net)
        assert torch.equal(net[0].weight, before)

    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("truncated or not a checkpoint")
    content = load_checkpoint(path) if path.write_bytes(whole) else {}
    at = whole.index(content["packed"]["0"]["codes"].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused("damaged|truncated")
    path.unlink()
    refused("there is no such checkpoint")
    path.write_text(json.dumps({"kind": "packed_network"}))
    refused("truncated or not a checkpoint")
    save_checkpoint(path, {"model": net.state_dict()})
    refused("is no packed network")
    save_checkpoint(path, {"kind": "packed_network", "model": 3})
    refused("damaged")
    torch.save(nn.ReLU(), path)
    refused("truncated or not a checkpoint")
