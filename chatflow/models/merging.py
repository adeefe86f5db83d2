"""Merges requests of several threads and processes into common batches."""

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
    """Runs items of concurrent callers in common batches, on its own thread.

    Items that arrive while a batch runs go into the next one.

    Args:
      run: returns one result per item, in order; every caller of the batch gets what it raises.
      most: the most items in a batch.
      seconds: how long an item may wait for others before its batch runs.
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
        """Returns one result per item, in order, when their batches have run."""
        now = time.monotonic()
        futures: list[concurrent.futures.Future[R]] = [concurrent.futures.Future() for _ in items]
        with self._arrived:
            self._waiting.extend(
                (item, now, future) for item, future in zip(items, futures, strict=True)
            )
            self._arrived.notify()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the thread; nobody may call afterwards."""
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
    """Returns a merger for an object's method; the merger does not keep the object in memory."""
    weak: weakref.WeakMethod[Any] = weakref.WeakMethod(method)

    def run(items: Sequence[T]) -> Sequence[R]:
        alive = weak()
        assert alive is not None  # callers that wait for answers hold the object
        answers: Sequence[R] = alive(items)
        return answers

    merger: Merger[T, R] = Merger(run, most, seconds)
    weakref.finalize(method.__self__, merger.close).atexit = False  # type: ignore[attr-defined]
    return merger
