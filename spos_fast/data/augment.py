"""Augmentation of whole uint8 batches on the device, with no Python work per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_images(pixels: Tensor, padding: int) -> Tensor:
    """Zero pixels around each image: ``[N, C, H, W]`` to contiguous ``[N, C, H + 2 padding, W + 2 padding]``."""
    return F.pad(pixels, (padding,) * 4).contiguous()


def crop_and_flip(
    padded: Tensor, images: Tensor, top: Tensor, left: Tensor, flip: Tensor | None, *, height: int, width: int
) -> Tensor:
    """Row ``i`` is the window of ``padded[images[i]]`` at ``(top[i], left[i])``, mirrored left-right where ``flip[i]``.

    ``padded`` is contiguous uint8 ``[N, C, H, W]``; ``images``, ``top`` and ``left`` are int64 ``[B]``, ``flip`` bool
    ``[B]`` or None; the result is uint8 ``[B, C, height, width]``. With a padding of 4 this is the CIFAR augmentation
    of He et al. 2015 (arXiv 1512.03385, section 4.2).
    """
    count, channels, padded_height, padded_width = padded.shape
    n, c, y, x = padded.stride()
    # A view that holds every window of every image, so that choosing one a row is a single gather.
    windows = padded.as_strided(
        (count, padded_height - height + 1, padded_width - width + 1, channels, height, width), (n, y, x, c, y, x)
    )
    chosen = windows[images, top, left]
    if flip is None:
        return chosen
    return torch.where(flip.view(-1, 1, 1, 1), chosen.flip(3), chosen)
