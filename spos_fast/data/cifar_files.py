"""The files CIFAR comes in: Python pickles, flat binary, either of them as an archive, and a JPEG container.

The layouts are those that https://www.cs.toronto.edu/~kriz/cifar.html describes. The JPEG container is a compact copy:
``images_jpeg.bin.zst`` (JPEG files end to end, compressed with zstd) beside ``images_jpeg_index.npz`` (``offset``,
``label``, ``n_train``) and, optionally, ``train_order.npz`` (``label``, ``index_in_class``: the original order).
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spos_fast.data.cifar_pickle import read_pickle
from spos_fast.data.memory import Part
from spos_fast.errors import InputError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Where one of the CIFAR sets keeps what. ``label_bytes`` precede an image in the binary files, the last of them is
    the label; ``label_key`` is its name in the pickles; the row counts are images a file.
    """

    title: str
    classes: tuple[str, ...]
    pickle_folder: str
    pickle_train: tuple[str, ...]
    pickle_test: str
    label_key: bytes
    binary_folder: str
    binary_train: tuple[str, ...]
    binary_test: str
    label_bytes: int
    train_rows: int
    test_rows: int = 10_000


CIFAR10 = Layout(
    title="CIFAR-10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    pickle_folder="cifar-10-batches-py",
    pickle_train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    pickle_test="test_batch",
    label_key=b"labels",
    binary_folder="cifar-10-batches-bin",
    binary_train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    binary_test="test_batch.bin",
    label_bytes=1,
    train_rows=10_000,
)

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

CIFAR100 = Layout(
    title="CIFAR-100",
    classes=tuple(_CIFAR100_CLASSES.split()),
    pickle_folder="cifar-100-python",
    pickle_train=("train",),
    pickle_test="test",
    label_key=b"fine_labels",
    binary_folder="cifar-100-binary",
    binary_train=("train.bin",),
    binary_test="test.bin",
    label_bytes=2,
    train_rows=50_000,
)

_CONTAINER, _CONTAINER_INDEX, _ORDER = "images_jpeg.bin.zst", "images_jpeg_index.npz", "train_order.npz"
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
# Twice what CIFAR's 60,000 images take as raw pixels: no honest container is larger.
_CONTAINER_LIMIT = 2 * 60_000 * PIXELS

Reader = Callable[[str], bytes]


def read_cifar(layout: Layout, path: Path) -> tuple[Part, Part]:
    """The training and the test part of the set that ``layout`` describes, in the original order.

    ``path`` is the folder of the files, its parent, or the archive (``.tar.gz``, ``.tgz``, ``.tar``). Raises
    ``InputError`` naming the file that is missing, truncated, foreign, or has labels out of range or missing classes.
    """
    if path.is_file():
        if not path.name.endswith(_ARCHIVES):
            raise InputError(f"{path} is no folder and no {' or '.join(_ARCHIVES)} archive: give one of them")
        return _read_archive(layout, path)
    for folder in (path / layout.pickle_folder, path / layout.binary_folder, path):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if names & {*layout.pickle_train, *layout.binary_train}:
            return _read_members(layout, names, str(folder), _folder_reader(folder))
        if _CONTAINER in names:
            return _read_container(layout, folder)
    raise InputError(_not_found(layout, path, {entry.name for entry in path.iterdir()}))


def _not_found(layout: Layout, path: Path, present: set[str]) -> str:
    other = CIFAR100 if layout.title == CIFAR10.title else CIFAR10
    hint = ""
    if present & {other.pickle_folder, other.binary_folder, *other.pickle_train, *other.binary_train}:
        hint = f"; it looks like {other.title}"
    return (
        f"{path} holds no {layout.title}{hint}: it should hold {layout.pickle_folder}/{layout.pickle_train[0]}, "
        f"{layout.binary_folder}/{layout.binary_train[0]} or {_CONTAINER}"
    )


