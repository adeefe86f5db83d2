"""The base class of chatflow's model handlers: one result per request, whatever happens."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

from chatflow import metrics
from chatflow.chat_text import estimate_tokens
from chatflow.errors import ElementError
from chatflow.models.base import LanguageModel
from chatflow.models.inference import ModelHandler, PredictionResult
from chatflow.models.requests import FIRST, Answer, Failure, Request, Version
from chatflow.options import ONE_BUNDLE, Batching, WorkerSettings

METRICS = "chatflow_model"
"""Namespace of RunInference's own metrics."""

_log = logging.getLogger(__name__)


def prompt_length(element: Any) -> int:
    """Returns the estimated tokens of an element's longest prompt, without the shared start."""
    while isinstance(element, tuple):  # Beam passes a `KeyedModelHandler`'s elements with keys
        element = element[1]
    return max(estimate_tokens(part.prompt[part.shared :]) for part in element.parts)


ModelT = TypeVar("ModelT", bound=LanguageModel)

_own_models: weakref.WeakValueDictionary[str, LanguageModel] = weakref.WeakValueDictionary()
_own_models_lock = threading.Lock()

_ahead: dict[str, concurrent.futures.Future[LanguageModel]] = {}


class LanguageModelHandler(
    abc.ABC, ModelHandler[Request, PredictionResult, ModelT], Generic[ModelT]
):
    """A Beam model handler for requests, used through `RunInference`.

    Results are `PredictionResult`s whose inference is an `Answer` or a `Failure`. If a batch fails,
    its requests are asked one by one, so that one bad request does not fail the others.

    Args:
      name: the model's name in results and their ids.
      settings: how a worker keeps the model; None: each process has its own copy.
      expected: requests for which the model is warmed up when it is loaded.
      updates: file pattern; the newest has the weights, also later; empty: they never change.
    """

    def __init__(
        self,
        name: str,
        batching: Batching = ONE_BUNDLE,
        settings: WorkerSettings | None = None,
        expected: tuple[Request, ...] = (),
        updates: str = "",
    ):
        shared = settings if settings and settings.large_model else None
        super().__init__(
            min_batch_size=batching.max_batch_size,
            max_batch_size=batching.max_batch_size,
            max_batch_duration_secs=batching.max_batch_duration_secs or None,
            batch_length_fn=prompt_length if batching.boundaries else None,
            batch_bucket_boundaries=list(batching.boundaries) or None,
            large_model=shared is not None,
            model_copies=shared.model_copies if shared else None,
        )
        self._identity = uuid.uuid4().hex
        self.name = name
        self.expected = expected
        self.updates = updates

    @abc.abstractmethod
    def load(self, version: Version = FIRST) -> ModelT:
        """Returns a model with these weights; `FIRST` means those that its name says."""

    def load_model(self) -> ModelT:
        """Returns the model; unless processes share one, all steps of a process get the same."""
        if self.share_model_across_processes():
            return self._new()
        with _own_models_lock:  # Beam shares a model only among the threads of a step
            model = _own_models.get(self._identity)
            if model is None:
                model = _own_models[self._identity] = self._new()
            return cast(ModelT, model)

    loads_ahead = False
    """Whether loading is so short that whoever stops a run can wait for its end."""

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Begins to load the model in this process, if that is short; `load_model` returns it.

        A pipeline itself loads a model only when the first elements have come to it.
        """
        if not self.loads_ahead:
            yield
            return
        with concurrent.futures.ThreadPoolExecutor(1, "loader") as loader:
            _ahead[self._identity] = loader.submit(self._made)
            try:
                yield
            finally:
                _ahead.pop(self._identity, None)

    def _new(self) -> ModelT:
        loading = _ahead.pop(self._identity, None)
        return self._made() if loading is None else cast(ModelT, loading.result())

    def _made(self) -> ModelT:
        if not self.updates:
            return self._loaded()
        from chatflow.models.refreshing import RefreshedModel, newest_version

        try:
            first = newest_version(self.updates)
        except Exception as error:  # each filesystem has its own
            _log.warning("--model_updates=%s cannot be listed: %s", self.updates, error)
            first = FIRST
        refreshed: Any = RefreshedModel(self._loaded, first, self.expected)
        return cast(ModelT, refreshed)

    def _loaded(self, version: Version = FIRST) -> ModelT:
        with metrics.waiting(f"loading {self.name}"):
            model = self.load(version)
            model.warm_up(self.expected)
        return model

    holds_weights = True
    """Whether the model is in the worker's memory, not behind a service."""

    def get_metrics_namespace(self) -> str:
        return METRICS

    def get_num_bytes(self, batch: Sequence[Request]) -> int:
        return sum(len(part.prompt) for request in batch for part in request.parts)

    def run_inference(
        self,
        batch: Sequence[Request],
        model: ModelT,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[PredictionResult]:
        """Returns one result per request, in order; see the class."""
        inferences = ask(model.answer, batch)
        for name, number in model.new_counts().items():
            if number:
                metrics.count(f"model/{name}", number)
        for request in batch:
            metrics.count(f"answered/{request.task}")
        metrics.observe("batch_size", len(batch))
        return [
            PredictionResult(request, inference, getattr(inference, "model", self.name))
            for request, inference in zip(batch, inferences, strict=True)
        ]


def ask(
    answer: Callable[[Sequence[Request]], list[Answer | Failure]], batch: Sequence[Request]
) -> list[Answer | Failure]:
    """Returns one answer or failure per request; if the batch fails, asks each request alone."""
    started = time.monotonic()
    try:
        answers = answer(batch)
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(batch)} requests, but {len(answers)} answers")
        return answers
    except Exception as error:  # remote models return failures instead
        if len(batch) > 1:
            _log.warning("a batch of %d failed, asking one by one: %s", len(batch), error)
            return [one for request in batch for one in ask(answer, [request])]
        seconds = time.monotonic() - started
        if isinstance(error, ElementError):
            return [Failure(error.reason, str(error), error.answer)]
        kind = type(error).__name__
        _log.warning("a request failed after %.1f s: %s: %s", seconds, kind, error)
        return [Failure("model_error", f"{kind}: {error}")]
