"""The 8x8 handwritten digits that come with scikit-learn: data without a download, for tests and first runs."""

from __future__ import annotations

import numpy as np

from spos_fast.data.images import Normalization
from spos_fast.data.memory import MemorySource, Part
from spos_fast.data.order import hold_out
from spos_fast.errors import InputError

# Mean and standard deviation of all 1,797 images (computed from them), on the 0..1 scale.
NORMALIZATION = Normalization(mean=(0.3053,), std=(0.3759,))
TEST_SHARE = 0.2


def load_digits(*, validation: float = 0.25) -> MemorySource:
    """1,797 digits as uint8 ``[N, 1, 8, 8]`` (UCI optical recognition of handwritten digits, via scikit-learn).

    The values 0..16 become 0..255. A fifth of each class, the same in every run, is the test set; ``validation`` is
    split off the rest. Augmentation: a shift of up to one pixel each way, zeros coming in; never mirrored, since a
    mirrored digit is another shape. Raises ``InputError`` if scikit-learn is missing or ``validation`` is out of range.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError:
        raise InputError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from None
    bunch = read()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    everything = Part(pixels, bunch.target.astype(np.int64))
    classes = tuple(str(digit) for digit in range(10))
    kept, held = hold_out(everything.labels, TEST_SHARE, classes, argument="the test share")
    return MemorySource(
        "digits",
        classes,
        everything[kept],
        everything[held],
        NORMALIZATION,
        validation=validation,
        padding=1,
        flip=False,
    )
