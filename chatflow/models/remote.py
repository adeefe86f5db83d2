"""Models behind a service: one call a prompt, many in flight, an answer or a failure for each."""

from __future__ import annotations

import abc
import asyncio
import collections
import concurrent.futures
import contextlib
import math
import random
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from apache_beam.io.components.rate_limiter import EnvoyRateLimiter, RateLimiter
from apache_beam.ml.inference.base import PredictionResult, RemoteModelHandler

from chatflow.errors import BadAnswerError, UsageError
from chatflow.models.faults import Fault, Kind, classify
from chatflow.models.gate import Gate
from chatflow.models.handlers import METRICS, LanguageModel, LanguageModelHandler
from chatflow.models.requests import (
    ONE_BUNDLE,
    Answer,
    Batching,
    Failure,
    Part,
    RemoteSettings,
    Request,
)

FIRST_PAUSE = 0.5  # seconds; doubled by each call that failed, with full jitter
LONGEST_PAUSE = 30.0
MALFORMED_RETRIES = 2

ASK_AGAIN = (
    "That answer cannot be used: {error}. Answer the same question again, with nothing but the "
    "JSON object that was asked for."
)


class Turn(NamedTuple):
    """What was said: by `user` or `model`."""

    role: str
    text: str


class Reply(NamedTuple):
    """A model's answer to one call; fields as of `Answer`."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finish_reason: str = "stop"


def checked(reply: Reply, blocked: str = "") -> Reply | Fault:
    """The reply, or why it is none.

    Args:
      blocked: the service's word for why it kept the answer back.
    """
    paid = (reply.prompt_tokens, reply.answer_tokens)
    if blocked:
        said = f"the service blocked it: {blocked}"
        return Fault(Kind.FATAL, "blocked", said, 0.0, reply.text or None, *paid)
    if not reply.text.strip():
        # At the limit a second call ends the same way.
        kind = Kind.FATAL if reply.finish_reason == "length" else Kind.MALFORMED
        said = f"the service gave no text; finish reason {reply.finish_reason}"
        return Fault(kind, "no_answer", said, 0.0, None, *paid)
    return reply


class Client(abc.ABC):
    """Speaks to one service. All methods are called on one event loop."""

    async def prepare(self) -> None:  # noqa: B027 (not all have something to prepare)
        """What the first call needs; done before each, at no cost when it was done."""

    @abc.abstractmethod
    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        """One call, never tried again; may raise whatever `faults.classify` knows."""

    @abc.abstractmethod
    async def check(self) -> str:
        """Asks whether the model is there, without paying for an answer; says what was found.

        Raises:
          UsageError: it is there, but cannot answer.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Ends all connections."""


class RemoteModel(LanguageModel):
    """Answers each request by calls of its own, at most so many of them at once.

    All callers in a process share one: see `shared_model`. Calls are made by one thread,
    which waits for many of them.

    Args:
      limiter: asked before each call, in a thread, for it may block.
    """

    def __init__(
        self,
        name: str,
        client: Client,
        settings: RemoteSettings,
        limiter: RateLimiter | None = None,
    ):
        self.name, self.settings = name, settings
        self._client, self._limiter = client, limiter
        self._gate = Gate(settings.max_in_flight, settings.max_per_second)
        self._counts: collections.Counter[str] = collections.Counter()
        self._throttled = 0.0
        self._lock = threading.Lock()
        self._blocking = concurrent.futures.ThreadPoolExecutor(settings.max_in_flight)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name=f"calls {name}", daemon=True)
        thread.start()
        self._loop = loop
        self._close = weakref.finalize(self, _close, loop, thread, client)

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return asyncio.run_coroutine_threadsafe(self._answers(requests), self._loop).result()

    def check(self) -> str:
        """See `Client.check`; within `RemoteSettings.timeout`."""

        async def check() -> str:
            async with asyncio.timeout(self.settings.timeout):
                return await self._client.check()

        return asyncio.run_coroutine_threadsafe(check(), self._loop).result()

    def close(self) -> None:
        """Ends the thread and all connections; also done when nobody holds the model."""
        self._close()

    @property
    def peak(self) -> int:
        """Most calls that were in flight at once."""
        return self._gate.peak

    def counts(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
        return dict(counts)

    def throttled(self) -> float:
        """Seconds that batches waited for the service, since this was last asked."""
        with self._lock:
            seconds, self._throttled = self._throttled, 0.0
        return seconds

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    async def _answers(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        throttled: list[float] = []
        answers = await asyncio.gather(*(self._answer(each, throttled) for each in requests))
        with self._lock:
            self._throttled += max(throttled, default=0.0)
        return answers

    async def _answer(self, request: Request, throttled: list[float]) -> Answer | Failure:
        started = time.monotonic()
        if len(request.parts) != 1:
            return Failure("bad_prompt", "a remote model is asked one question, by a block json")
        (part,) = request.parts
        turns = [Turn("user", part.prompt)]
        reply = await self._ask(turns, part, throttled)
        if isinstance(reply, Fault):
            return _failure(reply)
        repairs: tuple[str, ...] = ()
        error = _mistake(part, reply.text)
        if error is not None:
            self._count("asked_again")
            complaint = ASK_AGAIN.format(error=f"{error}; finish reason {reply.finish_reason}")
            turns += [Turn("model", reply.text), Turn("user", complaint)]
            first, reply = reply, await self._ask(turns, part, throttled)
            reply = _and_earlier(reply, first)
            if isinstance(reply, Fault):
                return _failure(reply._replace(answer=reply.answer or first.text))
            repairs = ("asked_again",)
        return Answer(
            model=self.name,
            seconds=time.monotonic() - started,
            repairs=repairs,
            **reply._asdict(),
        )

    async def _ask(
        self, turns: Sequence[Turn], part: Part, throttled: list[float]
    ) -> Reply | Fault:
        """Calls until there is an answer, or none is to be hoped for."""
        calls = malformed = 0
        lost = busy = 0.0
        spent: list[Fault] = []
        while True:
            outcome, seconds = await self._call(turns, part, again=calls > 0)
            if isinstance(outcome, Reply):
                break
            calls += 1
            malformed += outcome.kind is Kind.MALFORMED
            most = min(FIRST_PAUSE * 2 ** (calls - 1), LONGEST_PAUSE)
            pause = outcome.wait + most * random.random()
            lost += seconds + pause
            if (
                outcome.kind is Kind.FATAL
                or malformed > MALFORMED_RETRIES
                or lost > self.settings.retry_seconds
            ):
                times = "once" if calls == 1 else f"{calls} times"
                wait = f", and is to wait {outcome.wait:.0f} s" if outcome.wait else ""
                outcome = outcome._replace(error=f"{outcome.error} (called {times}{wait})")
                break
            self._count("retries")
            spent.append(outcome)
            busy += pause if outcome.kind is Kind.BUSY else 0.0
            await asyncio.sleep(pause)
        throttled.append(busy)
        return _and_earlier(outcome, *spent)

    async def _call(
        self, turns: Sequence[Turn], part: Part, again: bool
    ) -> tuple[Reply | Fault, float]:
        """What came of one call, and its seconds, without those before it."""
        started = time.monotonic()
        try:
            await self._client.prepare()
        except Exception as error:
            return classify(error), time.monotonic() - started
        granted = await self._gate.enter(first=again)
        outcome: Reply | Fault | None = None
        try:
            allowed = await self._allowed()
            started = time.monotonic()
            granted = granted._replace(entered=self._loop.time())
            if allowed:
                self._count("requests")
                async with asyncio.timeout(self.settings.timeout):
                    outcome = await self._client.ask(turns, part)
            else:
                outcome = Fault(Kind.BUSY, "rate_limited", "the rate limiter allows no call")
        except Exception as error:
            outcome = classify(error)
        finally:
            busy = isinstance(outcome, Fault) and outcome.kind is Kind.BUSY
            self._gate.leave(granted, refused=busy, answered=isinstance(outcome, Reply))
        if isinstance(outcome, Fault):
            self._count(f"faults/{outcome.reason}")
        return outcome, time.monotonic() - started

    async def _allowed(self) -> bool:
        if self._limiter is None:
            return True
        allow = self._limiter.allow
        return await self._loop.run_in_executor(self._blocking, allow)


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Client) -> None:
    async def close() -> None:
        await client.close()
        loop.call_later(0.1, loop.stop)  # google-genai closes a second time when it is deleted

    closing = asyncio.run_coroutine_threadsafe(close(), loop)
    if threading.current_thread() is not thread:
        with contextlib.suppress(TimeoutError):
            closing.result(timeout=2)


def _and_earlier(outcome: Reply | Fault, *earlier: Reply | Fault) -> Reply | Fault:
    """With the tokens of calls before it, which are paid for, too."""
    return outcome._replace(
        prompt_tokens=outcome.prompt_tokens + sum(call.prompt_tokens for call in earlier),
        answer_tokens=outcome.answer_tokens + sum(call.answer_tokens for call in earlier),
    )


def _mistake(part: Part, text: str) -> BadAnswerError | None:
    try:
        if part.check is not None:
            part.check(text)
    except BadAnswerError as error:
        return error
    return None


def _failure(fault: Fault) -> Failure:
    return Failure(
        fault.reason, fault.error, fault.answer, fault.prompt_tokens, fault.answer_tokens
    )


def check_name(name: str, settings: RemoteSettings) -> None:
    """Checks a remote model's name and settings; calls nothing.

    Raises:
      UsageError: it is neither an endpoint nor a Gemini model with a project and a location.
    """
    from chatflow.models.vertex import ENDPOINT

    if ENDPOINT.fullmatch(name):
        return
    if not name.startswith("gemini-"):
        raise UsageError(
            f"--model={name}: with --inference=remote give gemini-… or "
            "projects/P/locations/L/endpoints/E"
        )
    if not settings.project:
        raise UsageError(f"--model={name}: give --project, or set GOOGLE_CLOUD_PROJECT")
    if not settings.location:
        raise UsageError(
            f"--model={name}: give --location (or Beam's --region), or set GOOGLE_CLOUD_LOCATION"
        )
    from chatflow.models.gemini import thinking_of

    thinking_of(name, settings.thinking)


def client_of(name: str, settings: RemoteSettings) -> Client:
    from chatflow.models.vertex import ENDPOINT, EndpointClient

    if ENDPOINT.fullmatch(name):
        return EndpointClient(name, settings)
    from chatflow.models.gemini import GeminiClient

    return GeminiClient(name, settings)


_models: weakref.WeakValueDictionary[Any, RemoteModel] = weakref.WeakValueDictionary()
_models_lock = threading.Lock()


def shared_model(name: str, settings: RemoteSettings) -> RemoteModel:
    """The one client of this process, for all its steps and threads."""
    with _models_lock:
        model = _models.get((name, settings))
        if model is None:
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
    """A language model behind a service, for `RunInference`.

    Each request is a call of its own; a batch is as many at once as may be in flight, over
    all threads and steps of a worker process. A call that fails is made again as `faults`
    says, within `RemoteSettings.retry_seconds`, with exponential pauses and full jitter, and
    not before the service's Retry-After or RetryInfo, which holds for that request alone. An
    answer that is not what was asked for is sent back once, with the error. Whatever still
    fails is a `Failure` of that request; nothing fails a batch.

    Beam's base retries and throttles whole batches; both stay idle, for `request` does not
    raise. What it gives is the signal of throttled time to the runner.

    Args:
      model: `gemini-…` or `projects/P/locations/L/endpoints/E`.
    """

    def __init__(
        self, model: str, settings: RemoteSettings, batching: Batching = ONE_BUNDLE
    ) -> None:
        # A batch ends with its slowest call, so it is much wider than what is in flight.
        wide = batching._replace(size=16 * settings.max_in_flight)
        LanguageModelHandler.__init__(self, model, wide)
        # Beam's throttler counts what is under way as failed, and sleeps 5 s at a time.
        RemoteModelHandler.__init__(
            self,
            namespace=METRICS,
            num_retries=0,
            retry_filter=_never,
            throttle_delay_secs=0,
        )
        self.settings = settings

    def create_client(self) -> RemoteModel:
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
