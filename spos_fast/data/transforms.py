"""Pillow transforms of one image, as ImageNet training publishes them, with their random numbers handed in.

The rules are those of torchvision's ``RandomResizedCrop``, ``ColorJitter``, ``RandomHorizontalFlip``, ``Resize`` and
``CenterCrop`` on Pillow images (https://docs.pytorch.org/vision/stable/transforms.html); the augmentation and its
strengths are those of the published SPOS training (github.com/megvii-model/SinglePathOneShot, src/Supernet/train.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance

CROP_TRIES = 10
# Uniform numbers an image uses: two a try for the crop's shape, two for its place, one for the order of the colour
# changes, three for their strengths, one for the mirror image.
DRAWS = 2 * CROP_TRIES + 2 + 1 + 3 + 1

AREA = (0.08, 1.0)
RATIO = (3.0 / 4.0, 4.0 / 3.0)
JITTER = 0.4

_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

Box = tuple[int, int, int, int]


def crop_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """The box (left, top, right, bottom; pixels) of a random resized crop, from ``2 * CROP_TRIES + 2`` uniforms.

    A box with a share of the area uniform in ``AREA`` and an aspect ratio log-uniform in ``RATIO``, the first of
    ``CROP_TRIES`` that fits inside; else the largest central box whose ratio is within ``RATIO``.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for i in range(CROP_TRIES):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * draws[2 * i])
        ratio = math.exp(low + (high - low) * draws[2 * i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(draws[2 * CROP_TRIES] * (width - w + 1))
            top = int(draws[2 * CROP_TRIES + 1] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """Brightness, contrast and saturation each times ``1 - JITTER .. 1 + JITTER``, in random order; four uniforms."""
    changes: tuple[Callable[[Image.Image], ImageEnhance._Enhance], ...]
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in _ORDERS[int(draws[0] * len(_ORDERS))]:
        factor = 1.0 - JITTER + 2.0 * JITTER * draws[1 + which]
        image = changes[which](image).enhance(factor)
    return image


def augmented(image: Image.Image, size: int, draws: Sequence[float]) -> Image.Image:
    """The training transform of an RGB image: random resized crop to ``size`` square (bilinear), colour jitter, mirror.

    ``draws`` are ``DRAWS`` uniform numbers in [0, 1).
    """
    shape, colors, mirror = draws[: 2 * CROP_TRIES + 2], draws[2 * CROP_TRIES + 2 : -1], draws[-1]
    # Cropped before it is resized: with Image.resize(box=...) pixels outside the box would bleed into its edge.
    image = image.crop(crop_box(*image.size, shape)).resize((size, size), Image.Resampling.BILINEAR)
    image = color_jitter(image, colors)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else image


def centered(image: Image.Image, size: int) -> Image.Image:
    """The test transform of an RGB image: short side to ``round(size * 256 / 224)`` (bilinear), central square."""
    short = round(size * 256 / 224)
    width, height = image.size
    if width <= height:
        shape = (short, int(short * height / width))
    else:
        shape = (int(short * width / height), short)
    image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))
