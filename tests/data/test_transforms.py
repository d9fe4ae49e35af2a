import math

import numpy as np
import pytest
from PIL import Image

from spos_fast.data import transforms
from spos_fast.data.order import uniforms
from spos_fast.data.transforms import DRAWS, augmented, centered, color_jitter, crop_box

NEUTRAL = [0.5, 0.5, 0.5]  # factors of 1: no colour change


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def grey(rgb: np.ndarray) -> np.ndarray:
    """Pillow's luma (ITU-R 601-2): L = 0.299 R + 0.587 G + 0.114 B, rounded."""
    return np.floor(rgb @ np.array([0.299, 0.587, 0.114]) + 0.5)


def blend(first: np.ndarray, second: np.ndarray, factor: float) -> np.ndarray:
    """``second`` times ``factor`` plus ``first`` times the rest, cut to 0..255 and to whole numbers."""
    return np.floor(np.clip(first + factor * (second - first), 0, 255))


@pytest.mark.parametrize("order", range(6))
def test_color_jitter_is_the_formula(order: int) -> None:
    """Protects the published augmentation: brightness, contrast and saturation by hand, in each of the six orders."""
    image = picture(17, 13)
    draws = [(order + 0.5) / 6, 0.9, 0.1, 0.8]  # strengths 1.32, 0.68, 1.24
    expected = np.asarray(image).astype(float)
    for which in transforms._ORDERS[order]:
        factor = 0.6 + 0.8 * draws[1 + which]
        if which == 0:
            expected = blend(np.zeros_like(expected), expected, factor)
        elif which == 1:
            expected = blend(np.full_like(expected, np.floor(grey(expected).mean() + 0.5)), expected, factor)
        else:
            expected = blend(np.repeat(grey(expected)[..., None], 3, axis=2), expected, factor)
    result = np.asarray(color_jitter(image, draws)).astype(float)
    assert np.abs(result - expected).max() <= 2  # rounding differs by one a step at most
    assert np.abs(result - np.asarray(image)).max() > 20
    assert len(set(transforms._ORDERS)) == 6


def test_crop_boxes_follow_the_published_distribution() -> None:
    """Protects the crop: inside the image, area 0.08..1 spread evenly, ratio 3/4..4/3 log-symmetric, any place."""
    width, height = 500, 375
    boxes = np.array([crop_box(width, height, draws) for draws in uniforms(0, 0, 4000, 22)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert left.min() == 0 and top.min() == 0 and right.max() == width and bottom.max() == height
    assert w.min() > 0 and h.min() > 0
    area, ratio = w * h / (width * height), w / h
    assert 0.078 < area.min() < 0.09 and area.max() > 0.95
    assert 0.74 < ratio.min() < 0.77 and 1.31 < ratio.max() < 1.35
    assert abs(np.log(ratio[area < 0.4]).mean()) < 0.02
    small = area < 0.4
    assert abs(area[small].mean() - 0.24) < 0.01
    assert abs((left / (width - w + 1))[small].mean() - 0.5) < 0.03


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (1, 1)])
def test_extreme_shapes_get_the_central_box(size: tuple[int, int]) -> None:
    """Protects panoramas and slivers: where no random box fits, the largest central one within the ratios is taken."""
    width, height = size
    box = crop_box(width, height, [0.999, 0.5] * 10 + [0.9, 0.9])
    w, h = box[2] - box[0], box[3] - box[1]
    if width == height:
        assert box == (0, 0, 1, 1)
    else:
        assert (w, h) == ((27, 20) if width > height else (20, 27))
        assert abs(box[0] + w / 2 - width / 2) <= 1 and abs(box[1] + h / 2 - height / 2) <= 1


def test_augmented_crops_then_resizes_then_mirrors() -> None:
    """Protects the order of steps, and that pixels outside the box do not bleed into the crop's edge."""
    pixels = np.zeros((60, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 255
    image = Image.fromarray(pixels)
    area, ratio = 0.25, 4 / 3  # a 40 x 30 box
    shape = [(area - 0.08) / 0.92, math.log(ratio / 0.75) / math.log((4 / 3) / 0.75)] * 10
    dark_left_edge = [*shape, 0.0, 0.5, 0.0, *NEUTRAL]
    assert crop_box(80, 60, dark_left_edge) == (0, 15, 40, 45)
    assert np.asarray(augmented(image, 8, [*dark_left_edge, 0.9])).max() == 0
    middle = [*shape, 20.5 / 41, 0.5, 0.0, *NEUTRAL]
    plain, mirrored = (np.asarray(augmented(image, 8, [*middle, mirror])) for mirror in (0.9, 0.1))
    assert plain[:, 0].max() == 0 and plain[:, -1].min() == 255
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert len([*middle, 0.1]) == DRAWS


@pytest.mark.parametrize("size", [(300, 260), (260, 300), (256, 256), (30, 400)])
def test_centered_is_resize_then_central_crop(size: tuple[int, int]) -> None:
    """Protects the test transform: the short side to 256, then the central 224 square, on either orientation."""
    image = picture(*size, seed=3)
    scale = 256 / min(size)
    whole = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BILINEAR)
    left, top = round((whole.width - 224) / 2), round((whole.height - 224) / 2)
    expected = np.asarray(whole)[top : top + 224, left : left + 224]
    assert np.array_equal(np.asarray(centered(image, 224)), expected)
    assert centered(image, 32).size == (32, 32)
