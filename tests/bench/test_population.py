"""The measured generations are evolution's, the same every time."""

from bench.population import OURS, PEERS, bred, table
from spos_fast.spaces import ShuffleNetV2


def test_generations_are_evolutions_and_repeatable():
    """Full populations of different architectures that share ever longer prefixes, a function of their size only."""
    space = ShuffleNetV2(input_size=32)
    populations = bred(space, 20, 6)
    assert [len(set(archs)) for archs in populations] == [20] * 7
    assert len({arch for archs in populations for arch in archs}) == 7 * 20
    shared = [len({arch.genes[:6] for arch in archs}) for archs in populations]
    assert shared[6] < shared[0]
    assert populations == bred(space, 20, 6)


def test_the_table_shows_the_fastest_against_both_peers():
    """One line a generation; ratios are those of the fastest of ours."""
    seconds = {name: {"median": float(value)} for value, name in enumerate(reversed((*PEERS, *OURS)), 1)}
    faster = {
        peer: {name: {"median": place + at / 10} for at, name in enumerate(OURS)} for place, peer in enumerate(PEERS)
    }
    row = {"generation": 5, "seconds": seconds, "times_faster": faster, "bytes_alive": 21e6}
    assert table([row]).splitlines()[-1] == (
        "| 5 | 6.00 s | 5.00 s | 4.00 s | 3.00 s | 2.00 s | 1.00 s | 0.30 | 1.30 | 21 MB |"
    )
