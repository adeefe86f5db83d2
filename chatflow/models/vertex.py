"""Models behind a service: one call a prompt, many in flight, an error value for each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import random
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from chatflow.errors import ModelError, UsageError
from chatflow.models.handlers import LanguageModel, LanguageModelHandler
from chatflow.models.requests import ONE_BUNDLE, Answer, Batching, Failure, RemoteSettings, Request

ENDPOINT = re.compile(r"projects/([^/]+)/locations/([^/]+)/endpoints/([^/]+)")

ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds; doubled by each attempt, with full jitter
LONGEST_PAUSE = 30.0


def check_name(name: str, settings: RemoteSettings) -> None:
    """Checks a remote model's name; calls nothing.

    Raises:
      UsageError: it is neither an endpoint nor a Gemini model with a project.
    """
    if ENDPOINT.fullmatch(name):
        return
    if not name.startswith("gemini-"):
        raise UsageError(
            f"--model={name}: with --inference=remote give gemini-… or "
            "projects/P/locations/L/endpoints/E"
        )
    if not (settings.project and settings.location):
        raise UsageError(
            f"--model={name}: give --project and --region, or set GOOGLE_CLOUD_PROJECT and "
            "GOOGLE_CLOUD_LOCATION"
        )


class Fault(NamedTuple):
    """What an exception of a client means.

    Attributes:
      reason: a short code for counting, e.g. `http_429`.
      again: trying again may help.
      wait: seconds that the service asks to wait at least.
    """

    reason: str
    again: bool
    wait: float = 0.0


def classify(error: Exception) -> Fault:
    """Says what an exception of google-genai, aiplatform, requests or httpx means."""
    if isinstance(error, ModelError):
        return Fault(error.reason, again=False)
    code = getattr(error, "code", None)
    if not isinstance(code, int):
        # A dedicated endpoint of aiplatform has the status in the text alone.
        found = re.match(r"(?:Status code:)?\s*(\d{3})\b", str(error))
        code = int(found[1]) if found else None
    if code is not None:
        return Fault(f"http_{code}", code in (408, 429) or code >= 500, _retry_after(error))
    kind = type(error).__name__
    if "Timeout" in kind:
        return Fault("timeout", again=True)
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK:
        return Fault("connection", again=True)
    return Fault(f"client_{kind}", again=False)


_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "aiohttp")


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:  # a date
        return 0.0


class RemoteModel(LanguageModel):
    """Answers each request with a call of its own; see `VertexModelHandler`."""

    def __init__(self, name: str, settings: RemoteSettings):
        self.name, self.settings = name, settings
        # One pool for the process: its threads are the calls in flight, whoever asks.
        self._pool = concurrent.futures.ThreadPoolExecutor(settings.max_in_flight)

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return list(self._pool.map(self._answer, requests))

    def _answer(self, request: Request) -> Answer | Failure:
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self.call(request)
            except Exception as error:
                fault = classify(error)
                if not fault.again or attempt == ATTEMPTS:
                    kind, raw = type(error).__name__, getattr(error, "answer", None)
                    text = f"{kind} after {attempt} calls: {error}"
                    return Failure(fault.reason, text[:1000], raw)
                pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.random()
                time.sleep(fault.wait + pause)
            else:
                return dataclasses.replace(answer, seconds=time.monotonic() - started)
        raise AssertionError("not reached")

    def call(self, request: Request) -> Answer:
        """One call to the service; raises whatever its client raises."""
        raise NotImplementedError


def finished(text: str | None, reason: str) -> str:
    """The text of an answer.

    Raises:
      ModelError: there is none: the service blocked it, or stopped before it began.
    """
    if not text:
        raise ModelError("no_answer", f"the service gave no text; finish reason {reason}")
    return text


class GeminiModel(RemoteModel):
    """A Gemini model on Vertex AI, through google-genai."""

    def __init__(self, name: str, settings: RemoteSettings):
        super().__init__(name, settings)
        from google import genai
        from google.genai import types

        self._types = types
        credentials = None
        if settings.api_endpoint.startswith("http://"):
            from google.oauth2.credentials import Credentials

            credentials = Credentials(token="none")  # type: ignore[no-untyped-call]
        self._client = genai.Client(
            vertexai=True,
            project=settings.project,
            location=settings.location,
            http_options=types.HttpOptions(
                timeout=round(settings.timeout * 1000),
                retry_options=types.HttpRetryOptions(attempts=1),  # we try again ourselves
                base_url=settings.api_endpoint or None,
            ),
            credentials=credentials,
        )

    def call(self, request: Request) -> Answer:
        (part,) = request.parts
        form: dict[str, Any] = {}
        if part.schema:
            # As an OpenAPI schema an enum is of strings only, so this is JSON Schema.
            form = {
                "response_mime_type": "application/json",
                "response_json_schema": part.schema,
            }
        response = self._client.models.generate_content(
            model=self.name,
            contents=part.prompt,
            config=self._types.GenerateContentConfig(
                temperature=0, max_output_tokens=part.max_tokens, **form
            ),
        )
        usage = response.usage_metadata
        candidates = response.candidates or []
        reason = candidates[0].finish_reason if candidates else None
        block = response.prompt_feedback.block_reason if response.prompt_feedback else None
        said = str(reason or block or "none").rsplit(".", 1)[-1]
        return Answer(
            finished(response.text if candidates else None, said),
            self.name,
            prompt_tokens=(usage and usage.prompt_token_count) or 0,
            answer_tokens=(usage and usage.candidates_token_count) or 0,
            finish_reason="length" if said == "MAX_TOKENS" else "stop",
        )


class EndpointModel(RemoteModel):
    """A text model on a Vertex AI endpoint that takes chat completions (Gemma on vLLM)."""

    def __init__(self, name: str, settings: RemoteSettings):
        super().__init__(name, settings)
        from google.cloud import aiplatform

        found = ENDPOINT.fullmatch(name)
        assert found is not None  # checked by check_name
        options: dict[str, Any] = {}
        if settings.api_endpoint:
            options["api_endpoint"] = settings.api_endpoint
        if settings.api_endpoint.startswith("http://"):
            from google.auth.credentials import AnonymousCredentials

            options |= {"credentials": AnonymousCredentials(), "api_transport": "rest"}  # type: ignore[no-untyped-call]
        aiplatform.init(project=found[1], location=found[2], **options)
        self._endpoint = aiplatform.Endpoint(name)

    def call(self, request: Request) -> Answer:
        (part,) = request.parts
        instance = {
            "@requestFormat": "chatCompletions",
            "messages": [{"role": "user", "content": part.prompt}],
            "max_tokens": part.max_tokens,
            "temperature": 0,
        }
        predictions = self._endpoint.predict([instance], timeout=self.settings.timeout).predictions
        # Public examples disagree whether the completion stands in a list.
        first: Any = predictions
        if isinstance(predictions, list) and predictions:
            first = predictions[0]
        if isinstance(first, str):  # a container that knows prompts only
            return Answer(finished(first, "none"), self.name)
        try:
            choice, usage = first["choices"][0], first.get("usage") or {}
            text, said = choice["message"]["content"], str(choice.get("finish_reason"))
        except (LookupError, TypeError) as error:
            raw = json.dumps(predictions, default=str)[:2000]
            raise ModelError(
                "bad_response", f"no chat completion in the reply: {error!r}", raw
            ) from None
        return Answer(
            finished(text, said),
            self.name,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            answer_tokens=int(usage.get("completion_tokens") or 0),
            finish_reason="length" if said == "length" else "stop",
        )


class VertexModelHandler(LanguageModelHandler[RemoteModel]):
    """A model behind Vertex AI.

    Each request is one call; a batch is as many calls at once as may be in flight.
    Calls that fail for a while (408, 429, 5xx, time-outs, broken connections) are tried
    again up to 5 times, with full jitter and not before the service's `Retry-After`.
    Whatever still fails is a `Failure` of that request alone.

    Args:
      model: `gemini-…` or `projects/P/locations/L/endpoints/E`.
    """

    def __init__(self, model: str, settings: RemoteSettings, batching: Batching = ONE_BUNDLE):
        # A batch ends with its slowest call, so it is wider than what is in flight.
        super().__init__(model, batching._replace(size=4 * settings.max_in_flight))
        self.settings = settings

    def load_model(self) -> RemoteModel:
        kind = EndpointModel if ENDPOINT.fullmatch(self.name) else GeminiModel
        return kind(self.name, self.settings)
