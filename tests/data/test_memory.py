import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spos_fast.data import DataSource, Normalization, load
from spos_fast.data.augment import crop_and_flip, pad_images
from spos_fast.data.memory import MemorySource, Part
from spos_fast.errors import InputError

Batch = tuple[torch.Tensor, torch.Tensor]
IDENTITY = Normalization(mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0)


def part(count: int, first: int) -> Part:
    """Random 32x32 images whose first pixel holds their number, 5 classes in turn."""
    pixels = np.random.default_rng(first).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return Part(pixels, np.arange(count, dtype=np.int64) % 5)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    classes = ("a", "b", "c", "d", "e")
    return MemorySource("fake", classes, part(100, 1), part(30, 2), IDENTITY, validation=0.2, padding=4, flip=True)


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load("digits")


def rows_of(images: torch.Tensor) -> set[bytes]:
    """The images as a set of byte strings: which images a tensor holds, whatever their order."""
    return {bytes(image.numpy().tobytes()) for image in images}


def take(stream: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def test_crop_and_flip_against_a_loop() -> None:
    """Protects the augmentation's pixels: the batch gather equals padding, slicing and mirroring image by image."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 8, 10), dtype=np.uint8)
    images, flip = rng.integers(0, 6, 50), rng.integers(0, 2, 50).astype(bool)
    top, left = rng.integers(0, 5, 50), rng.integers(0, 5, 50)
    padded = pad_images(torch.from_numpy(pixels), 2)
    arguments = [torch.from_numpy(array) for array in (images, top, left, flip)]
    result = crop_and_flip(padded, *arguments, height=8, width=10)
    for row in range(50):
        canvas = np.zeros((3, 12, 14), dtype=np.uint8)
        canvas[:, 2:10, 2:12] = pixels[images[row]]
        window = canvas[:, top[row] : top[row] + 8, left[row] : left[row] + 10]
        assert np.array_equal(result[row].numpy(), window[:, :, ::-1] if flip[row] else window), row


def test_augmentation_covers_every_shift_and_both_sides(source: MemorySource) -> None:
    """Protects against a draw that never reaches the last corner, or mirrors everything or nothing."""
    from spos_fast.data.order import StreamOrder

    plan = np.concatenate([source._plan(StreamOrder(0, 80, 1000), step, False) for step in range(10)], axis=1)
    for corner in plan[1:3]:
        counts = np.bincount(corner, minlength=9)
        assert len(counts) == 9 and counts.min() > 950 and counts.max() < 1280
    assert 0.47 < plan[3].mean() < 0.53
    assert abs(np.corrcoef(plan[1:])[~np.eye(3, dtype=bool)]).max() < 0.04


@pytest.mark.parametrize("full", [False, True])
def test_resumed_stream_has_the_same_bits(source: MemorySource, full: bool) -> None:
    """Protects resuming: a stream begun at step 5 continues the uninterrupted one bit for bit, over epoch ends."""
    whole = take(source.train_stream(24, seed=3, full=full), 12)
    assert same(take(source.train_stream(24, seed=3, full=full, start_step=5), 7), whole[5:])
    assert not same(take(source.train_stream(24, seed=4, full=full), 12), whole)


def test_ranks_end_to_end_are_the_global_batch(source: MemorySource) -> None:
    """Protects data-parallel runs: w processes see exactly the batch of one, whichever w."""
    whole = take(source.train_stream(24, seed=3), 5)
    for world in (2, 3):
        ranks = [take(source.train_stream(24, seed=3, rank=r, world_size=world), 5) for r in range(world)]
        for step in range(5):
            assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), whole[step][0])
            assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), whole[step][1])


def test_stream_shows_every_training_image_once_an_epoch() -> None:
    """Protects the epoch: without augmentation the images of an epoch are the training part, validation excluded,
    or included with full.
    """
    classes = ("a", "b", "c", "d", "e")
    plain = MemorySource("fake", classes, part(100, 1), part(30, 2), IDENTITY, validation=4, padding=0, flip=False)
    held = rows_of(plain.validation().pixels.float())
    for full, size in ((False, 80), (True, 100)):
        epoch = [x for x, _ in take(plain.train_stream(20, seed=1, full=full), size // 20)]
        seen = rows_of(torch.cat(epoch))
        assert len(seen) == size
        assert held.isdisjoint(seen) is not full and (held <= seen) is full


def test_labels_stay_with_their_images() -> None:
    """Protects against a shuffle of images without their labels."""
    classes = ("a", "b", "c", "d", "e")
    train = part(100, 1)
    plain = MemorySource("fake", classes, train, part(30, 2), IDENTITY, validation=4, padding=0, flip=False)
    known = {image.astype(np.float32).tobytes(): label for image, label in zip(train.pixels, train.labels, strict=True)}
    for pixels, labels in take(plain.train_stream(16, seed=0), 9):
        assert [known[image.numpy().tobytes()] for image in pixels] == labels.tolist()
    fixed = plain.calibration(30, seed=0)
    assert [known[image.float().numpy().tobytes()] for image in fixed.pixels] == fixed.labels.tolist()


def test_parts_are_disjoint_and_stratified(digits: DataSource) -> None:
    """Protects the experiment: calibration, validation and test share no image; every class is in each part."""
    calibration = digits.calibration(digits.train_size, seed=0)
    validation = digits.validation()
    test = torch.cat([x for x, _ in digits.test_batches(100)])
    as_input = [images.normalization(images.pixels) for images in (calibration, validation)]
    kept, held, tested = rows_of(as_input[0]), rows_of(as_input[1]), rows_of(test)
    assert kept.isdisjoint(held) and kept.isdisjoint(tested) and held.isdisjoint(tested)
    assert (len(calibration), len(validation), len(test)) == (1079, 359, 359)
    assert digits.full_train_size == digits.train_size + digits.validation_size == 1438
    counts = torch.bincount(validation.labels)
    assert len(counts) == 10 and counts.min() >= 34 and counts.max() <= 38


def test_fixed_sets_are_fixed(digits: DataSource) -> None:
    """Protects comparable scores: validation is the same in every run, calibration follows its seed."""
    again = load("digits")
    assert torch.equal(again.validation().pixels, digits.validation().pixels)
    first, second = digits.calibration(200, seed=1), again.calibration(200, seed=1)
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    assert not torch.equal(digits.calibration(200, seed=2).pixels, first.pixels)


def test_digits_are_scaled_and_normalised(digits: DataSource) -> None:
    """Protects the constants: pixels span 0..255, and normalised training data has mean 0 and deviation 1."""
    images = digits.calibration(digits.train_size, seed=0)
    assert images.pixels.min() == 0 and images.pixels.max() == 255
    inputs, labels = next(images.batches(5000))
    assert inputs.shape == (1079, 1, 8, 8) and set(labels.tolist()) == set(range(10))
    assert abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02


def test_digits_can_be_learnt(digits: DataSource) -> None:
    """Protects the data as a whole: the mean training image of each class alone recognises most test digits."""
    pixels, labels = next(digits.train_stream(digits.train_size, seed=0))
    means = torch.stack([pixels[labels == c].mean(0) for c in range(10)]).flatten(1)
    right = sum(int((torch.cdist(x.flatten(1), means).argmin(1) == y).sum()) for x, y in digits.test_batches(64))
    assert right / digits.test_size > 0.75


def test_test_set_comes_whole_and_in_order(source: MemorySource) -> None:
    """Protects the final score: every test image once, unaugmented, in file order."""
    batches = list(source.test_batches(8))
    assert [len(y) for _, y in batches] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.from_numpy(source._test.pixels).float())


def test_bad_arguments_are_refused_at_once(digits: DataSource, tmp_path: Path) -> None:
    """Protects users from errors that come late or do not say what would be right."""
    cases = [
        (lambda: load("mnist"), "choose one of digits, cifar10, cifar100, imagenet"),
        (lambda: load("digits", tmp_path), "leave path out"),
        (lambda: load("digits", workers=3), "option 'workers' is unknown for digits"),
        (lambda: load("digits", validation=200), r"200 images a class, and 10 of 10 classes"),
        (lambda: load("cifar10"), "path is missing"),
        (lambda: load("cifar10", tmp_path / "no"), "no does not exist"),
        (lambda: digits.train_stream(10, seed=0, world_size=3), "divisible by world_size 3"),
        (lambda: digits.train_stream(10, seed=0, start_step=-1), "start_step is -1"),
        (lambda: digits.train_stream(10, seed=0, workers=-1), "workers is -1"),
        (lambda: digits.train_stream(10, seed=0, device="tpu9000"), "device is 'tpu9000'"),
        (lambda: digits.test_batches(0), "batch_size is 0"),
        (lambda: digits.calibration(1080, seed=0), "1 to 1079 images"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
