"""Tasks side by side in threads of one process, each with its share of the processor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Calls of several threads follow one another: they would share the processor anyway, and PyTorch has one number of
# threads for all threads that are yet to come.
_alone = threading.Lock()


class _Stopped(Exception):
    """A task ends because another one failed."""


def side_by_side(tasks: Sequence[Callable[[Callable[[], None]], Result]], threads: int) -> list[Result]:
    """Run tasks at the same time, without gradients, and return what they return, in their order.

    When a task raises, or Ctrl-C comes, the others end where they next call ``check``, and the error goes on.

    Args:
        tasks: each is called with ``check``, which it should call often.
        threads: of PyTorch's ops in each task (of OpenMP, whose setting belongs to the thread that makes it).
    """
    stop, started = threading.Event(), threading.Semaphore(0)

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def run(task: Callable[[Callable[[], None]], Result]) -> Result:
        torch.get_num_threads()  # a thread takes over PyTorch's number when it first asks, even if it has set its own
        torch.set_num_threads(threads)
        started.release()
        with torch.no_grad():  # a new thread begins with gradients
            return task(check)

    futures: list[Future[Result]] = []
    with _alone:
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(len(tasks), "spos_fast")
        try:
            try:
                futures += [pool.submit(run, task) for task in tasks]
                for _ in tasks:
                    started.acquire()
                torch.set_num_threads(before)  # what other threads begin with meanwhile
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # changes nothing where all are done
                pool.shutdown()
        finally:
            torch.set_num_threads(before)
    failed = [error for future in futures if (error := future.exception()) is not None]
    for error in failed:
        if not isinstance(error, _Stopped):
            raise error
    return [future.result() for future in futures]


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's ops run on the calling thread alone: those whose bits depend on how many threads there are."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
