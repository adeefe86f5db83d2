"""A model made of several: each request is answered by the one that it names."""

from __future__ import annotations

import collections
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from apache_beam.io.components.adaptive_throttler import ThrottlingSignaler

from chatflow.errors import one_line
from chatflow.models.base import LanguageModel, Ledger
from chatflow.models.handlers import METRICS, LanguageModelHandler, ask
from chatflow.models.inference import PredictionResult
from chatflow.models.kept import KeptAnswers, KeptSettings
from chatflow.models.requests import FIRST, Answer, Failure, Request, Version, with_others
from chatflow.options import ONE_COPY

RETRY_SECONDS = 60.0
"""How long after a failure a model is loaded again."""

_log = logging.getLogger(__name__)


_Way = Callable[[LanguageModel], Callable[[Sequence[Request]], list[Answer | Failure]]]


class SeveralModels(LanguageModel):
    """Answers each request with the model that `Request.model` names.

    A model is loaded when it is first asked, while others answer. If there is no room, the least
    recently asked of the idle models is closed. A model that cannot be loaded fails only its own
    requests.

    Args:
      handlers: by model key.
      max_models: how many models that hold weights are in memory at once; 0: any number.
    """

    def __init__(self, handlers: Mapping[str, LanguageModelHandler[Any]], max_models: int = 0):
        self._handlers, self._most = handlers, max_models
        self._weighty = {key for key, handler in handlers.items() if handler.holds_weights}
        self._changed = threading.Condition()
        self._models: dict[str, LanguageModel] = {}  # the most recently asked comes last
        self._users: collections.Counter[str] = collections.Counter()
        self._loading: set[str] = set()
        self._waiting: dict[object, str] = {}  # in order of arrival, so that none starves
        self._failed: dict[str, tuple[float, Failure]] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return self._answers(requests, lambda model: model.answer)

    def answer_each(self, requests: Sequence[Request], ledger: Ledger) -> list[Answer | Failure]:
        return self._answers(requests, lambda model: lambda some: model.answer_each(some, ledger))

    def _answers(self, requests: Sequence[Request], way: _Way) -> list[Answer | Failure]:
        by_model: dict[str, list[Request]] = {}
        for request in requests:
            by_model.setdefault(request.model, []).append(request)
        answers = {key: iter(self._answer(key, group, way)) for key, group in by_model.items()}
        found = [next(answers[request.model]) for request in requests]
        return with_others(requests, found, lambda others: self._answers(others, way))

    def new_counts(self) -> dict[str, int]:
        with self._changed:
            for model in self._models.values():
                self._counts.update(model.new_counts())
            new, self._counts = self._counts, collections.Counter()
        return dict(new)

    def throttled(self) -> float:
        with self._changed:
            return sum(model.throttled() for model in self._models.values())

    def close(self) -> None:
        with self._changed:
            for key in list(self._models):
                self._let_go(key)

    def _answer(self, key: str, requests: Sequence[Request], way: _Way) -> list[Answer | Failure]:
        model = self._acquire(key)
        if isinstance(model, Failure):
            return [model] * len(requests)
        try:
            return ask(way(model), requests)
        finally:
            del model  # before another model takes its room
            self._release(key)

    def _acquire(self, key: str) -> LanguageModel | Failure:
        """Returns a model that stays loaded until `_release`; waits its turn for room."""
        ticket = object()
        with self._changed:
            self._waiting[ticket] = key
            self._changed.wait_for(lambda: self._is_next(ticket) and self._has_room(key))
            del self._waiting[ticket]
            self._changed.notify_all()
            if model := self._models.pop(key, None):
                self._models[key] = model
                self._users[key] += 1
                return model
            failed_at, failure = self._failed.get(key, (-math.inf, None))
            if failure and time.monotonic() - failed_at < RETRY_SECONDS:
                return failure
            self._make_room(key)
            self._users[key] += 1
            self._loading.add(key)
        return self._load(key)

    def _release(self, key: str) -> None:
        with self._changed:
            self._users[key] -= 1
            self._changed.notify_all()

    def _is_next(self, ticket: object) -> bool:
        """Returns whether a ticket is next; those that wait for a loading model do not count."""
        ready = (one for one, key in self._waiting.items() if key not in self._loading)
        return next(ready, None) is ticket

    def _in_use(self) -> int:
        return sum(self._users[key] > 0 for key in self._weighty)

    def _has_room(self, key: str) -> bool:
        needs_none = key in self._models or key not in self._weighty or not self._most
        return needs_none or self._in_use() < self._most

    def _make_room(self, key: str) -> None:
        if self._most and key in self._weighty:
            idle = [one for one in self._models if one in self._weighty and not self._users[one]]
            for one in idle[: max(0, self._in_use() + len(idle) + 1 - self._most)]:
                self._let_go(one)

    def _let_go(self, key: str) -> None:
        model = self._models.pop(key)
        self._counts.update(model.new_counts())
        model.close()

    def _load(self, key: str) -> LanguageModel | Failure:
        loaded: LanguageModel | Failure
        try:
            loaded = self._handlers[key].load_model()
        except Exception as error:
            loaded = Failure("model_not_loaded", f"{type(error).__name__}: {one_line(error)}")
            _log.warning("the model %s cannot be loaded: %s", key, loaded.error)
        with self._changed:
            self._loading.remove(key)
            if isinstance(loaded, Failure):
                self._failed[key] = time.monotonic(), loaded
                self._users[key] -= 1
            else:
                self._models[key] = loaded
            self._changed.notify_all()
        return loaded


class SeveralModelsHandler(LanguageModelHandler[LanguageModel]):
    """Handles several models as one, with one copy per worker; see `SeveralModels`.

    With `kept`, they ask nothing twice, and spend no more than they may.
    """

    def __init__(
        self,
        handlers: Mapping[str, LanguageModelHandler[Any]],
        max_models: int = 0,
        kept: KeptSettings | None = None,
    ):
        super().__init__("several models", settings=ONE_COPY)
        self.handlers, self.max_models = handlers, max_models
        self.kept = kept

    def load(self, version: Version = FIRST) -> LanguageModel:
        models = SeveralModels(self.handlers, self.max_models)
        return KeptAnswers(models, self.kept) if self.kept is not None else models

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Returns the widest batching, because requests of all models share batches."""
        every = (handler.batch_elements_kwargs() for handler in self.handlers.values())
        return max(every, key=lambda batching: batching["max_batch_size"])

    def run_inference(
        self,
        batch: Sequence[Request],
        model: LanguageModel,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[PredictionResult]:
        results = super().run_inference(batch, model, inference_args)
        if throttled := math.ceil(model.throttled()):
            ThrottlingSignaler(METRICS).signal_throttled(throttled)
        return results
