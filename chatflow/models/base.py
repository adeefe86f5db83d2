"""The base of loaded models."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from chatflow.models.requests import Answer, Failure, Request


class LanguageModel(abc.ABC):
    """A loaded model. Its methods take and give plain values, so that they can be
    called from other processes."""

    @abc.abstractmethod
    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """One answer or failure for each request, in their order."""

    def warm_up(self, requests: Sequence[Request]) -> None:  # noqa: B027 (most need none)
        """Makes the model ready for such requests."""

    loads = 1
    """Copies of weights that were loaded, and not counted yet."""

    def counts(self) -> dict[str, int]:
        """What the model counted since it was last asked, by name."""
        return {}

    def new_counts(self) -> dict[str, int]:
        """The same, with what all models count, for Beam's metrics."""
        loads, self.loads = self.loads, 0
        return {**self.counts(), "copies_loaded": loads}

    def throttled(self) -> float:
        """Returns the seconds that batches waited for a busy service since this was last asked."""
        return 0.0

    def close(self) -> None:  # noqa: B027 (not all have something to end)
        """Ends what the model has started; it is asked no more."""
