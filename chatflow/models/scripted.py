"""A model that answers from a script, for tests: chatflow's own and its users'.

`--model=scripted:FILE` reads JSON Lines. Each line is a rule; the first that fits answers a
request:

    {"task": "analysis", "match": "refund", "answer": {"sentiment": -1, "summary": "…"}}
    {"task": "apology", "answer": "We are sorry."}
    {"chat_id": "7", "error": "overloaded"}
    {"match": "slow", "stall_seconds": 2, "answer": "not JSON"}
    {"match": "poison", "crash": "out of memory", "times": 1}

A rule fits if all of its `task`, `chat_id`, `user_id` and `match` (a regular expression, searched
in the prompts) fit. `answer` is a JSON value or a text, `error` fails this request alone, `crash`
raises from the whole batch, and `times` limits how often a rule is used.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import ElementError, UsageError
from chatflow.models.base import LanguageModel
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.requests import FIRST, Answer, Failure, Request, Version
from chatflow.models.spec import Kind, ModelSpec
from chatflow.options import ONE_BUNDLE, Batching

PREFIX = "scripted:"

_FIELDS = frozenset(
    ("task", "chat_id", "user_id", "match", "answer", "error", "crash", "stall_seconds", "times")
)


@dataclasses.dataclass
class Script:
    """Rules in order. Called with a request, returns the answer."""

    rules: tuple[dict[str, Any], ...]
    _used: dict[int, int] = dataclasses.field(default_factory=dict)

    def __call__(self, request: Request) -> str:
        for number, rule in enumerate(self.rules):
            if not _fits(rule, request) or self._used.get(number, 0) >= rule.get("times", 1e9):
                continue
            self._used[number] = self._used.get(number, 0) + 1
            if "stall_seconds" in rule:
                time.sleep(rule["stall_seconds"])
            if "crash" in rule:
                raise RuntimeError(rule["crash"])
            if "error" in rule:
                raise ElementError(rule["error"], f"the script fails with {rule['error']}")
            answer = rule.get("answer", "")
            return answer if isinstance(answer, str) else json.dumps(answer)
        raise ElementError("no_rule", f"no rule of the script fits chat {request.chat_id}")


def _fits(rule: dict[str, Any], request: Request) -> bool:
    return all(
        name not in rule or str(rule[name]) == getattr(request, name)
        for name in ("task", "chat_id", "user_id")
    ) and any(re.search(rule.get("match", ""), part.prompt) for part in request.parts)


def load_script(path: str) -> Script:
    """Reads a script; raises `UsageError` if it is unreadable or a line is not a rule."""
    try:
        with FileSystems.open(path) as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--model: the script {path!r} cannot be read: {error}") from None
    rules = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rule = json.loads(line)
            if not isinstance(rule, dict):
                raise ValueError("a rule is a JSON object")
            if unknown := set(rule) - _FIELDS:
                raise ValueError(f"unknown {sorted(unknown)}; known are {sorted(_FIELDS)}")
            re.compile(rule.get("match", ""))
        except (ValueError, re.error) as error:
            raise UsageError(f"--model: {path}:{number}: {error}") from None
        rules.append(rule)
    return Script(tuple(rules))


class ScriptedModel(LanguageModel):
    """Answers each request with a function; an `ElementError` fails only that request."""

    def __init__(self, name: str, function: Callable[[Request], str]):
        self.name, self.function = name, function

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer | Failure:
        started = time.monotonic()
        try:
            text = self.function(request)
        except ElementError as error:
            return Failure(error.reason, str(error), error.answer)
        return Answer(
            text,
            self.name,
            prompt_tokens=sum(len(part.prompt.split()) for part in request.parts),
            answer_tokens=len(text.split()),
            seconds=time.monotonic() - started,
        )


class ScriptedModelHandler(LanguageModelHandler[ScriptedModel]):
    """Answers with a function from a `Request` to the text that the model writes.

    The function may raise `ElementError` to fail one request, or anything else to fail its batch.
    """

    def __init__(
        self,
        function: Callable[[Request], str],
        name: str = "scripted",
        batching: Batching = ONE_BUNDLE,
        updates: str = "",
    ):
        super().__init__(name, batching, updates=updates)
        self.function = function

    def load(self, version: Version = FIRST) -> ScriptedModel:
        function = load_script(version.path) if version.path else self.function
        return ScriptedModel(version.named(self.name), function)


class Scripted(Kind):
    """`scripted:FILE`; a pipeline treats it as a model that writes JSON."""

    update_files = (".jsonl",)

    def check(self, spec: ModelSpec) -> None:
        """Checks nothing, because `load_script` does when the handler is made."""

    def instruct(self, spec: ModelSpec) -> bool:
        return True

    def writes_json(self, spec: ModelSpec) -> bool:
        return True

    def base_name(self, spec: ModelSpec) -> str:
        """Returns the kind's name instead of the script's path."""
        return "scripted"

    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> ScriptedModelHandler:
        script = load_script(spec.name.removeprefix(PREFIX))
        return ScriptedModelHandler(script, batching=spec.batching, updates=spec.updates)
