"""The layers above the ops on a GPU: the same numbers as on the CPU, within the dtype."""

from __future__ import annotations

import pytest
import torch

from spos_fast import Evaluator, TrainConfig, UniformSampler, data, train

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32 off: the CPU has none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_supernet_gradients_equal_the_cpus(tiny_space, memory_format):
    """One path, forwards and backwards."""
    torch.manual_seed(0)
    supernet = tiny_space.supernet()
    images = torch.randn(8, 1, 8, 8)
    arch = tiny_space.architecture((0, 1, 2, 3))
    logits = supernet(images, arch)
    logits.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    supernet.to("cuda", memory_format=memory_format)
    got = supernet(images.to("cuda").contiguous(memory_format=memory_format), arch)
    got.square().mean().backward()
    torch.testing.assert_close(got.cpu(), logits, rtol=1e-3, atol=1e-4)
    found = {name: p.grad.cpu() for name, p in supernet.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=1e-3 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_and_scoring_on_the_gpu(tiny_space, amp):
    """A short training learns in every precision; a candidate's score is the same every time."""
    digits = data.load("digits")
    supernet = tiny_space.supernet().to("cuda")
    config = TrainConfig(steps=150, amp=amp, channels_last=True)
    train(supernet, digits, config, sampler=UniformSampler(tiny_space))
    evaluator = Evaluator(supernet, digits.calibration(256, seed=0).to("cuda"), digits.validation().to("cuda"))
    arch = tiny_space.architecture((0, 1, 2, 3))
    first, second = evaluator([arch, arch])
    assert first.accuracy == second.accuracy > 0.5
    assert all(p.isfinite().all() for p in supernet.parameters())
