import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spos_fast.data import DataSource, load
from spos_fast.data.decoding import read_rgb
from spos_fast.data.folders import scan
from spos_fast.data.order import uniforms
from spos_fast.data.transforms import DRAWS, augmented, centered
from spos_fast.errors import InputError

Batch = tuple[torch.Tensor, torch.Tensor]


def tiny(root: Path, **options: Any) -> DataSource:
    """The tiny tree, 2 validation images a class, at 32 pixels, decoded in this process unless told otherwise."""
    return load("imagenet", root, **{"validation": 2, "input_size": 32, "workers": 0, **options})


def take(stream: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def test_index_and_sizes(class_folders: Path) -> None:
    """Protects the index: classes sorted by name, labels by class, every image file, nothing else."""
    (class_folders / "train" / "n01" / "notes.txt").write_text("no image")
    (class_folders / "train" / ".cache").mkdir()
    source = tiny(class_folders)
    assert source.classes == ("n01", "n02", "n03") and source.num_classes == 3
    assert (source.train_size, source.validation_size, source.full_train_size, source.test_size) == (37, 6, 43, 9)
    index = scan(class_folders / "train")
    assert np.bincount(index.labels).tolist() == [15, 14, 14]
    paths = [index.path(i) for i in range(len(index))]
    assert paths == sorted(paths) and all(Path(path).is_file() for path in paths)


def test_worker_count_does_not_change_the_stream(class_folders: Path) -> None:
    """Protects reproducibility: 0, 1 and 2 decoding processes give the same bits, also for fixed and test sets."""
    sources = [tiny(class_folders, workers=workers) for workers in (0, 1, 2)]
    streams = [take(source.train_stream(70, seed=5), 2) for source in sources]
    assert same(streams[0], streams[1]) and same(streams[0], streams[2])
    fixed = [source.calibration(35, seed=1).pixels for source in sources]
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(fixed[0], fixed[2])
    assert same(list(sources[0].test_batches(4)), list(sources[2].test_batches(4)))
    one_off = take(sources[0].train_stream(70, seed=5, workers=1), 2)
    assert same(one_off, streams[0])


@pytest.mark.parametrize("full", [False, True])
def test_resumed_stream_has_the_same_bits(class_folders: Path, full: bool) -> None:
    """Protects resuming, over epoch ends too: a stream begun at step 3 continues the uninterrupted one bit for bit."""
    source = tiny(class_folders)
    whole = take(source.train_stream(16, seed=3, full=full), 6)
    assert same(take(source.train_stream(16, seed=3, full=full, start_step=3), 3), whole[3:])
    assert not same(take(source.train_stream(16, seed=4, full=full), 6), whole)


def test_ranks_end_to_end_are_the_global_batch(class_folders: Path) -> None:
    """Protects data-parallel runs: the ranks' rows joined are the single process's batch."""
    source = tiny(class_folders)
    whole = take(source.train_stream(36, seed=3), 2)
    ranks = [take(source.train_stream(36, seed=3, rank=r, world_size=2), 2) for r in range(2)]
    for step in range(2):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), whole[step][0])


def test_stream_is_the_published_augmentation(class_folders: Path) -> None:
    """Protects the pipeline end to end: each row is the transform of its own image with its own position's draws."""
    source = tiny(class_folders, normalize="published")
    pixels, labels = take(source.train_stream(16, seed=3, full=True, start_step=1), 2)[1]
    from spos_fast.data.order import StreamOrder

    index = scan(class_folders / "train")
    images = StreamOrder(3, 43, 16).images(2)
    assert labels.tolist() == index.labels[images].tolist()
    for row in range(16):
        rgb = read_rgb(index.path(int(images[row])))
        expected = as_array(augmented(rgb, 32, uniforms(3, 2 * 16 + row, 1, DRAWS)[0].tolist()))
        assert np.array_equal(pixels[row].numpy(), expected[::-1].astype(np.float32)), "BGR, 0..255"


def test_fixed_sets_and_test_set(class_folders: Path) -> None:
    """Protects the experiment: validation is stratified, never trained on, never the test set; all is complete."""
    source = tiny(class_folders)
    seen: list[tuple[int, int]] = []
    validation = source.validation(progress=lambda done, total: seen.append((done, total)))
    assert torch.bincount(validation.labels).tolist() == [2, 2, 2] and seen[-1] == (6, 6)
    calibration = source.calibration(37, seed=0)
    held, kept = ({bytes(image.numpy().tobytes()) for image in s.pixels} for s in (validation, calibration))
    assert len(held) == 6 and len(kept) == 37 and held.isdisjoint(kept)
    with pytest.raises(InputError, match="1 to 37 images"):
        source.calibration(38, seed=0)
    index = scan(class_folders / "val")
    batches = list(source.test_batches(4))
    assert [len(y) for _, y in batches] == [4, 4, 1]
    expected = torch.from_numpy(np.stack([as_array(centered(read_rgb(index.path(i)), 32)) for i in range(9)]))
    assert torch.equal(torch.cat([x for x, _ in batches]), source.normalization(expected))
    assert torch.cat([y for _, y in batches]).tolist() == index.labels.tolist()


