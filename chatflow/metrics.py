"""Counts in Beam's metrics, and in a copy in this process for the progress display.

Beam's direct runner shows its metrics only after a run. A local run happens in the process of the
command line, which shows the copy while it runs. On the workers of a cluster, nobody reads it.
"""

from __future__ import annotations

import collections
import functools
import threading
from typing import Any

from apache_beam.metrics import Metrics

NAMESPACE = "chatflow"

_lock = threading.Lock()
_local: collections.Counter[str] = collections.Counter()


def count(name: str, by: int = 1) -> None:
    """Adds to a counter, e.g. `chats_read`, `dead_letters/answer/not_json`."""
    if by:
        _counter(name).inc(by)
        with _lock:
            _local[name] += by


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
