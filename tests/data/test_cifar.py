import dataclasses
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spos_fast.data import load
from spos_fast.data.cifar import NORMALIZATION
from spos_fast.data.cifar_files import CIFAR10, CIFAR100, Layout, read_cifar
from spos_fast.data.memory import Part
from spos_fast.errors import InputError

Encoder = Callable[[np.ndarray], bytes]

# The real layouts with fewer images a file, so that a whole set is written in milliseconds.
SMALL = {
    "cifar10": dataclasses.replace(CIFAR10, train_rows=20, test_rows=30),
    "cifar100": dataclasses.replace(CIFAR100, train_rows=200, test_rows=100),
}


def images(layout: Layout, rows: int, seed: int) -> Part:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
    return Part(pixels, np.arange(rows, dtype=np.int64) % len(layout.classes))


def parts_of(layout: Layout) -> dict[str, Part]:
    """One part a file of the pickle layout, the test file last."""
    parts = {name: images(layout, layout.train_rows, seed) for seed, name in enumerate(layout.pickle_train)}
    return {**parts, layout.pickle_test: images(layout, layout.test_rows, 99)}


def python2_pickle(label_key: bytes, part: Part) -> bytes:
    """A batch as Python 2 and its NumPy pickled it (protocol 2, byte strings): what the archives hold."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    raw = part.pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    state = b"(K\x01J" + struct.pack("<i", len(part.labels)) + b"M\x00\x0c\x86" + dtype + b"K\x00tb\x89T"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in part.labels) + b"e"
    data = array + state + struct.pack("<i", len(raw)) + raw + b"tb"
    return b"\x80\x02}(" + text(b"batch_label") + text(b"x") + text(b"data") + data + text(label_key) + labels + b"u."


def write_pickles(layout: Layout, folder: Path, python3: bool = False) -> None:
    folder.mkdir(parents=True)
    for name, part in parts_of(layout).items():
        content = {b"data": part.pixels.reshape(-1, 3072), layout.label_key: part.labels.tolist()}
        raw = pickle.dumps(content, protocol=2) if python3 else python2_pickle(layout.label_key, part)
        (folder / name).write_bytes(raw)


def write_binaries(layout: Layout, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, part in parts_of(layout).items():
        columns = [np.full(len(part.labels), 7)] * (layout.label_bytes - 1) + [part.labels]
        labels = np.stack(columns, axis=1).astype(np.uint8)
        table = np.concatenate([labels, part.pixels.reshape(-1, 3072)], axis=1)
        (folder / f"{name}.bin").write_bytes(table.tobytes())


def assert_parts(layout: Layout, found: tuple[Part, Part]) -> None:
    *train, test = parts_of(layout).values()
    assert np.array_equal(found[0].pixels, np.concatenate([part.pixels for part in train]))
    assert np.array_equal(found[0].labels, np.concatenate([part.labels for part in train]))
    assert np.array_equal(found[1].pixels, test.pixels) and np.array_equal(found[1].labels, test.labels)
    assert found[0].labels.dtype == np.int64 and found[0].pixels.flags.writeable


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["python2", "python3", "binary"])
def test_both_layouts_in_every_place(name: str, kind: str, tmp_path: Path) -> None:
    """Protects the public formats: pickles and binaries, as folder, parent folder and archive, give the same images."""
    layout = SMALL[name]
    folder = tmp_path / (layout.binary_folder if kind == "binary" else layout.pickle_folder)
    if kind == "binary":
        write_binaries(layout, folder)
    else:
        write_pickles(layout, folder, python3=kind == "python3")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    for path in (folder, tmp_path, archive):
        assert_parts(layout, read_cifar(layout, path))


def test_source_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects load("cifar10", folder): sizes, a stratified split, and batches of the right shape and labels."""
    monkeypatch.setitem(__import__("spos_fast.data.cifar", fromlist=["_LAYOUTS"])._LAYOUTS, "cifar10", SMALL["cifar10"])
    write_binaries(SMALL["cifar10"], tmp_path / "cifar-10-batches-bin")
    source = load("cifar10", str(tmp_path))
    assert (source.train_size, source.validation_size, source.full_train_size, source.test_size) == (90, 10, 100, 30)
    assert source.classes == CIFAR10.classes and (source.in_channels, source.input_size) == (3, 32)
    assert torch.bincount(source.validation().labels).tolist() == [1] * 10
    pixels, labels = next(source.train_stream(16, seed=0))
    assert pixels.shape == (16, 3, 32, 32) and pixels.dtype == torch.float32 and labels.dtype == torch.int64


