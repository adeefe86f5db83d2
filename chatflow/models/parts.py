"""Models that answer part by part, and their answers put together as one: JSON that code writes."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
      choice: the number of the likeliest, less its bias; -1 where nothing was to be chosen.
      text: what was written.
      cut: the text reached a limit before it ended by itself.
      tokens: those that were written, with the one that ended the text.
      prompt_tokens: how many were read.
    """

    prompt_tokens: int
    scores: tuple[float, ...] = ()
    choice: int = -1
    text: str = ""
    cut: bool = False
    tokens: tuple[int, ...] = ()


def put_together(
    results: Sequence[tuple[Part, Result | ElementError]], model: str, seconds: float
) -> Answer | Failure:
    """One answer of a request's parts: the model writes no JSON that code can write.

    Args:
      model: what the answer says made it.
      seconds: what it took.
    """
    fields: dict[str, Any] = {}
    text, finish_reason, scores = "", "stop", {}
    prompt_tokens = answer_tokens = 0
    for part, result in results:
        if isinstance(result, ElementError):
            return Failure(result.reason, str(result))
        prompt_tokens += result.prompt_tokens
        answer_tokens += len(result.tokens)
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
    )


class EngineModel(LanguageModel):
    """A model on the worker whose engine answers the parts of many requests in one go.

    Requests of concurrent callers are run in common batches.

    Args:
      name: what answers say made them.
      engine: its `run` gives a `Result` or an error for each prompt, `all_counts` what it counted.
      most: requests in a batch.
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

    def prompt(self, part: Part) -> Any:
        """What the engine is asked for a part."""
        return part

    def _ask(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return ask(self._run, requests)

    def _run(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Answers in the order of the requests; all parts of all of them in one go."""
        started = time.monotonic()
        results = iter(self.engine.run([self.prompt(part) for r in requests for part in r.parts]))
        by_request = [[(part, next(results)) for part in r.parts] for r in requests]
        seconds = time.monotonic() - started
        return [put_together(result, self.name, seconds) for result in by_request]


class JsonAnswer(NamedTuple):
    """A JSON object as the stretches that a model need not write, and what it fills in.

    The object is `before`, one of `choices`, `between`, a text, and the closing marks.
    """

    fields: tuple[str, str]
    before: str
    choices: tuple[str, ...]
    between: str


def json_answer(schema: Mapping[str, Any]) -> JsonAnswer:
    """How to fill in a flat object of one enumeration and one string.

    Raises:
      ValueError: the schema asks for something else.
    """
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
