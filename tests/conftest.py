"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny networks: a second OpenMP thread gains little on idle cores and loses minutes on busy ones. Set before torch is
# imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets that some tests compare with: ``SPOS_FAST_TEST_DATA``, or shared/data beside the
    repository. Tests that need it are skipped where it is absent."""
    given = os.environ.get("SPOS_FAST_TEST_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no folder of real data at {path}; set SPOS_FAST_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def tiny_space():
    """A ShuffleNetV2 space of 256 networks for 8 x 8 digits."""
    from spos_fast.spaces import ShuffleNetV2

    return ShuffleNetV2(
        input_size=8,
        num_classes=10,
        in_channels=1,
        stem_channels=8,
        stem_stride=1,
        stage_channels=(16, 32),
        stage_repeats=(2, 2),
        stage_strides=(1, 2),
        head_channels=32,
    )


@pytest.fixture
def poisoned_memory():
    """Every uninitialised tensor is filled with NaN, those that C++ allocates too: reading one unwritten shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