def test_the_stream_leaves_the_global_generator_alone(class_folders: Path) -> None:
    """Protects resuming of everything else: starting workers must not draw from PyTorch's global generator."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(tiny(class_folders, workers=1).train_stream(4, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_closing_a_stream_ends_its_workers(class_folders: Path) -> None:
    """Protects long searches from processes that pile up: a dropped stream takes its workers with it."""
    import multiprocessing

    stream = tiny(class_folders, workers=2).train_stream(8, seed=0)
    next(stream)
    assert len(multiprocessing.active_children()) >= 2
    del stream
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_every_image_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    """Protects against ImageNet's odd files: grey, CMYK, palette and transparent images are read as RGB."""
    colour = Image.new("RGB", (8, 8), (204, 204, 204)).convert(mode)  # a colour that Pillow's palette has
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    colour.save(path)
    rgb = read_rgb(str(path))
    assert rgb.mode == "RGB" and rgb.size == (8, 8)
    if mode != "1":
        assert np.abs(np.asarray(rgb).astype(int) - 204).max() <= 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "empty", "no image", "gone"])
def test_broken_images_are_named(damage: str, workers: int, class_folders: Path) -> None:
    """Protects users from a worker's traceback: one line with the file, whichever process met it."""
    source = tiny(class_folders, workers=workers)
    path = class_folders / "train" / "n02" / "n02_3.JPEG"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else b"<html>not found</html>")
    with pytest.raises(InputError) as caught:
        take(source.train_stream(43, seed=0, full=True), 1)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and "Traceback" not in message
    assert ("is gone" if damage == "gone" else "broken or truncated") in message


def test_bad_folders_are_named(class_folders: Path, tmp_path: Path) -> None:
    """Protects users from a late or wordless failure: each message names the folder and what would be right."""

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            tiny(class_folders, **options)
        assert "\n" not in str(caught.value)

    refused(r"15 images a class, and 3 of 3 classes .* n01 \(15\), n02 \(14\), n03 \(14\)", validation=15)
    refused("normalize is 'none': choose one of imagenet, published", normalize="none")
    refused("input_size is 0", input_size=0)
    refused("workers is -1", workers=-1)
    refused("option 'size' is unknown for imagenet: it takes input_size, normalize, workers", size=3)
    (class_folders / "val" / "n04").mkdir()
    refused(r"val has class folders without images \(n04\)")
    (class_folders / "val" / "n03_0.JPEG").write_bytes(b"x")
    (class_folders / "val" / "n04" / "a.jpg").write_bytes(b"x")
    refused("train lacks 1 of the 4 classes of .*val: n04")
    (class_folders / "val" / "n04" / "a.jpg").unlink()
    (class_folders / "val" / "n04").rmdir()
    for name in ("n02", "n03"):
        (class_folders / "val" / name).rename(tmp_path / f"away_{name}")
    refused("val lacks 2 of the 3 classes of .*train: n02, n03")
    (class_folders / "val" / "n01").rename(tmp_path / "away_n01")
    refused("val holds 1 images and no folders: it should hold one folder a class")
    (class_folders / "val" / "n03_0.JPEG").unlink()
    (class_folders / "val").rmdir()
    refused("has no folder 'val'")


def test_indexing_is_quick(tmp_path: Path) -> None:
    """Protects start-up: ImageNet's 1.28 million files must not be opened or asked for their size one by one."""
    for label in range(20):
        folder = tmp_path / f"n{label:02d}"
        folder.mkdir()
        for i in range(500):
            os.close(os.open(folder / f"{i}.JPEG", os.O_CREAT))
    start = time.perf_counter()
    assert len(scan(tmp_path)) == 10_000
    assert time.perf_counter() - start < 1.0  # about 0.02 s; all of ImageNet is 128 times this


def test_real_images(imagenet_sample: Any, tmp_path: Path) -> None:
    """Protects the path of real ImageNet files: decoded at 224 in workers, each image with its class."""
    for i, (file, name) in enumerate(zip(imagenet_sample.files, imagenet_sample.wnid, strict=True)):
        for part in ("train", "val"):
            folder = tmp_path / part / imagenet_sample.wnid[i % 8]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}_{i}.JPEG").write_bytes(file)
    source = load("imagenet", tmp_path, validation=1, workers=2)
    assert (source.num_classes, source.train_size, source.validation_size, source.test_size) == (8, 16, 8, 24)
    pixels, labels = next(source.train_stream(16, seed=0))
    assert pixels.shape == (16, 3, 224, 224) and sorted(labels.tolist()) == sorted([*range(8)] * 2)
    assert abs(pixels.mean()) < 0.8 and 0.6 < pixels.std() < 1.6
    held = source.validation()
    assert held.pixels.shape == (8, 3, 224, 224) and held.labels.tolist() == list(range(8))
