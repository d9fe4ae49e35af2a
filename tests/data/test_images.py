import pytest
import torch

from spos_fast.data import Images, Normalization
from spos_fast.errors import InputError

RGB = Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def pixels_of(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_normalization_is_the_formula() -> None:
    """Protects the numbers a network sees: (x / 255 - mean) / std per channel, in float32."""
    pixels = pixels_of(6)
    mean, std = torch.tensor(RGB.mean).view(1, 3, 1, 1), torch.tensor(RGB.std).view(1, 3, 1, 1)
    expected = (pixels.double() / 255 - mean) / std
    result = RGB(pixels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)


def test_published_normalization_is_bgr_and_exact() -> None:
    """Protects the published checkpoints: they want BGR in 0..255, nothing subtracted, so the values are exact."""
    published = Normalization(mean=(0.0,) * 3, std=(1.0,) * 3, bgr=True, scale=1.0)
    pixels = pixels_of(3)
    assert torch.equal(published(pixels), pixels[:, [2, 1, 0]].float())


@pytest.mark.parametrize("bgr", [False, True])
def test_normalization_keeps_memory_format(bgr: bool) -> None:
    """Protects channels-last training from a silent copy back to NCHW, and the caller's pixels from being changed."""
    pixels = pixels_of(4).to(memory_format=torch.channels_last)
    before = pixels.clone()
    norm = Normalization(mean=RGB.mean, std=RGB.std, bgr=bgr)
    result = norm(pixels)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, norm(before.contiguous()))
    assert torch.equal(pixels, before)


def test_normalized_bits_do_not_depend_on_the_batch() -> None:
    """Protects rank slices and smaller batches from last-bit differences (vector body against scalar tail)."""
    pixels = pixels_of(37)
    whole = RGB(pixels)
    assert all(torch.equal(RGB(pixels[i : i + 1]), whole[i : i + 1]) for i in range(37))


def test_normalization_after_inference_mode_still_trains() -> None:
    """Protects training from constants that were first made, and cached, under inference mode."""
    norm = Normalization(mean=(0.11, 0.12, 0.13), std=(0.21, 0.22, 0.23))
    with torch.inference_mode():
        norm(pixels_of(1))
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (norm(pixels_of(1)) * weight).sum().backward()
    assert weight.grad is not None


def test_batches_go_through_all_images_in_order() -> None:
    """Protects calibration and scoring: every image once, in order, the last batch smaller."""
    images = Images(pixels_of(7), torch.arange(7), RGB)
    batches = list(images.batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(7))
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), RGB(images.pixels))
    assert len(images) == len(images.to("cpu")) == 7


def test_wrong_tensors_are_refused() -> None:
    """Protects against float pixels, foreign shapes and label mismatches: one line that says what is right."""
    with pytest.raises(InputError, match=r"uint8 \[N, C, H, W\]"):
        Images(pixels_of(2).float(), torch.arange(2), RGB)
    with pytest.raises(InputError, match=r"int64 \[2\]"):
        Images(pixels_of(2), torch.arange(3), RGB)
    with pytest.raises(InputError, match=r"uint8 \[N, 3, H, W\]"):
        RGB(pixels_of(2)[:, :1])
    with pytest.raises(InputError, match="batch_size is 0"):
        Images(pixels_of(2), torch.arange(2), RGB).batches(0)
    with pytest.raises(InputError, match="one value a channel"):
        Normalization(mean=(0.5,), std=(0.1, 0.2))
    with pytest.raises(InputError, match="above zero"):
        Normalization(mean=(0.5,), std=(0.0,))
    with pytest.raises(InputError, match="3 channels"):
        Normalization(mean=(0.5,), std=(1.0,), bgr=True)
