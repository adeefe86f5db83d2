"""Keeps other libraries from importing what a run does not need, where it is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

UNUSED_BY_KERAS = ("matplotlib", "rouge_score", "tensorflow", "tensorflow_text", "torch")
"""What Keras and keras_hub import if they find it: plots, metrics and other backends."""


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Makes imports inside the context fail for modules that nothing has imported yet.

    Libraries that use them only if they are installed then do without. Other code can import them
    afterwards.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
