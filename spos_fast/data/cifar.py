"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, "Learning multiple layers of features from tiny images")."""

from __future__ import annotations

from pathlib import Path

from spos_fast.data.cifar_files import CIFAR10, CIFAR100, read_cifar
from spos_fast.data.images import Normalization
from spos_fast.data.memory import MemorySource

_LAYOUTS = {"cifar10": CIFAR10, "cifar100": CIFAR100}

# Mean and standard deviation of the 50,000 training images, all pixels of a channel together, on the 0..1 scale: the
# values in common use. Those of CIFAR-10 were recomputed for this project and agree.
NORMALIZATION = {
    "cifar10": Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
}


def load_cifar(name: str, path: Path, *, validation: float = 0.1) -> MemorySource:
    """The set ``name``, "cifar10" or "cifar100" (fine labels), from ``path``, in any layout that ``read_cifar`` knows.

    50,000 training and 10,000 test images, uint8 ``[N, 3, 32, 32]``, all in memory (185 MB); ``validation`` is split
    off the training part. Augmentation: 4 zero pixels a side, a random 32x32 crop, and a mirror image half of the time
    (He et al. 2015, arXiv 1512.03385, section 4.2). Raises ``InputError`` for files that are missing or damaged.
    """
    layout = _LAYOUTS[name]
    train, test = read_cifar(layout, path)
    return MemorySource(
        name, layout.classes, train, test, NORMALIZATION[name], validation=validation, padding=4, flip=True
    )
