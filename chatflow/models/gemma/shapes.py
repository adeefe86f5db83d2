"""The few sizes of everything that is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from chatflow.errors import ModelError

TOTALS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
          16384, 24576, 32768)  # fmt: skip
"""Positions of a cache: prompt and answer."""
STREAMS = (2048, 4096, 8192, 16384, 32768)
"""Tokens of texts that are read one after the other."""
STEPS = (64, 256, 1024, 4096)
"""Tokens of an answer that one call decodes."""


class Shape(NamedTuple):
    """How much runs at once. There are few sizes, because each is compiled.

    Attributes:
      chunks: how many tokens of each row a prefill feeds at once, by its number of rows.
      batches: rows of one decoding batch.
      cache_bytes: the most for the caches of one batch.
      streams: how many tokens run at once in a stream of texts that are read, by its length.
      together: the most tokens of a stream of several texts.
      piece: how many tokens of a stream attend together, to as many at a time.
    """

    chunks: dict[int, int]
    batches: tuple[int, ...]
    cache_bytes: int
    streams: dict[int, int]
    together: int
    piece: int

    @classmethod
    def of_device(cls, dtype: str) -> Shape:
        """Returns the shape measured as best for weights of this type on this device; see
        bench/README.md."""
        device = jax.devices()[0]
        if device.platform == "cpu":
            # XLA multiplies a single row of bfloat16 or int8 with a slow kernel.
            one = 1 if dtype == "float32" else 2
            return cls({one: 64, 4: 32}, (one, 8, 16, 32, 64), 2 << 30,
                       {256: 64} | dict.fromkeys(STREAMS, 256), 2048, 64)  # fmt: skip
        memory = device.memory_stats() or {}
        free = memory.get("bytes_limit", 8 << 30) - memory.get("bytes_in_use", 0)
        return cls({1: 64, 8: 64, 64: 64}, (1, 8, 32, 64, 128), free // 4,
                   dict.fromkeys(STREAMS, 2048), 8192, 512)  # fmt: skip

    @property
    def blocks(self) -> tuple[int, ...]:
        """Rows of one prefill."""
        return tuple(self.chunks)

    def fed(self, tokens: int) -> int:
        """Returns the cache positions that `tokens` need while they are fed in whole chunks."""
        chunk = max(self.chunks.values())
        return -(-tokens // chunk) * chunk


class PromptTooLongError(ModelError):
    """A prompt and its answer are longer than the longest cache."""


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Returns the first of rising buckets that holds `size`, or raises `PromptTooLongError`."""
    for one in buckets:
        if size <= one:
            return one
    raise PromptTooLongError(
        "prompt_too_long",
        f"prompt and answer have {size:,} tokens; at most {buckets[-1]:,} are allowed",
    )