def _read_members(layout: Layout, names: set[str], where: str, read: Reader) -> tuple[Part, Part]:
    """Both parts from files of one layout: ``names`` are the files there, ``read`` gives the bytes of one."""
    parse: Callable[[Layout, str, bytes, int], Part]
    if names & set(layout.pickle_train):
        train_names, test_name, parse = layout.pickle_train, layout.pickle_test, _parse_pickle
    else:
        train_names, test_name, parse = layout.binary_train, layout.binary_test, _parse_binary
    missing = [name for name in (*train_names, test_name) if name not in names]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}: {layout.title} is incomplete")
    parts = [parse(layout, f"{where}/{name}", read(name), layout.train_rows) for name in train_names]
    train = Part(np.concatenate([p.pixels for p in parts]), np.concatenate([p.labels for p in parts]))
    test = parse(layout, f"{where}/{test_name}", read(test_name), layout.test_rows)
    return _with_all_classes(layout, where, train), _with_all_classes(layout, where, test)


def _with_all_classes(layout: Layout, where: str, part: Part) -> Part:
    counts = np.bincount(part.labels, minlength=len(layout.classes))
    absent = [layout.classes[c] for c in np.flatnonzero(counts == 0)]
    if absent:
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(
            f"{where} has no images of {len(absent)} of the {len(layout.classes)} {layout.title} classes: {shown}"
        )
    return part


def _parse_binary(layout: Layout, where: str, raw: bytes, rows: int) -> Part:
    record = layout.label_bytes + PIXELS
    if len(raw) != rows * record:
        raise InputError(
            f"{where} has {len(raw)} bytes: {layout.title} has {rows * record} there ({rows} records of {record}); the "
            "file is truncated or another one"
        )
    table = np.frombuffer(raw, dtype=np.uint8).reshape(rows, record)
    labels = table[:, layout.label_bytes - 1].astype(np.int64)
    return Part(_images(table[:, layout.label_bytes :]), _checked_labels(layout, where, labels))


