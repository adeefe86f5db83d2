"""Beam's handler of remote models; one client per process."""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from apache_beam.io.components.rate_limiter import EnvoyRateLimiter
from apache_beam.ml.inference.base import PredictionResult, RemoteModelHandler

from chatflow.errors import UsageError, one_line
from chatflow.models.handlers import METRICS, LanguageModelHandler
from chatflow.models.remote import faults
from chatflow.models.remote.calls import RemoteModel
from chatflow.models.remote.clients import Client
from chatflow.models.requests import FIRST, Request, Version
from chatflow.models.spec import Kind, ModelSpec, Say, kind_of
from chatflow.options import ONE_BUNDLE, Batching, RemoteSettings

CHECK_SECONDS = 15.0
"""The longest call to the service at launch."""

_NOT_OURS_TO_ASK = ("credentials", "http_401", "http_403")


def client_of(name: str, settings: RemoteSettings) -> Client:
    """Returns the client of a remote model."""
    kind = kind_of(name, "remote")
    assert isinstance(kind, Remote)
    return kind.client(name, settings)


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


class Remote(Kind):
    """`gemini-…` and endpoints of Vertex AI; the base of other services."""

    asked_by_json = True

    def check(self, spec: ModelSpec) -> None:
        """Checks the name and the settings without a call."""
        name, settings = spec.name, spec.remote
        from chatflow.models.remote.vertex import ENDPOINT

        if ENDPOINT.fullmatch(name):
            return
        if settings.endpoint_override:
            raise UsageError(f"--endpoint_override: only with an endpoint, not with --model={name}")
        if not name.startswith("gemini-"):
            raise UsageError(
                f"--model={name}: with --inference=remote give gemini-…, openai:NAME, "
                "anthropic:NAME or projects/P/locations/L/endpoints/E"
            )
        if not settings.project:
            raise UsageError(f"--model={name}: give --project, or set GOOGLE_CLOUD_PROJECT")
        if not settings.location:
            raise UsageError(
                f"--model={name}: give --location (or Beam's --region), or set "
                "GOOGLE_CLOUD_LOCATION"
            )
        from chatflow.models.remote.gemini import thinking_of

        thinking_of(name, settings.thinking)

    def client(self, name: str, settings: RemoteSettings) -> Client:
        """Returns a client that has made no call yet."""
        from chatflow.models.remote.vertex import ENDPOINT, EndpointClient

        if ENDPOINT.fullmatch(name):
            return EndpointClient(name, settings)
        from chatflow.models.remote.gemini import GeminiClient

        return GeminiClient(name, settings)

    def instruct(self, spec: ModelSpec) -> bool:
        return True

    def check_service(self, spec: ModelSpec, local: bool, say: Say) -> None:
        """Checks with the service that the model exists.

        Prints only a warning if the service cannot be reached, or refuses the credentials of this
        machine for a job that runs elsewhere: the workers may reach it.
        """
        settings = dataclasses.replace(
            spec.remote, request_timeout=min(spec.remote.request_timeout, CHECK_SECONDS)
        )
        model = RemoteModel(spec.name, client_of(spec.name, settings), settings)
        try:
            say(model.check())
        except UsageError:
            raise
        except Exception as error:
            fault = faults.classify(error)
            said = f"--model={spec.name}: {fault.reason}: {one_line(error)}"
            if fault.kind is faults.Kind.FATAL and (local or fault.reason not in _NOT_OURS_TO_ASK):
                raise UsageError(f"{said} (--check_endpoint=false does not ask)") from None
            say(f"warning: not checked: {said}")
        finally:
            model.close()

    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> RemoteLanguageModelHandler:
        return RemoteLanguageModelHandler(spec.name, spec.remote, spec.batching)
