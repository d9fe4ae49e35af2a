"""The layers above the ops on a GPU: the same numbers as on the CPU, within the dtype."""

from __future__ import annotations

import copy

import pytest
import torch

from spos_fast import Evaluator, TrainConfig, UniformSampler, data, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU as a rehearsal; a GPU where there is one, with TF32 off, as the CPU has none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_supernet_gradients_equal_the_cpus(tiny_space, device, memory_format):
    """One path, forwards and backwards, against the same in double on the CPU: twice the error of float32 there."""
    torch.manual_seed(0)
    images, arch = torch.randn(32, 1, 8, 8), tiny_space.architecture((0, 1, 2, 3))
    supernet = tiny_space.supernet()

    def gradients(net, images):
        logits = net(images, arch)
        logits.square().mean().backward()
        found = {name: p.grad.double().cpu() for name, p in net.named_parameters() if p.grad is not None}
        return found | {"logits": logits.detach().double().cpu()}

    exact = gradients(copy.deepcopy(supernet).double(), images.double())
    cpu = gradients(copy.deepcopy(supernet), images)
    there = copy.deepcopy(supernet).to(device, memory_format=memory_format)
    got = gradients(there, images.to(device).contiguous(memory_format=memory_format))
    assert got.keys() == exact.keys()
    for name, wanted in exact.items():
        allowed = max(2 * float((cpu[name] - wanted).norm() / wanted.norm()), 1e-3)
        assert float((got[name] - wanted).norm() / wanted.norm()) <= allowed, name


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_and_scoring(tiny_space, device, amp):
    """A short training learns in every precision; a candidate's score is the same every time."""
    if device == "cpu" and amp == "fp16":
        pytest.skip("half precision on the CPU is tried in test_training.py")
    torch.manual_seed(0)
    digits = data.load("digits")
    supernet = tiny_space.supernet().to(device)
    config = TrainConfig(steps=300, amp=amp, channels_last=True)
    train(supernet, digits, config, sampler=UniformSampler(tiny_space))
    evaluator = Evaluator(supernet, digits.calibration(256, seed=0).to(device), digits.validation().to(device))
    arch = tiny_space.architecture((0, 1, 2, 3))
    first, second = evaluator([arch, arch])
    assert first.accuracy == second.accuracy > 0.25
    assert all(p.isfinite().all() for p in supernet.parameters())
