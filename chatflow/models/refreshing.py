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
    """Returns the newest file of a pattern as a version, or `FIRST` (with `seen`) if none matches.

    `seen` is the version's time in seconds since 1970; 0 means now.
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

    Requests keep using the old weights until the new ones are loaded and tried. Loading needs room
    for both. Weights that cannot be loaded are refused and tried again after `RETRY_SECONDS`;
    weights that fail a trial are refused until they are written again.

    Args:
      load: returns a model with a version of the weights.
      first: the version to begin with; if it is refused, the weights that `--model` names.
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
        if wanted <= self._version:  # another caller has loaded it meanwhile
            return
        if wanted.weights != self._weights and (model := self._try(wanted)):
            old, (path, _) = self._model, self._weights
            self._model, self._weights = model, wanted.weights
            self._counts.update(old.new_counts())
            if path != wanted.path:  # else the new weights use the same local copy
                forget(path)
        self._version = wanted

    def _try(self, version: Version) -> LanguageModel | None:
        """Returns a model that answers the trials, or None if the weights are refused."""
        if time.monotonic() < self._refused.get(version.weights, 0.0):
            return None
        again = RETRY_SECONDS  # the cause may pass: a service is down, no room
        try:
            model = self._load(version)
            again = math.inf
            for result in model.answer(self._trials) if self._trials else ():
                check(result)
        except Exception as error:
            self._refused[version.weights] = time.monotonic() + again
            self._counts["updates_refused"] += 1
            _log.warning(
                "the new weights %s are refused; the old ones stay in use: %s: %s",
                version.path, type(error).__name__, one_line(error),
            )  # fmt: skip
            return None
        self._counts["updates"] += 1
        _log.warning("now using the new weights %s", version.path or "that --model names")
        return model


def check(result: Answer | Failure) -> None:
    """Raises `ValueError` if a trial was not answered or its scores are not finite."""
    if isinstance(result, Failure):
        raise ValueError(f"a trial failed: {result.reason}: {result.error}")
    scores = [score for _, score in result.tone_scores]
    if result.chosen is not None:
        scores += [p for values in result.chosen.chat.values() for p in values.values()]
    if not all(map(math.isfinite, scores)):
        raise ValueError("a trial's scores are not numbers, so the weights are broken")
