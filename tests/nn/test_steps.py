"""What was not sampled of the quantizers' steps does not move, whatever the optimizer."""

import copy

import pytest
import torch
from torch import nn

from spos_fast import UniformSampler, train
from spos_fast.data import load
from spos_fast.nn import QuantAct, QuantConv2d, hold_unsampled
from spos_fast.nn.steps import step_entries, step_vectors
from spos_fast.spaces import QuantResNet
from spos_fast.training import TrainConfig, _optimizer

BITS = (1, 2, 4)


def _net(per_channel=False):
    torch.manual_seed(0)
    settings = dict(weight_bits=BITS, act_bits=BITS, weight_quantizer="lsq", act_quantizer="lsq+")
    return nn.Sequential(
        QuantConv2d(3, 6, 3, per_channel=per_channel, **settings),
        QuantConv2d(6, 4, 1, per_channel=per_channel, **settings),
    )


def _forward(net, weight_index, act_index):
    x = torch.rand(2, 3, 5, 5)
    for layer in net:
        x = layer(x, weight_index, act_index)
    return x.square().mean()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unsampled_entries_do_not_move(name, per_channel):
    """20 steps with random bits: what a step did not sample keeps its bits and the bits of its momentum, even after it
    was sampled and has momentum; the sampled entry moves as it would alone.
    """
    net = _net(per_channel)
    optimizer = OPTIMIZERS[name](net.parameters())
    hold_unsampled(optimizer, net)
    generator = torch.Generator().manual_seed(1)
    moved = 0
    for _ in range(20):
        weight_index, act_index = torch.randint(len(BITS), (2,), generator=generator).tolist()
        before = copy.deepcopy({n: (p.detach(), dict(optimizer.state.get(p, {}))) for n, p, _ in step_vectors(net)})
        optimizer.zero_grad(set_to_none=True)
        _forward(net, weight_index, act_index).backward()
        optimizer.step()
        for key, vector, of_weights in step_vectors(net):
            chosen = weight_index if of_weights else act_index
            value, state = before[key]
            for entry in range(len(BITS)):
                if entry != chosen:
                    assert torch.equal(vector[entry], value[entry]), key
                    for kind, now in optimizer.state[vector].items():
                        if kind != "step":
                            was = state[kind][entry] if kind in state else torch.zeros_like(now[entry])
                            assert torch.equal(now[entry], was), (key, kind)
            moved += not torch.equal(vector[chosen], value[chosen])
    assert moved > 20 * 4


def test_sampled_entries_and_weights_move_as_without(tmp_path):
    """With one bit-width sampled all along, the hooks change nothing."""
    nets = []
    for hold in (False, True):
        net = _net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if hold:
            hold_unsampled(optimizer, net)
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=True)
            _forward(net, 1, 2).backward()
            optimizer.step()
        nets.append(net)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_vectors_off_the_path_stay_without_a_state():
    """A layer that did not run has no gradient; nothing is made for it."""
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    hold_unsampled(optimizer, net)
    net[0](torch.rand(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    assert {p in optimizer.state for p in net[0].parameters()} == {True}
    assert {p in optimizer.state for p in net[1].parameters()} == {False}


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_steps_do_not_decay(per_channel):
    """Not those that are matrices either."""
    net = _net(per_channel)
    decaying, others = _optimizer(net, TrainConfig(weight_decay=0.5)).param_groups
    vectors = {vector for _, vector, _ in step_vectors(net)}
    assert vectors and vectors <= set(others["params"]) and not vectors & set(decaying["params"])
    assert others["weight_decay"] == 0 and len(decaying["params"]) == 2


def test_names_and_entries():
    """Names are those of the state dict; shared layers count once."""
    net = _net()
    assert step_entries(net, 1, 2) == {
        f"{layer}.{name}": entry
        for layer in (0, 1)
        for name, entry in (("weight_step", 1), ("act.step", 2), ("act.offset", 2))
    }
    assert set(step_entries(net, 0, 0)) <= set(net.state_dict())
    shared = nn.ModuleList([net, nn.Sequential(net[0])])
    assert len(list(step_vectors(shared))) == 6
    assert [name for name, *_ in step_vectors(QuantAct(BITS))] == ["step"]


def test_the_trainer_holds_what_it_does_not_sample():
    """Entries that a path has moved stay bitwise as they are while others are drawn, momentum or not."""
    space = QuantResNet(18, input_size=8, in_channels=1, num_classes=10, stem="cifar", stage_channels=(8,),
                        stage_repeats=(1,), bits=((2, 2), (4, 4)), uniform_bits=())  # fmt: skip
    torch.manual_seed(0)
    net, seen = space.supernet(), []

    class First(UniformSampler):
        """Two bits for three steps, then four."""

        def at(self, seed, step):
            return space.everywhere(0 if step < 3 else 1, 1)

    def look(metrics):
        seen.append({name: vector.detach().clone() for name, vector, _ in step_vectors(net)})

    config = TrainConfig(steps=6, batch_size=16, log_every=1)
    train(net, load("digits"), config, sampler=First(space), on_metrics=look)
    for name, vector in seen[2].items():
        assert torch.equal(vector[0], seen[5][name][0]), name
        assert torch.equal(vector[1], seen[0][name][1]), name
    assert any(not torch.equal(seen[0][name][0], seen[2][name][0]) for name in seen[0])
    assert any(not torch.equal(seen[2][name][1], seen[5][name][1]) for name in seen[0])
