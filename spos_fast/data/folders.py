"""An index of class folders: ``ROOT/CLASS/IMAGE`` files, held compactly enough for 1.28 million of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spos_fast.errors import InputError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """The image files under ``root``, sorted by class and name.

    ``classes`` are the folder names, sorted; ``labels`` is int64 ``[N]``; ``names`` holds the file names as bytes
    (NumPy ``S`` array ``[N]``). Arrays, not lists of paths: worker processes then share the memory (reference counts
    would copy it page by page), and sending the index to one costs a copy of 30 MB rather than a million objects.
    """

    root: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    names: NDArray[np.bytes_]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def path(self, image: int) -> str:
        """The path of image ``image``."""
        return os.path.join(self.root, self.classes[self.labels[image]], os.fsdecode(bytes(self.names[image])))


def scan(root: Path) -> FolderIndex:
    """Index the class folders in ``root``; nothing is opened, and no file is asked for more than its name.

    Raises ``InputError`` if ``root`` is missing, holds no class folders, or a class folder holds no images (named).
    """
    try:
        with os.scandir(root) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{root} cannot be read ({error.strerror}): it should hold one folder a class") from None
    classes = sorted(name for name, is_folder in listed if is_folder)
    if not classes:
        loose = sum(name.lower().endswith(EXTENSIONS) for name, _ in listed)
        found = f"{loose} images and no folders" if loose else "no folders"
        raise InputError(f"{root} holds {found}: it should hold one folder a class with the images inside")
    files = [_image_names(os.path.join(root, name)) for name in classes]
    empty = [name for name, inside in zip(classes, files, strict=True) if not inside]
    if empty:
        raise InputError(
            f"{root} has class folders without images ({listing(empty)}): add images or remove the folders"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(inside) for inside in files])
    names = np.array([os.fsencode(name) for inside in files for name in inside])
    return FolderIndex(str(root), tuple(classes), labels, names)


def _image_names(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
        )


def check_same_classes(train: FolderIndex, test: FolderIndex) -> None:
    """Raises ``InputError``, naming the folders, if one index has classes that the other lacks."""
    for has, lacks in ((train, test), (test, train)):
        extra = sorted(set(has.classes) - set(lacks.classes))
        if extra:
            raise InputError(
                f"{lacks.root} lacks {len(extra)} of the {len(has.classes)} classes of {has.root}: {listing(extra)}; "
                "both need the same class folders"
            )


def listing(names: list[str]) -> str:
    """At most five names, then how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
