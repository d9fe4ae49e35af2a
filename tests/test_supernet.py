"""A step touches one path and nothing else; published checkpoints load or are refused whole."""

import pytest
import torch

from spos_fast import CheckpointError
from spos_fast.training import TrainConfig, _optimizer


def _steps(net, archs, optimizer):
    for arch in archs:
        optimizer.zero_grad(set_to_none=True)
        net(torch.randn(4, 1, 8, 8), arch).square().mean().backward()
        optimizer.step()


def test_a_step_touches_only_its_path(tiny_space):
    """No decay, no momentum, no gradient memory off the path, although the others have momentum from before."""
    torch.manual_seed(0)
    net = tiny_space.supernet()
    optimizer = _optimizer(net, TrainConfig(weight_decay=0.1))
    first, second = tiny_space.everywhere(0), tiny_space.everywhere(2)
    _steps(net, [first], optimizer)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    momenta = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
    _steps(net, [second], optimizer)
    shared = {p for m in net.path(first) for p in m.parameters()} & {
        p for m in net.path(second) for p in m.parameters()
    }
    on_path = {p for module in net.path(second) for p in module.parameters()}
    assert shared and shared < on_path
    for name, p in net.named_parameters():
        if p in on_path:
            assert p.grad is not None and not torch.equal(p, weights[name])
        else:
            assert p.grad is None and torch.equal(p, weights[name])
            if p in momenta:
                assert torch.equal(optimizer.state[p]["momentum_buffer"], momenta[p])
            else:
                assert p not in optimizer.state


def test_weight_decay_acts_on_weights_only(tiny_space):
    """Scale and shift of batch normalisation do not decay."""
    network = tiny_space.build(tiny_space.everywhere(0))
    groups = _optimizer(network, TrainConfig(weight_decay=0.5)).param_groups
    assert {p.dim() > 1 for p in groups[0]["params"]} == {True} and groups[0]["weight_decay"] == 0.5
    assert {p.dim() for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


def _published(net):
    """The supernet as the published code saved it: DataParallel's prefix inside ``state_dict``."""
    return {"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}


def test_published_keys_are_ours(tiny_space):
    """The names of the published code: first_conv, features.B.C.branch_main / branch_proj, conv_last, classifier.0."""
    names = set(tiny_space.supernet().state_dict())
    assert {"first_conv.0.weight", "conv_last.0.weight", "classifier.0.weight"} <= names
    # Indices inside the branches as published: 1x1 conv 0, depthwise 3, 1x1 conv 5; Xception 0, 2, 5, 7, 10, 12.
    assert {f"features.0.0.branch_main.{i}.weight" for i in (0, 3, 5)} <= names
    assert {f"features.1.3.branch_main.{i}.weight" for i in (0, 2, 5, 7, 10, 12)} <= names
    assert {f"features.0.3.branch_proj.{i}.weight" for i in (0, 2)} <= names
    assert not any(name.startswith("features.1.0.branch_proj") for name in names)


@pytest.mark.parametrize("statistics", [True, False])
def test_load_published(tiny_space, tmp_path, statistics):
    """A checkpoint in the published form gives the same network; statistics may be missing."""
    torch.manual_seed(0)
    theirs = tiny_space.supernet().eval()
    content = _published(theirs)
    if not statistics:
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "running" not in k}
    torch.save(content, tmp_path / "checkpoint-150000.pth.tar")
    ours = tiny_space.supernet().eval()
    ours.load_published(tmp_path / "checkpoint-150000.pth.tar")
    x = torch.randn(2, 1, 8, 8)
    arch = tiny_space.architecture([0, 1, 2, 3])
    assert torch.equal(ours(x, arch), theirs(x, arch))


def test_load_published_refuses_what_does_not_fit(tiny_space, tmp_path):
    """Missing, foreign and misshapen tensors, pickled code, truncated and missing files: one line, nothing loaded."""
    net = tiny_space.supernet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    good = _published(net)["state_dict"]
    first = "module.first_conv.0.weight"
    cases = {
        "is missing": {k: v for k, v in good.items() if k != first},
        "is not of this supernet": {**good, "module.fc.weight": torch.zeros(1)},
        "another shape": {**good, first: torch.zeros(3)},
        "dictionary of tensors": {"epoch": 3},
        "not a readable": {"code": _Code()},
    }
    for says, content in cases.items():
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(CheckpointError, match=says) as caught:
            net.load_published(tmp_path / "wrong.pt")
        assert "\n" not in str(caught.value)
    torch.save(good, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:1000])
    for name in ("cut.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            net.load_published(tmp_path / name)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class _Code:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))
