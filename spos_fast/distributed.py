"""The other processes of a ``torchrun`` job: who there is, values from all of them, and who is gone."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from spos_fast.errors import InputError, RankError

# Seconds without a sign of life after which a rank counts as gone, and until its first one.
TIMEOUT, START_TIMEOUT = 30.0, 600.0
# Seconds between two looks for values: short at first, since ranks that share out work well end about together.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


def rank() -> int:
    """Number of this process, 0 without ``torch.distributed``."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without ``torch.distributed``."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def process_group(device: torch.device, timeout: float = TIMEOUT) -> Iterator[Exchange]:
    """Join the processes that ``torchrun`` started; in a process started by hand the exchange is with itself.

    Args:
        device: where this process computes; decides between NCCL and gloo.
        timeout: see :class:`Exchange`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        with Exchange(timeout) as exchange:
            yield exchange
        return
    # Rank 0 alone recalibrates and tests a retrained network while the others wait for the next one.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    try:
        with Exchange(timeout) as exchange:
            yield exchange
    finally:
        distributed.destroy_process_group()


class Exchange:
    """Exchange of small values between all ranks, however far apart in time, that notices when one of them is gone.

    A collective of gloo or NCCL waits for a dead rank until its timeout, which would have to be longer than the longest
    piece of work, and does not say whom it waited for. Here the values go through the store of the process group, and a
    thread of every rank counts up a sign of life in it. A rank that computes for hours is waited for; one that was
    killed, raised or ended is named. A rank that hangs but lives is waited for, too.

    All ranks make it, and call its methods, in the same order. A context manager: leaving it because of an exception
    tells the other ranks. With one process, or without ``torch.distributed``, every call returns at once.

    Args:
        timeout: seconds without a sign of life after which a rank counts as gone. Ranks that have not made theirs are
            waited for ten minutes; so make it before anything that takes longer on one rank than on another.

    Raises:
        InputError: the timeout is no positive number.
    """

    _numbers = itertools.count()

    def __init__(self, timeout: float = TIMEOUT) -> None:
        if not 0 < timeout < float("inf"):
            raise InputError(f"timeout: got {timeout}; expected a positive number of seconds")
        self.timeout, self.rank, self.size = timeout, rank(), world_size()
        self._round = 0
        self._beat: threading.Thread | None = None
        if self.size == 1:
            return
        store: Any = distributed.PrefixStore(f"spos_fast/{next(self._numbers)}", distributed_c10d._get_default_store())
        # Connections of their own: a blocking call of somebody else's must not look like death.
        self._store, beat_store = store.clone(), store.clone()
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, args=(beat_store,), name="sign of life", daemon=True)
        self._beat.start()
        # A daemon thread that is inside the store while the interpreter shuts down would abort the process.
        atexit.register(self._end)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; floats keep every bit.

        Args:
            value: anything that JSON can hold, NaN included.

        Raises:
            RankError: a rank is gone, has failed, or has left; names it.
        """
        if self.size == 1:
            return [value]
        if self._beat is None:
            raise RankError(f"rank {self.rank} has left the exchange and cannot take part any more")
        number, self._round = self._round, self._round + 1
        keys = [f"{number}/{other}" for other in range(self.size)]
        with _store_of_the_job():
            self._store.set(keys[self.rank], json.dumps(value))
            self._wait(keys)
            values = [json.loads(self._store.get(key)) for key in keys]
            if number:
                # Whoever is in this round has read all of the one before.
                self._store.delete_key(f"{number - 1}/{self.rank}")
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; see :meth:`all_gather`."""
        return self.all_gather(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        """Return when all ranks are here; see :meth:`all_gather`."""
        self.all_gather(None)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with an error, and leave. What they raise names this rank."""
        kind = type(error).__name__
        self._end(str(error) if isinstance(error, RankError) else f"rank {self.rank} failed ({kind}: {error})")

    def close(self) -> None:
        """Leave. Rank 0 waits until the others have left or are gone, as the store may be in its process."""
        self._end()
        if self.rank == 0 and self.size > 1:
            with contextlib.suppress(RankError), _store_of_the_job():
                self._wait([f"left/{other}" for other in range(1, self.size)])

    def _end(self, failure: str = "") -> None:
        if self._beat is None:
            return
        atexit.unregister(self._end)
        self._ended.set()
        self._beat.join()
        self._beat = None
        with contextlib.suppress(RankError), _store_of_the_job():
            if failure:
                self._store.set("failed", failure)
            self._store.set(f"left/{self.rank}", "")

    def _keep_alive(self, store: Any) -> None:
        # The end of the store is for the other thread to report.
        with contextlib.suppress(RuntimeError):
            store.add(f"alive/{self.rank}", 1)
            while not self._ended.wait(self.timeout / 10):
                store.add(f"alive/{self.rank}", 1)

    def _wait(self, keys: list[str]) -> None:
        """Wait until the store has all keys; the number after a key's slash is the rank that writes it."""
        signs: dict[int, tuple[int, float]] = {}
        pause, looked = _FIRST_PAUSE, -float("inf")
        while not self._store.check(keys):
            self._raise_failure()
            if time.monotonic() - looked > min(1.0, self.timeout / 10):
                self._look_for_life(keys, signs)
                looked = time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _raise_failure(self) -> None:
        if self._store.check(["failed"]):
            raise RankError(self._store.get("failed").decode())

    def _look_for_life(self, keys: list[str], signs: dict[int, tuple[int, float]]) -> None:
        """Raise if a rank whose key is missing has left, or has given no sign of life for too long.

        Args:
            keys: as in ``_wait``.
            signs: for every rank its last count, and when it came by this process's clock; kept from look to look.
        """
        now, gone = time.monotonic(), []
        for key in keys:
            other = int(key.split("/")[1])
            left = self._store.check([f"left/{other}"])
            if self._store.check([key]):
                continue
            if left:
                self._raise_failure()  # a rank that fails says so before it leaves
                raise RankError(f"rank {other} has ended while other ranks wait for it")
            count = self._store.add(f"alive/{other}", 0)
            before, since = signs.get(other, (-1, now))
            if count != before:
                signs[other] = (count, now)
            elif now - since > (self.timeout if count else START_TIMEOUT):
                gone.append(other)
        if gone:
            names = ", ".join(map(str, gone))
            subject = f"rank {names} is" if len(gone) == 1 else f"ranks {names} are"
            raise RankError(f"{subject} gone: no sign of life for {self.timeout:g} s")


@contextmanager
def _store_of_the_job() -> Iterator[None]:
    """Turn the loss of the store into an error that says whose process it was."""
    try:
        yield
    except distributed.DistError as error:
        first = (str(error).splitlines() or [""])[0]
        raise RankError(f"rank 0 is gone, or whatever process holds the store of the job ({first})") from None
