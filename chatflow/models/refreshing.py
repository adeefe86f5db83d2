"""A model whose weights are replaced while it answers."""

from __future__ import annotations

import collections
import logging
import math
import threading
from collections.abc import Callable, Sequence

from chatflow.errors import one_line
from chatflow.models.handlers import LanguageModel
from chatflow.models.presets import forget
from chatflow.models.requests import FIRST, Answer, Failure, Request, Version

_log = logging.getLogger(__name__)


class RefreshedModel(LanguageModel):
    """Answers with the newest weights that its requests ask for.

    New weights are loaded beside the old ones, tried, and then take their place; whoever asks
    meanwhile is answered by the old. Weights that cannot be loaded, or that do not answer the
    requests they are tried with, are refused, and not tried again before they are written
    anew. Needs room for both while it loads.

    Args:
      load: gives a model with a version of the weights.
      first: the version to begin with; where it is refused, those that `--model` names.
      trials: requests that a new version must answer.
    """

    def __init__(
        self,
        load: Callable[[Version], LanguageModel],
        first: Version = FIRST,
        trials: Sequence[Request] = (),
    ):
        self._load, self._trials = load, tuple(trials)
        self._counts: collections.Counter[str] = collections.Counter()
        self._refused: set[tuple[str, float]] = set()
        self._loading = threading.Lock()
        model = self._try(first) if first.path else None
        self._weights = first.weights if model else FIRST.weights
        self._model = model or load(FIRST)
        self._version = first

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        wanted = max((request.version for request in requests), default=FIRST)
        if wanted > self._version and self._loading.acquire(blocking=False):
            try:
                self._take_up(wanted)
            finally:
                self._loading.release()
        return self._model.answer(requests)

    loads = 0

    def counts(self) -> dict[str, int]:
        new, self._counts = self._counts, collections.Counter()
        return dict(new + collections.Counter(self._model.counts()))

    def new_counts(self) -> dict[str, int]:
        return {**self.counts(), "copies_loaded": self._model.new_counts()["copies_loaded"]}

    def close(self) -> None:
        self._model.close()

    def _take_up(self, wanted: Version) -> None:
        if wanted <= self._version:  # another caller did meanwhile
            return
        if wanted.weights != self._weights and (model := self._try(wanted)):
            (old, _), self._model, self._weights = self._weights, model, wanted.weights
            if old != wanted.path:  # else its copy is the new one's
                forget(old)
        self._version = wanted

    def _try(self, version: Version) -> LanguageModel | None:
        """A model that answers; None for one that is refused."""
        if version.weights in self._refused:
            return None
        try:
            model = self._load(version)
            for result in model.answer(self._trials) if self._trials else ():
                check(result)
        except Exception as error:
            self._refused.add(version.weights)
            self._counts["updates_refused"] += 1
            _log.warning(
                "the new weights %s are refused, the old go on: %s: %s",
                version.path, type(error).__name__, one_line(error),
            )  # fmt: skip
            return None
        self._counts["updates"] += 1
        _log.warning("the new weights %s are taken up", version.path or "are those of --model")
        return model


def check(result: Answer | Failure) -> None:
    """Raises `ValueError` where a trial was not answered, or with no numbers."""
    if isinstance(result, Failure):
        raise ValueError(f"a trial failed: {result.reason}: {result.error}")
    if not all(math.isfinite(score) for _, score in result.tone_scores):
        raise ValueError("a trial's scores are no numbers, so the weights are broken")
