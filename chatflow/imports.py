"""Keeps other libraries from importing what a run does not need, where it is installed."""

from __future__ import annotations

import contextlib
import importlib.abc
import sys
import threading
from collections.abc import Iterator
from typing import Any

UNUSED_BY_KERAS = ("matplotlib", "rouge_score", "tensorflow", "tensorflow_text", "torch")
"""What Keras and keras_hub import if they find it: plots, metrics and other backends."""


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Makes this thread's imports fail for modules that nothing has imported yet.

    Libraries that use them only if they are installed then do without. Other threads can import
    them, and so can other code afterwards.
    """
    hidden = _Hidden(frozenset(names), threading.get_ident())
    sys.meta_path.insert(0, hidden)
    try:
        yield
    finally:
        sys.meta_path.remove(hidden)


class _Hidden(importlib.abc.MetaPathFinder):
    """Finds nothing, and says so before the finders that would find the modules."""

    def __init__(self, names: frozenset[str], thread: int):
        self._names, self._thread = names, thread

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
