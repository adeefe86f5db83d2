"""Several models in one pipeline: Beam's KeyedModelHandler, with a bound that holds."""

from __future__ import annotations

import collections
import logging
import os
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
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
      max_models: that hold weights, in a worker's memory at once; 0: any number.
    """

    def __init__(self, handlers: Mapping[str, Any], max_models: int = 0):
        super().__init__(
            [KeyModelMapping([key], _OneModel(handler)) for key, handler in handlers.items()]
        )
        self._max_models = max_models
        self._weighty = [key for key, handler in handlers.items() if handler.holds_weights]
        # Requests of all models are batched together.
        self._batching_of_widest: Mapping[str, Any] = max(
            (handler.batch_elements_kwargs() for handler in handlers.values()),
            key=lambda batching: batching["max_batch_size"],
        )

    def load_model(self) -> ModelManager:
        return ModelManager(self._id_to_mh_map, self._weighty, self._max_models)

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
            if problem := model.enter(key, os.getpid()):
                failure = Failure("model_not_loaded", problem)
                results += [
                    (key, (own, PredictionResult(request, failure)))
                    for _, (own, request) in elements
                ]
                continue
            try:
                results += super().run_inference(elements, model, inference_args)
            finally:
                model.leave(key, os.getpid())
        return results


class _Made:
    """Gives a model that is loaded already, and keeps it no longer."""

    def __init__(self, model: Any):
        self._models = [model]

    def load_model(self) -> Any:
        return self._models.pop()


class ModelManager(_ModelHandlerManager):
    """Beam's manager of a worker's models, with room for only so many.

    Args:
      handlers: by model key.
      weighty: keys of models that hold weights, and so need room.
      max_models: of these, at once; 0: any number.
    """

    def __init__(self, handlers: dict[str, Any], weighty: Collection[str], max_models: int):
        super().__init__(dict(handlers))
        self._handlers = handlers
        self._weighty, self._most = frozenset(weighty), max_models
        self._changed = threading.Condition()
        self._users: collections.Counter[tuple[str, int]] = collections.Counter()
        self._loading: set[str] = set()
        self._waiting: collections.deque[object] = collections.deque()
        self._failed: dict[str, tuple[float, str]] = {}

    def enter(self, key: str, pid: int) -> str:
        """Waits until a model is loaded and stays so; or says why it cannot be.

        Who came first is served first, so that a busy model does not keep another out.

        Args:
          pid: of the process that will use it; when that dies, it uses nothing any more.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            while not (self._waiting[0] is ticket and self._has_room(key)):
                if not self._changed.wait(timeout=5):
                    self._forget_dead()
            self._waiting.popleft()
            when, problem = self._failed.get(key, (0.0, ""))
            known = key in self._tag_map
            if not known and problem and time.monotonic() - when < RETRY_SECONDS:
                self._changed.notify_all()
                return problem
            self._users[key, pid] += 1
            if not known:
                self._make_room(key)
                self._loading.add(key)
            self._changed.notify_all()
        return "" if known else self._loaded(key, pid)

    def leave(self, key: str, pid: int) -> None:
        with self._changed:
            self._users[key, pid] -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Lets all models go."""
        with self._changed:
            for key in list(self._tag_map):
                self._let_go(key)

    def _in_use(self) -> set[str]:
        return {key for (key, _), users in self._users.items() if users > 0}

    def _has_room(self, key: str) -> bool:
        if key in self._loading:
            return False
        free = not self._most or len(self._in_use() & self._weighty) < self._most
        return key in self._tag_map or key not in self._weighty or free

    def _make_room(self, key: str) -> None:
        """Lets go the models that were not asked for the longest time, and are not in use."""
        in_use = self._in_use()
        held = {*self._tag_map, *self._loading} & self._weighty
        idle = [other for other in self._tag_map if other in held - in_use]
        while self._most and key in self._weighty and idle and len(held) >= self._most:
            held.remove(idle[0])
            self._let_go(idle.pop(0))

    def _let_go(self, key: str) -> None:
        tag = self._tag_map.pop(key)
        handle, reference = self._proxy_map.pop(tag)
        handle.release(reference)
        for path in Path(tempfile.gettempdir()).glob(f"{tag}*"):  # by which Beam finds it
            path.unlink(missing_ok=True)

    def _loaded(self, key: str, pid: int) -> str:
        """Loads a model, while others are asked."""
        problem = ""
        try:
            # Beam makes models under a lock of the process, which all that are asked need.
            self._mh_map[key] = _Made(self._handlers[key].load_model())
            self.load(key)
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            _log.warning("the model %s cannot be loaded: %s", key, problem)
        with self._changed:
            self._loading.remove(key)
            if problem:
                self._tag_map.pop(key, None)
                self._failed[key] = time.monotonic(), problem
                self._users[key, pid] -= 1
            else:
                self._failed.pop(key, None)
            self._changed.notify_all()
        return problem

    def _forget_dead(self) -> None:
        for key, pid in [user for user, count in self._users.items() if count > 0]:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                del self._users[key, pid]
            except PermissionError:
                continue
