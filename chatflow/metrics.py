"""Counts in Beam's metrics, and in a copy in this process for the progress display.

Beam's direct runner shows its metrics only after a run. A local run happens in the process of the
command line, which shows the copy while it runs, what it waits for, and its newest results. On the
workers of a cluster, nobody reads these.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

from apache_beam.metrics import Metrics

NAMESPACE = "chatflow"

_lock = threading.Lock()
_local: collections.Counter[str] = collections.Counter()
_waits: dict[object, tuple[str, float]] = {}
_results: collections.deque[Any] = collections.deque(maxlen=5)


def count(name: str, by: int = 1) -> None:
    """Adds to a counter, e.g. `chats_read`, `dead_letters/answer/not_json`."""
    if by:
        _counter(name).inc(by)
        with _lock:
            _local[name] += by


def note(name: str, by: int) -> None:
    """Adds to the local copy alone: what a part of a batch has done, before Beam counts it."""
    with _lock:
        _local[name] += by


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says that the run waits for something, e.g. a model that is loaded."""
    key = object()
    with _lock:
        _waits[key] = what, time.monotonic()
    try:
        yield
    finally:
        with _lock:
            del _waits[key]


def waits() -> list[tuple[str, float]]:
    """Returns what the run waits for now, each with the seconds that it has taken."""
    with _lock:
        return [(what, time.monotonic() - since) for what, since in _waits.values()]


def result(record: Any) -> None:
    """Keeps a result for the display, which shows the newest."""
    with _lock:
        _results.append(record)


def results() -> list[Any]:
    """Returns the newest results, the newest last."""
    with _lock:
        return list(_results)


def observe(name: str, value: int) -> None:
    """Adds a value to a distribution; the name ends in its unit, e.g. `latency_ms`."""
    _distribution(name).update(value)


@functools.lru_cache(maxsize=4096)
def _counter(name: str) -> Any:
    return Metrics.counter(NAMESPACE, name)


@functools.cache
def _distribution(name: str) -> Any:
    return Metrics.distribution(NAMESPACE, name)


def local_counts() -> dict[str, int]:
    with _lock:
        return dict(_local)


def reset_local_counts() -> None:
    with _lock:
        _local.clear()
        _results.clear()
