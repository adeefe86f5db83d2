"""Answers requests by concurrent calls to a service, with retries within a budget."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from apache_beam.io.components.rate_limiter import RateLimiter

from chatflow.errors import BadAnswerError, ModelError
from chatflow.models.base import OVER_BUDGET, LanguageModel, Ledger
from chatflow.models.remote.clients import Client, Reply, Turn
from chatflow.models.remote.faults import Fault, Kind, classify
from chatflow.models.remote.gate import Gate
from chatflow.models.requests import Answer, Failure, Part, Request
from chatflow.network import LoopThread, pause
from chatflow.options import RemoteSettings

_log = logging.getLogger(__name__)

T = TypeVar("T")

MALFORMED_RETRIES = 2

ASK_AGAIN = (
    "That answer cannot be used: {error}. Answer the same question again, with nothing but the "
    "JSON object that was asked for."
)


class RemoteModel(LanguageModel):
    """Answers each request by separate calls, at most `settings.max_in_flight` at once.

    All callers in a process share one model (see `shared_model`), whose thread makes all calls.
    The `limiter` is asked before each call, in another thread, because it may block. With a ledger,
    an answer is in flight until it is noted.
    """

    loads = 0  # the weights are not in this process

    def __init__(
        self,
        name: str,
        client: Client,
        settings: RemoteSettings,
        limiter: RateLimiter | None = None,
    ):
        self.name, self.settings = name, settings
        self._client, self._limiter = client, limiter
        self._gate = Gate(settings.max_in_flight, settings.max_requests_per_second)
        self._unnoted = asyncio.Semaphore(settings.max_in_flight)
        self._counts: collections.Counter[str] = collections.Counter()
        self._throttled = 0.0
        self._lock = threading.Lock()
        self._refusing_since: float | None = None  # the start of refusals without an answer
        if limiter is not None:
            self._blocking = concurrent.futures.ThreadPoolExecutor(settings.max_in_flight)
        self._thread = LoopThread(f"calls {name}")
        self._close = weakref.finalize(self, self._thread.close, client.close)

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return self._on_loop(self._answers(requests))

    def answer_each(self, requests: Sequence[Request], ledger: Ledger) -> list[Answer | Failure]:
        return self._on_loop(self._answers(requests, ledger))

    def check(self) -> str:
        """Returns the result of `Client.check`, within `RemoteSettings.request_timeout`."""

        async def check() -> str:
            async with asyncio.timeout(self.settings.request_timeout):
                return await self._client.check()

        return self._on_loop(check())

    def _on_loop(self, what: Coroutine[Any, Any, T]) -> T:
        if self.closed:
            what.close()
            raise RuntimeError(f"the client of {self.name} is closed")
        return self._thread.run(what)

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        """Ends the thread and all connections; also runs when the model is garbage-collected."""
        self._close()

    def counts(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
        return dict(counts)

    def throttled(self) -> float:
        """Returns the seconds that batches waited for a busy service since the last call."""
        with self._lock:
            seconds, self._throttled = self._throttled, 0.0
        return seconds

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    async def _answers(
        self, requests: Sequence[Request], ledger: Ledger | None = None
    ) -> list[Answer | Failure]:
        budgets = [_Budget(self.settings.retry_seconds, ledger) for _ in requests]

        async def answered(request: Request, budget: _Budget) -> Answer | Failure:
            try:
                answer = await self._answer(request, budget)
                if ledger is not None:
                    await asyncio.to_thread(ledger.note, request, answer)
            finally:
                self._release(budget)
            return answer

        answers = await asyncio.gather(*map(answered, requests, budgets))
        with self._lock:
            self._throttled += max((budget.throttled for budget in budgets), default=0.0)
        return answers

    async def _answer(self, request: Request, budget: _Budget) -> Answer | Failure:
        started = time.monotonic()
        first: Reply | None = None
        try:
            (part,) = request.parts
            turns = [Turn("user", part.prompt)]
            outcome = await self._ask(turns, part, budget)
            complaint = _complaint(part, outcome)
            if complaint and isinstance(outcome, Reply):
                self._count("asked_again")
                self._release(budget)  # it waits at the gate again, behind those who may hold one
                first = outcome
                budget.earlier.append(first)
                turns += [Turn("model", first.text), Turn("user", complaint)]
                outcome = await self._ask(turns, part, budget)
        except Exception as error:  # a bug; it must not fail the batch
            _log.exception("a request failed: %s", error)
            outcome = classify(error)
        paid = [*budget.earlier, outcome]
        tokens = {
            name: sum(getattr(call, name) for call in paid)
            for name in ("prompt_tokens", "answer_tokens", "cached_tokens")
        }
        if isinstance(outcome, Fault):
            said = outcome.answer or (first.text if first else None)
            return Failure(outcome.reason, outcome.error, said, **tokens)
        return Answer(
            outcome.text,
            self.name,
            **tokens,
            seconds=time.monotonic() - started,
            finish_reason=outcome.finish_reason,
            repairs=("asked_again",) if first else (),
        )

    async def _ask(self, turns: Sequence[Turn], part: Part, budget: _Budget) -> Reply | Fault:
        """Calls until there is an answer, a fatal fault, or no budget."""
        calls = malformed = 0
        while True:
            outcome = await self._call(turns, part, budget, again=calls > 0)
            if isinstance(outcome, Reply):
                return outcome
            calls += 1
            malformed += outcome.kind is Kind.MALFORMED
            if outcome.reason == OVER_BUDGET:
                return outcome  # it was not called
            seconds = pause(calls, outcome.wait)
            budget.left -= seconds
            if outcome.kind is Kind.FATAL or malformed > MALFORMED_RETRIES or budget.left < 0:
                times = "once" if calls == 1 else f"{calls} times"
                wait = f", and must wait {outcome.wait:.0f} s" if outcome.wait else ""
                return outcome._replace(error=f"{outcome.error} (called {times}{wait})")
            self._count("retries")
            budget.earlier.append(outcome)
            budget.throttled += seconds if outcome.kind is Kind.BUSY else 0.0
            await asyncio.sleep(seconds)

    async def _call(
        self, turns: Sequence[Turn], part: Part, budget: _Budget, again: bool
    ) -> Reply | Fault:
        """Makes one call; the budget pays for a failed call and for the wait before a retry."""
        started = time.monotonic()
        try:
            await self._client.prepare()
            granted = await self._gate.enter(first=again)
        except Exception as error:
            budget.left -= time.monotonic() - started
            return classify(error)
        waited = time.monotonic() - started
        budget.throttled += waited if self._gate.limit < self._gate.most else 0.0
        budget.left -= waited if again else 0.0
        try:
            await self._hold(budget)
            fault = _refusal(budget) or await self._not_allowed()
            granted = granted._replace(entered=time.monotonic())
            outcome = fault or await self._ask_client(turns, part)
        except asyncio.CancelledError:
            self._gate.leave(granted)
            raise
        if isinstance(outcome, Reply):
            self._refusing_since = None
            self._gate.leave(granted, answered=True)
            return outcome
        self._release(budget)
        budget.left -= time.monotonic() - granted.entered
        self._count(f"faults/{outcome.reason}")
        busy = outcome.kind is Kind.BUSY
        self._gate.leave(granted, refused=busy)
        if busy:
            self._note_refusal(outcome)
        else:
            self._refusing_since = None
        return outcome

    async def _hold(self, budget: _Budget) -> None:
        """Waits until fewer than `max_in_flight` answers are on their way to the ledger."""
        if budget.ledger is not None and not budget.holds:
            await self._unnoted.acquire()
            budget.holds = True

    def _release(self, budget: _Budget) -> None:
        if budget.holds:
            budget.holds = False
            self._unnoted.release()

    async def _ask_client(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        self._count("requests")
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                return await self._client.ask(turns, part)
        except Exception as error:
            return classify(error)

    def _note_refusal(self, fault: Fault) -> None:
        """Fails all waiting calls once every call was refused for `retry_seconds`."""
        now = time.monotonic()
        if self._refusing_since is None:
            self._refusing_since = now
        refused = now - self._refusing_since
        if refused > self.settings.retry_seconds:
            said = f"the service has refused every call for {refused:.0f} s: {fault.error}"
            self._gate.turn_away(ModelError(fault.reason, said))

    async def _not_allowed(self) -> Fault | None:
        if self._limiter is None:
            return None
        try:
            allowed = await asyncio.wrap_future(self._blocking.submit(self._limiter.allow))
        except Exception as error:
            return classify(error)._replace(reason="rate_limiter")
        refusal = Fault(Kind.BUSY, "rate_limited", "the rate limiter allows no call")
        return None if allowed else refusal


@dataclasses.dataclass
class _Budget:
    """What one request may still spend, and has spent.

    Attributes:
      left: seconds for failing calls and the pauses after them.
      ledger: says whether any call may be made.
      holds: whether it is one of those that are counted by `RemoteModel._hold`.
      throttled: seconds waited for a busy service.
      earlier: calls before the last one, which cost tokens, too.
    """

    left: float
    ledger: Ledger | None = None
    holds: bool = False
    throttled: float = 0.0
    earlier: list[Reply | Fault] = dataclasses.field(default_factory=list)


def _refusal(budget: _Budget) -> Fault | None:
    refusal = budget.ledger.refusal() if budget.ledger is not None else None
    return Fault(Kind.FATAL, refusal.reason, refusal.error) if refusal is not None else None


def _complaint(part: Part, outcome: Reply | Fault) -> str:
    """Returns what to tell the model about an unusable answer; empty for a usable one."""
    if part.check is None or isinstance(outcome, Fault):
        return ""
    try:
        part.check(outcome.text)
    except BadAnswerError as error:
        return ASK_AGAIN.format(error=f"{error}; finish reason {outcome.finish_reason}")
    return ""
