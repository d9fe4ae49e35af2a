"""Tasks side by side in threads of one process, each with its share of the processor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")


class _Stopped(Exception):
    """A task ends because another one failed."""


def side_by_side(tasks: Sequence[Callable[[Callable[[], None]], Result]], threads: int) -> list[Result]:
    """Run tasks at the same time, without gradients, and return what they return, in their order.

    When a task raises, or Ctrl-C comes, the others end where they next call ``check``, and the error goes on.

    Args:
        tasks: each is called with ``check``, which it should call often.
        threads: of PyTorch's ops in each task (of OpenMP, whose setting belongs to the thread that makes it).
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def run(task: Callable[[Callable[[], None]], Result]) -> Result:
        torch.set_num_threads(threads)
        with torch.no_grad():  # a new thread begins with gradients
            return task(check)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(len(tasks), "spos_fast") as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # changes nothing where all are done
            wait(futures)
            torch.set_num_threads(before)  # what threads begin with that are yet to come
    failed = [error for future in futures if (error := future.exception()) is not None]
    for error in failed:
        if not isinstance(error, _Stopped):
            raise error
    return [future.result() for future in futures]
