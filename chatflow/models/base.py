"""The base class of loaded models."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

from chatflow.models.requests import Answer, Failure, Request

OVER_BUDGET = "over_budget"
"""The reason of a failure when the budget is spent, so that no model may be asked."""


class Ledger(Protocol):
    """Notes answers as soon as they arrive. Called from any thread."""

    def refusal(self) -> Failure | None:
        """Returns why no model may be asked now."""

    def note(self, request: Request, answer: Answer | Failure) -> None:
        """Notes what a model answered, and what that has cost."""


class LanguageModel(abc.ABC):
    """A loaded model. Methods take and return plain values, so that other processes can call it."""

    @abc.abstractmethod
    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Returns one answer or failure per request, in order."""

    def answer_each(self, requests: Sequence[Request], ledger: Ledger) -> list[Answer | Failure]:
        """Returns what `answer` returns, as far as the ledger allows; notes each answer there."""
        if refusal := ledger.refusal():
            return [refusal] * len(requests)
        answers = self.answer(requests)
        for request, answer in zip(requests, answers, strict=True):
            ledger.note(request, answer)
        return answers

    def warm_up(self, requests: Sequence[Request]) -> None:  # noqa: B027 (most need none)
        """Prepares the model for requests like these."""

    loads = 1
    """Loaded copies of the weights that are not counted yet."""

    def counts(self) -> dict[str, int]:
        """Returns the model's own counters since the last call, by name."""
        return {}

    def new_counts(self) -> dict[str, int]:
        """Returns `counts()` and the counters of every model, for Beam's metrics."""
        loads, self.loads = self.loads, 0
        return {**self.counts(), "copies_loaded": loads}

    def throttled(self) -> float:
        """Returns the seconds that batches waited for a busy service since the last call."""
        return 0.0

    def close(self) -> None:  # noqa: B027 (not all have something to end)
        """Stops what the model has started; no requests may follow."""
