"""Beam's handler of remote models; one client per process."""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from apache_beam.io.components.rate_limiter import EnvoyRateLimiter

from chatflow.models.handlers import METRICS, LanguageModelHandler
from chatflow.models.inference import PredictionResult, RemoteModelHandler
from chatflow.models.remote.calls import RemoteModel
from chatflow.models.remote.clients import Client
from chatflow.models.requests import FIRST, Request, Version
from chatflow.models.spec import kind_of
from chatflow.options import ONE_BUNDLE, Batching, RemoteSettings


def client_of(name: str, settings: RemoteSettings) -> Client:
    """Returns the client of a remote model."""
    kind: Any = kind_of(name, "remote")
    client: Client = kind.client(name, settings)
    return client


_models: weakref.WeakValueDictionary[Any, RemoteModel] = weakref.WeakValueDictionary()
_models_lock = threading.Lock()


def shared_model(name: str, settings: RemoteSettings) -> RemoteModel:
    """Returns the one model that all steps and threads of this process share."""
    with _models_lock:
        model = _models.get((name, settings))
        if model is None or model.closed:
            limiter = None
            if settings.rate_limit_service:
                limiter = EnvoyRateLimiter(
                    settings.rate_limit_service,
                    domain="chatflow",
                    descriptors=[{"model": name}],
                    namespace=METRICS,
                )
            model = RemoteModel(name, client_of(name, settings), settings, limiter)
            _models[name, settings] = model
        return model


def _never(error: Exception) -> bool:
    return False


class RemoteLanguageModelHandler(
    RemoteModelHandler[Request, PredictionResult, RemoteModel], LanguageModelHandler[RemoteModel]
):
    """A remote language model; see `models.spec.ModelSpec.name` for which there are.

    Each request is a separate call. All threads and steps of a process share the limit of calls in
    flight. A failed call is retried as `faults` says, within `RemoteSettings.retry_seconds`, with
    exponential pauses and full jitter, and not before the service's Retry-After or RetryInfo for
    that request. An unusable answer is sent back once, with the error. A request that still fails
    returns a `Failure`; the rest of the batch is unaffected.

    Beam's base class would retry and throttle whole batches, but `request` raises no errors. It is
    used for its signal of throttled time to the runner.
    """

    def __init__(
        self, model: str, settings: RemoteSettings, batching: Batching = ONE_BUNDLE
    ) -> None:
        # A batch ends with its slowest call, so batches of files are much larger than the number
        # of calls in flight. In streams they are smaller, so that answers do not wait for many.
        times = 2 if batching.max_batch_duration_secs else 16
        wide = dataclasses.replace(batching, max_batch_size=times * settings.max_in_flight)
        LanguageModelHandler.__init__(self, model, wide)
        # Beam's throttler counts calls in flight as failed, and sleeps 5 s at a time.
        RemoteModelHandler.__init__(
            self,
            namespace=METRICS,
            num_retries=0,
            retry_filter=_never,
            throttle_delay_secs=0,
        )
        self.settings = settings

    holds_weights = False

    def create_client(self) -> RemoteModel:
        return self.load()

    def load(self, version: Version = FIRST) -> RemoteModel:
        return shared_model(self.name, self.settings)

    def request(
        self,
        batch: Sequence[Request],
        model: RemoteModel,
        inference_args: dict[str, Any] | None = None,
    ) -> list[PredictionResult]:
        results = list(LanguageModelHandler.run_inference(self, batch, model, inference_args))
        if throttled := math.ceil(model.throttled()):
            self.throttler.throttling_signaler.signal_throttled(throttled)
        return results
