"""Models that answer part by part; code puts their answers together as JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from chatflow.choices.heads import Chosen
from chatflow.errors import ElementError
from chatflow.models.base import LanguageModel
from chatflow.models.handlers import ask
from chatflow.models.merging import merged
from chatflow.models.requests import Answer, Failure, Part, Request


@dataclasses.dataclass
class Result:
    """The answer to one prompt.

    Attributes:
      scores: log-probability of each choice, in nats.
      choice: index of the likeliest choice, after its bias is subtracted; -1 without choices.
      cut: the text reached a limit before it ended by itself.
      chosen: what heads chose, for a prompt that was only read.
      tokens: the generated tokens, with the one that ended the text.
    """

    prompt_tokens: int
    scores: tuple[float, ...] = ()
    choice: int = -1
    text: str = ""
    cut: bool = False
    tokens: tuple[int, ...] = ()
    chosen: Chosen | None = None


def put_together(
    results: Sequence[tuple[Part, Result | ElementError]], model: str, seconds: float
) -> Answer | Failure:
    """Returns one answer from a request's parts, or a failure; code writes the JSON."""
    fields: dict[str, Any] = {}
    text, finish_reason, scores = "", "stop", {}
    chosen: Chosen | None = None
    prompt_tokens = answer_tokens = 0
    for part, result in results:
        if isinstance(result, ElementError):
            return Failure(result.reason, str(result))
        prompt_tokens += result.prompt_tokens
        answer_tokens += len(result.tokens)
        if result.chosen is not None:
            chosen = result.chosen
            continue
        said = result.text
        if result.cut:
            finish_reason = "length"
            if result.choice >= 0 or not part.schema:  # else the model wrote JSON itself
                said += "…"
        if part.choices:
            fields[str(part.field)] = part.values[result.choice]
            for choice, score in zip(part.choices, result.scores, strict=True):
                scores[choice.strip()] = round(score, 4)
        elif part.schema and result.choice >= 0:
            form = json_answer(part.schema)
            enum, string = form.fields
            fields |= {enum: json.loads(form.choices[result.choice]), string: said}
        else:
            said = (part.lead + said).strip()
            if part.tail:
                said = said.rstrip(" ,.!?…") + part.tail
            if part.field:
                fields[part.field] = said
            else:
                text = said
    return Answer(
        json.dumps(fields, ensure_ascii=False) if fields else text,
        model,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        seconds=seconds,
        finish_reason=finish_reason,
        tone_scores=tuple(scores.items()),
        chosen=chosen,
    )


class EngineModel(LanguageModel):
    """A model on the worker whose engine answers the parts of many requests in one call.

    Args:
      name: the model's name in answers.
      engine: `run()` returns one `Result` or error per prompt; `all_counts()` its counters so far.
      most: the most requests in a batch.
      merge_seconds: how long a request may wait for those of other callers.
    """

    def __init__(self, name: str, engine: Any, most: int, merge_seconds: float):
        self.name, self.engine, self.most = name, engine, most
        self._merged = merged(self._ask, most, merge_seconds)
        self._counted: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return self._merged(requests)

    def counts(self) -> dict[str, int]:
        with self._lock:
            now = self.engine.all_counts()
            new = now - self._counted
            self._counted = now
        return dict(new)

    def run(self, parts: Sequence[Part]) -> list[Result | ElementError]:
        """Returns one result or error per part, in order."""
        results: list[Result | ElementError] = self.engine.run(parts)
        return results

    def _ask(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return ask(self._run, requests)

    def _run(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Runs all parts of all requests in one call of the engine."""
        started = time.monotonic()
        results = iter(self.run([part for r in requests for part in r.parts]))
        by_request = [[(part, next(results)) for part in r.parts] for r in requests]
        seconds = time.monotonic() - started
        return [put_together(result, self.name, seconds) for result in by_request]


class JsonAnswer(NamedTuple):
    """A JSON object: `before`, a scored choice, `between`, a generated text, the closing marks."""

    fields: tuple[str, str]
    before: str
    choices: tuple[str, ...]
    between: str


def json_answer(schema: Mapping[str, Any]) -> JsonAnswer:
    """Returns how to fill in an enumeration and a string; raises `ValueError` for other schemas."""
    fields = schema.get("properties", {})
    enums = [name for name, field in fields.items() if "enum" in field]
    texts = [name for name in fields if name not in enums]
    if len(enums) != 1 or len(texts) != 1 or fields[texts[0]].get("type") != "string":
        raise ValueError("only an object of one enumeration and one string can be answered")
    (enum,), (text,) = enums, texts
    return JsonAnswer(
        fields=(enum, text),
        before=f"{{{json.dumps(enum)}:",
        choices=tuple(json.dumps(value) for value in fields[enum]["enum"]),
        between=f',{json.dumps(text)}:"',
    )
