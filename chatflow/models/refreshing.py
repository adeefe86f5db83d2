"""A model whose weights are replaced while it answers."""

from __future__ import annotations

import collections
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import one_line
from chatflow.models.base import LanguageModel
from chatflow.models.requests import FIRST, Answer, Failure, Request, Version
from chatflow.weights.presets import MARKERS, forget

_log = logging.getLogger(__name__)

RETRY_SECONDS = 300.0


def newest_version(pattern: str, seen: float = 0.0) -> Version:
    """The file of a pattern that was written last, as weights; `FIRST` where there is none.

    Args:
      seen: when that is so, in seconds since 1970; 0: now.
    """
    files = FileSystems.match([pattern])[0].metadata_list
    first = FIRST._replace(seen=seen or time.time())
    if not files:
        return first
    latest = max(files, key=lambda file: (file.last_updated_in_seconds, file.path))
    folder, name = FileSystems.split(latest.path)
    path = folder if name in MARKERS else latest.path
    return first._replace(path=path, modified=latest.last_updated_in_seconds)


class RefreshedModel(LanguageModel):
    """Answers with the newest weights that its requests ask for.

    New weights are loaded beside the old ones, tried, and then take their place; whoever asks
    meanwhile is answered by the old. Weights that cannot be loaded are refused, and tried again
    after `RETRY_SECONDS`; those that do not answer the requests they are tried with, when they
    are written anew. Needs room for both while it loads.

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
        self._refused: dict[tuple[str, float], float] = {}
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

    def new_counts(self) -> dict[str, int]:
        self._counts.update(self._model.new_counts())
        new, self._counts = self._counts, collections.Counter()
        return dict(new)

    def close(self) -> None:
        self._model.close()

    def _take_up(self, wanted: Version) -> None:
        if wanted <= self._version:  # another caller did meanwhile
            return
        if wanted.weights != self._weights and (model := self._try(wanted)):
            old, (path, _) = self._model, self._weights
            self._model, self._weights = model, wanted.weights
            self._counts.update(old.new_counts())
            if path != wanted.path:  # else its copy is the new one's
                forget(path)
        self._version = wanted

    def _try(self, version: Version) -> LanguageModel | None:
        """A model that answers; None for one that is refused."""
        if time.monotonic() < self._refused.get(version.weights, 0.0):
            return None
        again = RETRY_SECONDS  # what they lack may come: a service that is away, room
        try:
            model = self._load(version)
            again = math.inf
            for result in model.answer(self._trials) if self._trials else ():
                check(result)
        except Exception as error:
            self._refused[version.weights] = time.monotonic() + again
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