class Evil:
    """A pickle that would run a command while it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_foreign_pickles_are_refused_unread(protocol: int, tmp_path: Path) -> None:
    """Protects the user's machine: a pickle that calls anything but NumPy's array code is refused, and nothing runs."""
    folder, target = tmp_path / "cifar-10-batches-py", tmp_path / "ran"
    write_pickles(SMALL["cifar10"], folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps(Evil(target), protocol=protocol))
    with pytest.raises(InputError, match=r"data_batch_3 asks for .* foreign"):
        read_cifar(SMALL["cifar10"], tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tVb\ntR.",  # an array of another type
        b"cnumpy\ndtype\n(VO\ntR.",  # an array of objects
        b"c_codecs\nencode\n(Va\nVrot13\ntR.",  # another codec
        b"cbuiltins\neval\n(V1+1\ntR.",
    ],
)
def test_allowed_names_cannot_be_bent(raw: bytes, tmp_path: Path) -> None:
    """Protects the allow-list itself: the permitted names refuse every argument that CIFAR's files do not use."""
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(SMALL["cifar10"], folder)
    (folder / "test_batch").write_bytes(raw)
    with pytest.raises(InputError, match="test_batch asks for"):
        read_cifar(SMALL["cifar10"], tmp_path)


def broken(kind: str, folder: Path, layout: Layout) -> None:
    """Damages one file of a set written in ``folder``."""
    first = folder / layout.pickle_train[0]
    if kind == "truncated pickle":
        first.write_bytes(first.read_bytes()[:50_000])
    elif kind == "list pickle":
        first.write_bytes(pickle.dumps([1, 2], protocol=2))
    elif kind == "wrong shape":
        content = {b"data": np.zeros((20, 7), np.uint8), b"labels": [0] * 20}
        first.write_bytes(pickle.dumps(content, protocol=2))
    elif kind == "wrong labels":
        content = {b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 19 + [11]}
        first.write_bytes(pickle.dumps(content, protocol=2))
    elif kind == "missing":
        (folder / layout.pickle_test).unlink()
    elif kind == "missing class":
        content = {b"data": np.zeros((30, 3072), np.uint8), b"labels": [0, 1, 2, 3, 4, 6, 7, 8, 9, 9] * 3}
        (folder / layout.pickle_test).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated pickle", r"data_batch_1 is no complete pickle .* has 50000 bytes, a complete one over 61440"),
        ("list pickle", r"data_batch_1 is no CIFAR-10 batch: .* 'data' and 'labels'"),
        ("wrong shape", r"data_batch_1: 'data' is uint8 \[20, 7\], and CIFAR-10 has uint8 \[20, 3072\]"),
        ("wrong labels", r"data_batch_1: image 19 has label 11, and CIFAR-10 has labels 0\.\.9"),
        ("missing", r"lacks test_batch: CIFAR-10 is incomplete"),
        ("missing class", r"no images of 1 of the 10 CIFAR-10 classes: dog"),
    ],
)
def test_damaged_pickles_are_named(kind: str, message: str, tmp_path: Path) -> None:
    """Protects users from a traceback: one line names the file, what is there and what should be."""
    layout = SMALL["cifar10"]
    folder = tmp_path / layout.pickle_folder
    write_pickles(layout, folder)
    broken(kind, folder, layout)
    with pytest.raises(InputError, match=message) as caught:
        read_cifar(layout, tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_binaries_and_archives_are_named(tmp_path: Path) -> None:
    """Protects users from half a download: name, real size and expected size; labels that are out of range."""
    layout = SMALL["cifar10"]
    folder = tmp_path / layout.binary_folder
    write_binaries(layout, folder)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"cifar\.tar\.gz is no complete archive"):
        read_cifar(layout, archive)
    file = folder / "data_batch_2.bin"
    raw = bytearray(file.read_bytes())
    raw[3073] = 10
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"data_batch_2\.bin: image 1 has label 10"):
        read_cifar(layout, tmp_path)
    file.write_bytes(raw[:-1])
    with pytest.raises(InputError, match=r"data_batch_2\.bin has 61459 bytes: CIFAR-10 has 61460 there"):
        read_cifar(layout, tmp_path)


def test_the_wrong_place_is_explained(tmp_path: Path) -> None:
    """Protects against a mixed-up path: an empty folder, the other CIFAR, a file that is no archive."""
    with pytest.raises(InputError, match=r"holds no CIFAR-10: it should hold cifar-10-batches-py/data_batch_1"):
        read_cifar(CIFAR10, tmp_path)
    write_binaries(SMALL["cifar100"], tmp_path / "cifar-100-binary")
    with pytest.raises(InputError, match="it looks like CIFAR-100"):
        read_cifar(CIFAR10, tmp_path)
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with pytest.raises(InputError, match=r"no .* archive"):
        read_cifar(CIFAR10, note)
    fake = tmp_path / "fake.tar.gz"
    fake.write_text("hello")
    with pytest.raises(InputError, match="is no complete archive"):
        read_cifar(CIFAR10, fake)


