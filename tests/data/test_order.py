import numpy as np
import pytest

from spos_fast.data.order import StreamOrder, draw_subset, hold_out, shuffled, uniforms
from spos_fast.errors import InputError


@pytest.mark.parametrize("draws", [1, 3, 4, 27])
def test_draws_belong_to_their_position(draws: int) -> None:
    """Protects resuming and rank slices: a position's draws are the same whichever batch they are drawn with."""
    whole = uniforms(5, 100, 40, draws)
    assert whole.shape == (40, draws)
    assert np.array_equal(uniforms(5, 110, 7, draws), whole[10:17])
    assert not np.array_equal(uniforms(6, 100, 40, draws), whole)


def test_draws_are_uniform_and_far_positions_work() -> None:
    """Protects the augmentation's distribution, also at positions beyond 2**32 (a long ImageNet run passes 3e8)."""
    draws = uniforms(0, 2**40, 50_000, 3)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.02
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.02


def test_bits_are_pinned() -> None:
    """Protects old run folders: these numbers must never change, or a resumed run is another run."""
    assert shuffled(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    assert (uniforms(3, 5, 1, 3)[0] * 2**32).astype(np.uint64).tolist() == [43108690, 543895465, 1887525232]


def test_every_epoch_is_a_new_permutation() -> None:
    """Protects training from images left out or repeated: each epoch has every image once, in another order."""
    order = StreamOrder(seed=1, size=10, batch_size=4)
    line = np.concatenate([order.images(step) for step in range(5)])
    first, second = line[:10], line[10:20]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    other = StreamOrder(seed=2, size=10, batch_size=10).images(0)
    assert other.tolist() != first.tolist()


def test_the_line_of_images_does_not_depend_on_the_batch_size() -> None:
    """Protects the definition: position p holds permutation(epoch)[p % size], also for batches over several epochs."""
    small, large = StreamOrder(4, 7, 2), StreamOrder(4, 7, 20)
    line = np.concatenate([small.images(step) for step in range(20)])
    assert np.array_equal(np.concatenate([large.images(0), large.images(1)]), line)


def test_ranks_share_the_global_batch() -> None:
    """Protects data-parallel training: the ranks' rows, end to end, are the batch of a single process."""
    whole = StreamOrder(9, 50, 12).images(7)
    parts = [StreamOrder(9, 50, 12, rank, 3) for rank in range(3)]
    assert np.array_equal(np.concatenate([part.images(7) for part in parts]), whole)
    assert [part.first_position(7) for part in parts] == [84, 88, 92]


def test_bad_streams_are_refused() -> None:
    """Protects users from silent misuse: each message names the argument and what would be right."""
    with pytest.raises(InputError, match="divisible by world_size 3"):
        StreamOrder(0, 10, 4, 0, 3)
    with pytest.raises(InputError, match="rank is 2 of world_size 2"):
        StreamOrder(0, 10, 4, 2, 2)
    with pytest.raises(InputError, match="batch_size is 0"):
        StreamOrder(0, 10, 0)
    with pytest.raises(InputError, match="seed is -1"):
        StreamOrder(-1, 10, 2)
    with pytest.raises(InputError, match=r"seed is 1\.5"):
        StreamOrder(1.5, 10, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("amount", [0.25, 3])
def test_hold_out_is_stratified_and_complete(amount: float) -> None:
    """Protects the validation split: the same share of every class, nothing lost, nothing in both parts."""
    labels = np.repeat([2, 0, 1], [20, 8, 12]).astype(np.int64)
    kept, held = hold_out(labels, amount, ("a", "b", "c"))
    assert sorted([*kept, *held]) == list(range(40))
    wanted = [2, 3, 5] if amount == 0.25 else [3, 3, 3]
    assert np.bincount(labels[held]).tolist() == wanted
    assert np.all(np.diff(kept) > 0) and np.all(np.diff(held) > 0)
    again = hold_out(labels, amount, ("a", "b", "c"))
    assert np.array_equal(again[0], kept) and np.array_equal(again[1], held)
    assert held[labels[held] == 2].tolist() != list(range(wanted[2])), "the first images of a class are no random share"


@pytest.mark.parametrize("amount", [0, 0.0, 1.0, -3, True, float("nan")])
def test_hold_out_refuses_senseless_amounts(amount: float) -> None:
    """Protects against a split that is empty, everything, or a typo."""
    with pytest.raises(InputError, match=r"validation is .* share between 0 and 1"):
        hold_out(np.zeros(5, dtype=np.int64), amount, ("a",))


def test_hold_out_names_classes_that_are_too_small() -> None:
    """Protects ImageNet subsets: the split must leave every class something to train on, or say which it cannot."""
    labels = np.repeat([0, 1, 2], [10, 3, 4]).astype(np.int64)
    with pytest.raises(InputError, match=r"4 images a class, and 2 of 3 classes .* b \(3\), c \(4\)"):
        hold_out(labels, 4, ("a", "b", "c"))


def test_calibration_draw_is_a_subset_that_grows() -> None:
    """Protects comparisons of calibration sizes: fixed by the seed, no image twice, larger draws extend smaller."""
    large = draw_subset(100, 60, seed=3)
    assert len(set(large.tolist())) == 60
    assert np.array_equal(draw_subset(100, 20, seed=3), large[:20])
    assert not np.array_equal(draw_subset(100, 60, seed=4), large)
    for images in (0, 101):
        with pytest.raises(InputError, match=f"images is {images}"):
            draw_subset(100, images, seed=0)
