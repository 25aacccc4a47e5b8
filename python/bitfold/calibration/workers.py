"""Threads that compute with one core each: a piece of work gives the same bits, however many of them there are.

torch and the libraries below it may cut one product differently for another number of threads, and then sum in another
order. So work is cut here, into pieces whose sizes don't depend on the machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as torch has, each with torch at one; a context manager. Gradients are off in all of them."""

    def __enter__(self) -> Workers:
        self.count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count)
        # All of them at once, so that none sets torch's number later, when other work runs.
        barrier = threading.Barrier(self.count)
        wait([self._pool.submit(_begin, barrier) for _ in range(self.count)])
        torch.set_num_threads(self.count)
        return self

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """function of each item, in their order. The first exception in that order is raised; what hasn't begun by
        then is left undone."""
        futures = [self._pool.submit(torch.no_grad()(function), item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def _begin(barrier: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread that asks for the first time takes over torch's number, then keeps its own
    torch.set_num_threads(1)
    barrier.wait()
