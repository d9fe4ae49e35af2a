"""Recalibration that is interrupted changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spos_fast import recalibrate


class Interrupt(TorchDispatchMode):
    """Ctrl-C in front of the operation with that number."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_interrupted_anywhere():
    """Ctrl-C in front of any operation, also those that write results or put statistics back: nothing has changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)).train()
    before = copy.deepcopy(model.state_dict())
    batches = torch.randn(8, 3, 5, 5).split(4)
    twin = copy.deepcopy(model)
    with Interrupt(0) as operations:
        recalibrate(twin, batches)
    for at in range(1, operations.count + 1):
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            recalibrate(model, batches)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), at
        assert all(module.training for module in model.modules())