def write_container(folder: Path, jpeg: Encoder, **changes: Any) -> None:
    """A JPEG container of 20 training and 10 test images in one flat colour each: 10 times the label."""
    zstandard = pytest.importorskip("zstandard", reason="the JPEG container is compressed with zstandard")
    folder.mkdir(exist_ok=True)
    labels = np.arange(30) % 10
    files = [jpeg(np.full((32, 32, 3), 10 * label + i // 10, np.uint8)) for i, label in enumerate(labels)]
    offset = np.cumsum([0, *map(len, files)])
    index = {"offset": offset, "label": labels, "n_train": np.int64(20), **changes}
    np.savez(folder / "images_jpeg_index.npz", **index)
    (folder / "images_jpeg.bin.zst").write_bytes(zstandard.ZstdCompressor().compress(b"".join(files)))


def test_jpeg_container(tmp_path: Path, jpeg: Encoder) -> None:
    """Protects the container: images, labels, the train/test border, and the original order where it is given."""
    write_container(tmp_path, jpeg)
    train, test = read_cifar(CIFAR10, tmp_path)
    assert train.pixels[:, 0, 0, 0].tolist() == [10 * (i % 10) + i // 10 for i in range(20)]
    assert test.labels.tolist() == list(range(10)) and test.pixels.shape == (10, 3, 32, 32)
    label, place = np.repeat(np.arange(10), 2), np.tile([1, 0], 10)
    np.savez(tmp_path / "train_order.npz", label=label, index_in_class=place)
    train, _ = read_cifar(CIFAR10, tmp_path)
    assert train.labels.tolist() == label.tolist()
    assert train.pixels[:, 2, 31, 31].tolist() == (10 * label + place).tolist()
    np.savez(tmp_path / "train_order.npz", label=label, index_in_class=np.zeros(20, int))
    with pytest.raises(InputError, match="is not an order of the 20 training images"):
        read_cifar(CIFAR10, tmp_path)


def test_damaged_containers_are_named(tmp_path: Path, jpeg: Encoder) -> None:
    """Protects users of a cut or mixed-up container: the file is named with what does not fit."""
    write_container(tmp_path, jpeg, n_train=np.int64(30))
    with pytest.raises(InputError, match=r"images_jpeg_index\.npz does not fit itself"):
        read_cifar(CIFAR10, tmp_path)
    write_container(tmp_path, jpeg, offset=np.arange(31))
    with pytest.raises(InputError, match="and its index says 30"):
        read_cifar(CIFAR10, tmp_path)
    write_container(tmp_path, lambda pixels: jpeg(pixels[:1, :1]))
    with pytest.raises(InputError, match=r"image 0 is no 32x32 colour JPEG \(RGB 1x1\)"):
        read_cifar(CIFAR10, tmp_path)
    packed = tmp_path / "images_jpeg.bin.zst"
    packed.write_bytes(packed.read_bytes()[:40])
    with pytest.raises(InputError, match=r"images_jpeg\.bin\.zst is broken or truncated"):
        read_cifar(CIFAR10, tmp_path)
    (tmp_path / "images_jpeg_index.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"images_jpeg_index\.npz should be a NumPy archive"):
        read_cifar(CIFAR10, tmp_path)


def test_real_cifar10(shared_data: Path) -> None:
    """Protects reading the real images: class counts, the published constants, and the container's original order
    against bit-exact originals in the public binary layout.
    """
    zstandard = pytest.importorskip("zstandard", reason="the JPEG container is compressed with zstandard")
    train, test = read_cifar(CIFAR10, shared_data / "cifar10")
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    scaled = train.pixels.transpose(1, 0, 2, 3).reshape(3, -1)[:, ::7] / 255
    norm = NORMALIZATION["cifar10"]
    assert np.allclose(scaled.mean(1), norm.mean, atol=2e-3) and np.allclose(scaled.std(1), norm.std, atol=3e-3)
    raw = (shared_data / "cifar10" / "lossless_first4000_train.bin.zst").read_bytes()
    exact = zstandard.ZstdDecompressor().decompress(raw, max_output_size=4000 * 3073)
    table = np.frombuffer(exact, np.uint8).reshape(4000, 3073)
    assert np.array_equal(table[:, 0], train.labels[:4000])
    error = train.pixels[:4000].reshape(4000, -1).astype(np.float32) - table[:, 1:]
    psnr = 20 * np.log10(255 / np.sqrt((error**2).mean(1)))
    assert psnr.min() > 18 and psnr.mean() > 28, "an image in the wrong place would be near 10 dB"
