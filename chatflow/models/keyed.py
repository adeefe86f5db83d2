"""Several models in one pipeline: Beam's KeyedModelHandler, with a bound that holds."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apache_beam.ml.inference.base import (
    KeyedModelHandler,
    KeyModelMapping,
    PredictionResult,
    _ModelHandlerManager,
)

from chatflow.errors import one_line
from chatflow.models.handlers import METRICS
from chatflow.models.requests import Failure, Request

RETRY_SECONDS = 60.0
"""A model that could not be loaded is tried again after this."""

_log = logging.getLogger(__name__)

Pair = tuple[Any, Request]
"""A request with a key that goes with it, as for Beam's handler of one model."""


class _OneModel(KeyedModelHandler):
    """One of several models; Beam warns of each that batches in a way of its own."""

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        return {}


class PerKeyModelHandler(KeyedModelHandler):
    """Answers each request with the model that its key names.

    Elements are `(model, (key, request))`, results `(model, (key, PredictionResult))`. Models are
    loaded when they are first asked, and the one that was not asked for the longest time makes
    room for another. A model that cannot be loaded fails its own requests alone.

    Beam's own bound, `max_models_per_worker_hint`, grows with each thread and step, and counts
    no model that is still in use when it is let go; this one is per worker, and none is let go
    in use.

    Args:
      handlers: by model key.
      max_models: in a worker's memory at once; 0: any number.
    """

    def __init__(self, handlers: Mapping[str, Any], max_models: int = 0):
        super().__init__(
            [KeyModelMapping([key], _OneModel(handler)) for key, handler in handlers.items()]
        )
        self._max_models = max_models
        # Requests of all models are batched together.
        self._batching_of_widest: Mapping[str, Any] = max(
            (handler.batch_elements_kwargs() for handler in handlers.values()),
            key=lambda batching: batching["max_batch_size"],
        )

    def load_model(self) -> ModelManager:
        return ModelManager(self._id_to_mh_map, self._max_models)

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        return self._batching_of_widest

    def get_metrics_namespace(self) -> str:
        return METRICS

    def run_inference(
        self,
        batch: Sequence[tuple[str, Pair]],
        model: ModelManager,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[tuple[str, tuple[Any, PredictionResult]]]:
        """Answers a batch, model by model."""
        by_key: dict[str, list[tuple[str, Pair]]] = collections.defaultdict(list)
        for element in batch:
            by_key[element[0]].append(element)
        results: list[tuple[str, tuple[Any, PredictionResult]]] = []
        for key, elements in by_key.items():
            if problem := model.enter(key):
                failure = Failure("model_not_loaded", problem)
                results += [
                    (key, (own, PredictionResult(request, failure)))
                    for _, (own, request) in elements
                ]
                continue
            try:
                results += super().run_inference(elements, model, inference_args)
            finally:
                model.leave(key)
        return results


class ModelManager(_ModelHandlerManager):
    """Beam's manager of a worker's models, with room for only so many.

    Args:
      handlers: by model key.
      max_models: 0: any number.
    """

    def __init__(self, handlers: dict[str, Any], max_models: int):
        super().__init__(handlers)
        if max_models:
            self.increment_max_models(max_models)
        self._changed = threading.Condition()
        self._users: collections.Counter[str] = collections.Counter()
        self._waiting: collections.deque[object] = collections.deque()
        self._failed: dict[str, tuple[float, str]] = {}

    def enter(self, key: str) -> str:
        """Waits until a model is loaded and stays so; or says why it cannot be.

        Who came first is served first, so that a busy model does not keep another out.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._has_room(key))
            self._waiting.popleft()
            self._changed.notify_all()
            problem = self._loaded(key)
            if not problem:
                self._users[key] += 1
            return problem

    def leave(self, key: str) -> None:
        with self._changed:
            self._users[key] -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Lets all models go."""
        with self._changed:
            while self._tag_map:
                handle, reference = self._proxy_map.pop(self._tag_map.popitem()[1])
                handle.release(reference)

    def _has_room(self, key: str) -> bool:
        in_use = sum(users > 0 for users in self._users.values())
        return key in self._tag_map or not self._max_models or in_use < self._max_models

    def _loaded(self, key: str) -> str:
        when, problem = self._failed.get(key, (0.0, ""))
        if problem and time.monotonic() - when < RETRY_SECONDS:
            return problem
        for other in list(self._tag_map):
            if self._users[other]:  # what is let go is the first that is not in use
                self._tag_map.move_to_end(other)
        try:
            self.load(key)
        except Exception as error:
            self._tag_map.pop(key, None)
            problem = f"{type(error).__name__}: {one_line(error)}"
            _log.warning("the model %s cannot be loaded: %s", key, problem)
            self._failed[key] = time.monotonic(), problem
            return problem
        self._failed.pop(key, None)
        return ""
