"""Counts events by address, so that nobody may do something too often."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict

ADDRESSES = 10_000
"""Addresses to remember at once."""


class Rate:
    """Counts at most `most` events in `seconds` for each address; a network of IPv6 is one."""

    def __init__(self, most: int, seconds: float = 60.0):
        self._most, self._seconds = most, seconds
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, address: str) -> int:
        """Adds an event; returns by how many there are too many."""
        with self._lock:
            began, count = self._found(address)
            self._counts[_key(address)] = began, count + 1
            while len(self._counts) > ADDRESSES:
                self._counts.popitem(last=False)
            return max(0, count + 1 - self._most)

    def is_full(self, address: str) -> bool:
        with self._lock:
            return self._found(address)[1] >= self._most

    def _found(self, address: str) -> tuple[float, int]:
        moment = time.monotonic()
        began, count = self._counts.get(_key(address), (moment, 0))
        return (began, count) if moment - began < self._seconds else (moment, 0)


def _key(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return address if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))
