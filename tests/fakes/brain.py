"""Decides how a stand-in service treats a call (answer, delay, fault), and records the calls."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FAULTS = (
    "hang", "reset", "slow_body", "cut_body", "html", "malformed", "truncated", "nonsense",
    "empty", "fewer", "safety",
)  # fmt: skip
"""Besides these, any status is a fault, e.g. "429"."""


@dataclasses.dataclass
class Behaviour:
    """How a stand-in answers. The first attribute that fits a call decides.

    Attributes:
      match: a fault for each call whose prompt holds a text.
      quota: answered calls in any second; more are refused with 429.
      capacity: calls at once; more are refused with 429.
      bursts: (seconds from one to the next, seconds of each) in which all calls get 429.
      script: faults of the next calls, in order; `ok` for none.
      rates: shares of calls with a fault.
      retry_after: seconds to wait, sent with 429 and 503, as Retry-After and RetryInfo.
      latency: seconds until an answer: a number, `uniform:FROM,TO`, `lognormal:MEDIAN,SIGMA` or
        `bimodal:FAST,SLOW,SHARE OF SLOW`.
      slow_seconds: how long a slow body takes.
      listed: chat completions stand in a list, as in one of Google's examples.
      refused: fields of a body that it refuses by name.
    """

    match: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quota: int = 0
    capacity: int = 0
    bursts: Sequence[float] = ()
    script: list[str] = dataclasses.field(default_factory=list)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    retry_after: float | None = None
    latency: str | float = 0.0
    slow_seconds: float = 30.0
    listed: bool = True
    refused: Sequence[str] = ()
    seed: int = 5

    def __post_init__(self) -> None:
        for fault in (*self.match.values(), *self.script, *self.rates):
            if fault != "ok" and fault not in FAULTS and not fault.isdecimal():
                raise ValueError(f"no such fault: {fault}; known are a status, {FAULTS}")


@dataclasses.dataclass
class Call:
    """A call as the service saw it.

    Attributes:
      at: seconds of the monotonic clock.
      prompts: one of each instance; that of the first turn if there are several.
      fault: `ok`, or what it was answered with.
      early: it came before the time that an earlier call with the same prompt was told.
      key: from the special header of Azure or Anthropic.
    """

    at: float
    path: str
    prompts: list[str]
    body: Any
    authorization: str
    fault: str = "ok"
    key: str = ""
    early: bool = False


class Brain:
    """The behaviour and the journal that all protocols of the stand-in share.

    Args:
      answer: from a prompt to the text that the model says.
    """

    def __init__(self, answer: Callable[[str], str]):
        self.first_answer = answer
        self.reset()

    def reset(self, **behaviour: Any) -> None:
        """Forgets the calls that it saw, and sets its behaviour from now on."""
        self.answer = self.first_answer
        self.behaviour = Behaviour(**behaviour)
        self.calls: list[Call] = []
        self.peak = self.in_flight = 0
        self.answered: collections.Counter[str] = collections.Counter()
        self._random = random.Random(self.behaviour.seed)
        self._not_before: dict[str, float] = {}
        self._accepted: collections.deque[float] = collections.deque()
        self._started = time.monotonic()

    def receive(self, path: str, prompts: list[str], body: Any, authorization: str) -> Call:
        """Notes a call, and decides on its fault. `leave` must follow."""
        now = time.monotonic()
        call = Call(now, path, prompts, body, authorization)
        call.early = any(now < self._not_before.get(prompt, 0.0) for prompt in prompts)
        call.fault = self._fault(now, prompts)
        self.calls.append(call)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        return call

    def leave(self, call: Call) -> None:
        self.in_flight -= 1
        if self.asks_to_wait(call.fault):
            until = time.monotonic() + (self.behaviour.retry_after or 0.0)
            self._not_before |= dict.fromkeys(call.prompts, until)
        if call.fault == "ok":
            self.answered.update(call.prompts)

    def asks_to_wait(self, fault: str) -> bool:
        return self.behaviour.retry_after is not None and fault in ("429", "503")

    def _fault(self, now: float, prompts: Iterable[str]) -> str:
        behaviour = self.behaviour
        for text, fault in behaviour.match.items():
            if any(text in prompt for prompt in prompts):
                return fault
        if behaviour.capacity and self.in_flight >= behaviour.capacity:
            return "429"
        if behaviour.bursts:
            every, long = behaviour.bursts
            if (now - self._started) % every < long:
                return "429"
        if behaviour.quota:
            while self._accepted and self._accepted[0] <= now - 1:
                self._accepted.popleft()
            if len(self._accepted) >= behaviour.quota:
                return "429"
            self._accepted.append(now)
        if behaviour.script:
            return behaviour.script.pop(0)
        drawn = self._random.random()
        for fault, share in behaviour.rates.items():
            drawn -= share
            if drawn < 0:
                return fault
        return "ok"

    async def wait(self) -> None:
        """Waits for the latency of one answer."""
        kind, _, numbers = str(self.behaviour.latency).rpartition(":")
        first, *more = map(float, numbers.split(","))
        if kind == "uniform":
            first = self._random.uniform(first, *more)
        elif kind == "lognormal":
            first *= self._random.lognormvariate(0, *more)
        elif kind == "bimodal":
            slow, share = more
            first = slow if self._random.random() < share else first
        if first:
            await asyncio.sleep(first)

    def stats(self, since: float = 0.0, until: float = math.inf) -> dict[str, Any]:
        """Returns what the service saw between two times, in seconds after the first call."""
        first = min((call.at for call in self.calls), default=0.0)
        start = first + since
        calls = [call for call in self.calls if start <= call.at < first + until]
        seconds = max((call.at for call in calls), default=start) - start
        return {
            "calls": len(calls),
            "faults": dict(collections.Counter(c.fault for c in calls if c.fault != "ok")),
            "answered": sum(self.answered.values()),
            "answered_twice": sum(count > 1 for count in self.answered.values()),
            "before_retry_after": sum(call.early for call in calls),
            "peak_in_flight": self.peak,
            "seconds": round(seconds, 3),
        }


SCRIPT = Path(__file__).parent / "script.jsonl"


def scripted_answer(prompt: str) -> str:
    """Answers as chatflow's scripted model: `script.jsonl`'s tones, summaries in user's words."""
    from chatflow.models.requests import Part, Request

    *_, chat = prompt.split("Chat history:\n")
    chat, _, behind = chat.partition("\nThe user: ")
    user = behind.split("\n")[0].strip()
    own = re.findall(rf"^\S+ {re.escape(user)}: (.+)$", chat, re.MULTILINE)
    task = "apology" if "Write an apology" in prompt else "analysis"
    parts = (Part(None, "\n".join(own)),)
    answer = _script()(Request("", task, "", user, parts))
    if task == "apology":
        return answer
    summary = f"{user} says: {max(own, key=len, default='')[:120]}"
    return json.dumps({**json.loads(answer), "summary": summary}, ensure_ascii=False)


_scripts: list[Any] = []


def _script() -> Any:
    from chatflow.models.scripted import load_script

    if not _scripts:
        _scripts.append(load_script(str(SCRIPT)))
    return _scripts[0]
