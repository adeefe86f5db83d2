"""Answers of the parts of a request, put together as one: JSON that code writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from chatflow.errors import ElementError
from chatflow.models.requests import Answer, Failure, Part


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
            from chatflow.models.grammar import json_answer

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
