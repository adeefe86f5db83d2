"""Batches across callers: requests of several threads and processes, run together."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Merger(Generic[T, R]):
    """Runs items of concurrent callers in common batches, on a thread of its own.

    While a batch runs, what arrives is collected for the next; an item that finds
    nothing running waits for others, but no longer than it may.

    Args:
      run: answers a batch, item by item, in order; whatever it raises, every caller of
        that batch is raised.
      most: items in a batch.
      seconds: how long an item may wait for others before its batch is run.
    """

    def __init__(self, run: Callable[[Sequence[T]], Sequence[R]], most: int, seconds: float):
        self._run, self._most, self._seconds = run, most, seconds
        self._waiting: collections.deque[tuple[T, float, concurrent.futures.Future[R]]] = (
            collections.deque()
        )
        self._arrived = threading.Condition()
        self._closed = False
        threading.Thread(target=self._serve, name="merger", daemon=True).start()

    def __call__(self, items: Sequence[T]) -> list[R]:
        """Answers items, in their order, when their batches have run."""
        now = time.monotonic()
        futures: list[concurrent.futures.Future[R]] = [concurrent.futures.Future() for _ in items]
        with self._arrived:
            self._waiting.extend(
                (item, now, future) for item, future in zip(items, futures, strict=True)
            )
            self._arrived.notify()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the thread, when nobody can call any more."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()

    def _serve(self) -> None:
        while batch := self._next():
            try:
                results = self._run([item for item, _, _ in batch])
                for (_, _, future), result in zip(batch, results, strict=True):
                    future.set_result(result)
            except BaseException as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def _next(self) -> list[tuple[T, float, concurrent.futures.Future[R]]]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            until = self._waiting[0][1] + self._seconds
            self._arrived.wait_for(
                lambda: len(self._waiting) >= self._most, max(0.0, until - time.monotonic())
            )
            return [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]


def merged(method: Callable[[Sequence[T]], Sequence[R]], most: int, seconds: float) -> Merger[T, R]:
    """Batches for the method of an object, which they do not keep in memory."""
    weak: weakref.WeakMethod[Any] = weakref.WeakMethod(method)

    def run(items: Sequence[T]) -> Sequence[R]:
        alive = weak()
        assert alive is not None  # who waits for the answers has the object
        answers: Sequence[R] = alive(items)
        return answers

    merger: Merger[T, R] = Merger(run, most, seconds)
    weakref.finalize(method.__self__, merger.close).atexit = False  # type: ignore[attr-defined]
    return merger