def _parse_pickle(layout: Layout, where: str, raw: bytes, rows: int) -> Part:
    content = read_pickle(raw, where, least_bytes=rows * PIXELS)
    if not isinstance(content, dict) or not {b"data", layout.label_key} <= content.keys():
        key = layout.label_key.decode()
        raise InputError(f"{where} is no {layout.title} batch: it should be a dict with 'data' and {key!r}")
    data: Any = content[b"data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (rows, PIXELS):
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{where}: 'data' is {found}, and {layout.title} has uint8 [{rows}, {PIXELS}] there")
    labels: Any = content[layout.label_key]
    if not isinstance(labels, list) or len(labels) != rows or not all(type(label) is int for label in labels):
        raise InputError(f"{where}: {layout.label_key.decode()!r} should be a list of {rows} whole numbers")
    if not all(0 <= label <= 255 for label in labels):
        raise InputError(f"{where} has labels outside 0..{len(layout.classes) - 1}")
    return Part(_images(data), _checked_labels(layout, where, np.array(labels, dtype=np.int64)))


def _images(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A writable copy (torch wants one) of ``[N, 3072]``, red, green and blue planes, as ``[N, 3, 32, 32]``."""
    return np.array(rows).reshape(-1, 3, 32, 32)


def _checked_labels(layout: Layout, where: str, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(layout.classes)))
    if len(wrong):
        raise InputError(
            f"{where}: image {wrong[0]} has label {labels[wrong[0]]}, and {layout.title} has labels "
            f"0..{len(layout.classes) - 1} ({len(wrong)} images are out of range)"
        )
    return labels


def _folder_reader(folder: Path) -> Reader:
    return lambda name: _file_bytes(folder / name)


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _read_archive(layout: Layout, path: Path) -> tuple[Part, Part]:
    wanted = {*layout.pickle_train, layout.pickle_test, *layout.binary_train, layout.binary_test}
    content: dict[str, bytes] = {}
    present: set[str] = set()
    try:
        with tarfile.open(path) as archive:  # read in one pass and never extracted: member paths are not trusted
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                present |= {name, member.name.lstrip("./").split("/", 1)[0]}
                stream = archive.extractfile(member) if name in wanted and member.isfile() else None
                if stream is not None:
                    content[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no complete archive ({reason}): download it again") from None
    if not content.keys() & {*layout.pickle_train, *layout.binary_train}:
        raise InputError(_not_found(layout, path, present))
    return _read_members(layout, set(content), str(path), content.__getitem__)


def _read_container(layout: Layout, folder: Path) -> tuple[Part, Part]:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{folder / _CONTAINER} needs the package zstandard: pip install zstandard") from None
    offsets, labels, trained = _container_index(layout, folder / _CONTAINER_INDEX)
    packed = _file_bytes(folder / _CONTAINER)
    try:
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=_CONTAINER_LIMIT)
    except zstandard.ZstdError as error:
        raise InputError(f"{folder / _CONTAINER} is broken or truncated ({error}; {len(packed)} bytes)") from None
    if len(raw) != offsets[-1]:
        raise InputError(f"{folder / _CONTAINER} unpacks to {len(raw)} bytes, and its index says {offsets[-1]}")
    pixels = _decoded(raw, offsets, folder / _CONTAINER)
    train, test = Part(pixels[:trained], labels[:trained]), Part(pixels[trained:], labels[trained:])
    if (folder / _ORDER).exists():
        train = train[_original_order(folder / _ORDER, train.labels)]
    where = str(folder)
    return _with_all_classes(layout, where, train), _with_all_classes(layout, where, test)


def _container_index(layout: Layout, path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The container's offsets ``[N + 1]`` and labels ``[N]`` (int64) and the number of training images."""
    arrays = _numpy_file(path, "offset", "label", "n_train")
    offsets, labels = arrays["offset"].astype(np.int64), arrays["label"].astype(np.int64)
    trained = int(arrays["n_train"])
    if len(offsets) != len(labels) + 1 or not 0 < trained < len(labels) or np.any(np.diff(offsets) <= 0):
        raise InputError(
            f"{path} does not fit itself: {len(labels)} labels need {len(labels) + 1} rising offsets (it has "
            f"{len(offsets)}) and n_train in between (it is {trained})"
        )
    return offsets, _checked_labels(layout, str(path), labels), trained


def _decoded(raw: bytes, offsets: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
    # In one thread: at 56 microseconds an image two threads only wait for each other's interpreter lock.
    pixels = np.empty((len(offsets) - 1, 3, 32, 32), dtype=np.uint8)
    for i in range(len(pixels)):
        try:
            image = Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]]), formats=("JPEG",))
            if image.size != (32, 32) or image.mode != "RGB":
                raise ValueError(f"{image.mode} {image.size[0]}x{image.size[1]}")
            pixels[i] = np.asarray(image).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises a dozen kinds for broken files
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: image {i} is no 32x32 colour JPEG ({reason})") from None
    return pixels


def _original_order(path: Path, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each image of the original order stands in a container that goes through the classes in turn."""
    arrays = _numpy_file(path, "label", "index_in_class")
    classes = int(labels.max()) + 1
    order: NDArray[np.int64] = arrays["index_in_class"].astype(np.int64) * classes + arrays["label"].astype(np.int64)
    if not np.array_equal(np.sort(order), np.arange(len(labels))) or np.any(labels[order] != arrays["label"]):
        raise InputError(f"{path} is not an order of the {len(labels)} training images beside it")
    return order


def _numpy_file(path: Path, *keys: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except Exception as error:  # zip, format and key errors alike: the file is not what it should be
        reason = " ".join(str(error).split())
        raise InputError(f"{path} should be a NumPy archive with {', '.join(keys)} ({reason})") from None
