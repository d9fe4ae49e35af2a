from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """A random, smooth image file at ``path``; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """A tiny train/ and val/ tree: 3 classes, 14 training and 3 test images each, of many shapes and file modes."""
    root = tmp_path / "tiny"
    modes = ("RGB", "L", "CMYK", "RGB")
    for label, name in enumerate(("n01", "n02", "n03")):
        for part, count in (("train", 14), ("val", 3)):
            for i in range(count):
                size = (24 + 5 * (i % 4), 60 - 6 * (i % 5))
                write_image(root / part / name / f"{name}_{i}.JPEG", 100 * label + i, size, modes[i % 4])
    write_image(root / "train" / "n01" / "n01_palette.png", 7, mode="P")
    return root


@dataclass(frozen=True)
class Shipped:
    """Real ImageNet JPEG files, one a class: ``files[i]`` of class ``wnid[i]``."""

    files: list[bytes]
    wnid: list[str]


@pytest.fixture(scope="session")
def imagenet_sample(shared_data: Path) -> Shipped:
    """The first 24 images of the sample of real ImageNet."""
    index = np.load(shared_data / "imagenet_sample" / "images_224q90_index.npz")
    raw = (shared_data / "imagenet_sample" / "images_224q90.bin").read_bytes()
    offset = index["offset"].astype(int)
    return Shipped([raw[offset[i] : offset[i + 1]] for i in range(24)], [str(name) for name in index["wnid"][:24]])


@pytest.fixture
def jpeg() -> Callable[[np.ndarray], bytes]:
    """Encodes uint8 ``[H, W, 3]`` as JPEG."""

    def encode(pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=95)
        return out.getvalue()

    return encode
