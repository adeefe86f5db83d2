"""What a model is asked and what it returns, the same for all models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from chatflow.choices.heads import Chosen
from chatflow.choices.reading import Layout


class Suffix(NamedTuple):
    """A choice without a head, asked for behind a text that was read.

    Attributes:
      text: what stands behind the text.
      options: what may follow, one for each value; their first tokens must differ.
    """

    choice: str
    text: str
    values: tuple[str, ...]
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One prompt of a request.

    Attributes:
      field: the field of the JSON answer that this part fills; None: the text is the whole answer.
      shared: how many characters all prompts of the template share at the start.
      lead: the end of the prompt that is also the start of the answer ("221 wants").
      tail: fixed text that ends the answer, in place of the model's last full stop.
      max_tokens: of the answer; unused with choices.
      stop: texts that end the answer and are not part of it; only on the worker.
      characters: the most in an answer, if the model can be held to it; 0: any number.
      schema: if the model writes JSON, its schema: a flat object of one enumeration and one string.
      choices: if any, the best-scored one is the answer, and nothing is generated.
      values: what each choice stands for in the JSON answer.
      bias: subtracted from the choices' log-probabilities, in nats.
      temperature: divides these differences before they become probabilities.
      layout: how the prompt divides, if it is only read: the answer is what the heads choose.
      suffixes: what else is asked behind a prompt that is read.
      check: raises `BadAnswerError`; a remote model is then asked once more, with the error. Coders
        leave it out.
    """

    field: str | None
    prompt: str
    shared: int = 0
    lead: str = ""
    tail: str = ""
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    characters: int = 0
    schema: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    choices: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    bias: tuple[float, ...] = ()
    temperature: float = 1.0
    layout: Layout | None = dataclasses.field(default=None, hash=False)
    suffixes: tuple[Suffix, ...] = ()
    check: Annotated[Callable[[str], object] | None, Field(exclude=True)] = dataclasses.field(
        default=None, compare=False
    )


class Version(NamedTuple):
    """A version of a model's weights; later ones compare greater.

    Attributes:
      seen: when it was found to be the newest, in seconds since 1970.
      path: a preset's folder, an adapter or a state dict; empty: the weights that `--model` names.
      modified: when it was written; the same path may hold other weights later.
    """

    seen: float = 0.0
    path: str = ""
    modified: float = 0.0

    @property
    def weights(self) -> tuple[str, float]:
        """What identifies the weights to load."""
        return self.path, self.modified

    def named(self, model: str) -> str:
        """Returns the name in results of a model with these weights.

        >>> Version(path="gs://b/german.lora.h5").named("gemma3-270m")
        'gemma3-270m@gs://b/german.lora.h5'
        """
        return f"{model}@{self.path}" if self.path else model


FIRST = Version()


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that one model call (or one row of a batch) needs.

    Attributes:
      id: deterministic; see `records.Identity`.
      task: `analysis` or `apology`.
      model: the key of the model to ask, if the pipeline has several.
      version: of its weights; a model with older ones loads these.
      otherwise: the same question to another model, which is asked if this one does not answer.
        Coders leave it out.
    """

    id: str
    task: str
    chat_id: str
    user_id: str
    parts: tuple[Part, ...]
    model: str = ""
    version: Version = FIRST
    otherwise: Annotated[Request | None, Field(exclude=True)] = None


FALLBACK = "fallback"
"""The repair noted in an answer that `Request.otherwise` received."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said: JSON with `sentiment` and `summary`, or the text of a draft.

    Attributes:
      prompt_tokens, answer_tokens: of all calls for the answer; thinking counts as answer.
      cached_tokens: of the prompts' tokens those that a service had in its cache.
      tone_scores: log-probability by tone word, if the tone was a scored choice.
      seconds: from request to answer; of the whole batch, if there was one.
      finish_reason: `stop`, `length` (cut at the limit), or the service's own word.
      chosen: what heads chose, for a prompt that is only read; the text is then empty.
      repairs: `asked_again`, if a first answer was unusable; `FALLBACK`.
      first: why the model that was asked first did not answer, if `FALLBACK` is in `repairs`.
    """

    text: str
    model: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    finish_reason: str = "stop"
    tone_scores: tuple[tuple[str, float], ...] = ()
    repairs: tuple[str, ...] = ()
    chosen: Chosen | None = None
    first: Failure | None = None

    @property
    def circumstances(self) -> str:
        """Explains an unusable answer, for an error message."""
        again = "asked twice, " if self.repairs else ""
        return f" ({again}finish reason {self.finish_reason})"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a model did not answer one request; the rest of the batch is unaffected.

    Attributes:
      reason: a short code for counting, e.g. `prompt_too_long`.
      answer, prompt_tokens, answer_tokens, cached_tokens: what the model said and used
        nevertheless.
      other: why `Request.otherwise` was not answered, either.
    """

    reason: str
    error: str
    answer: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    other: Failure | None = None


def with_others(
    requests: Sequence[Request],
    answers: Sequence[Answer | Failure],
    ask: Callable[[Sequence[Request]], list[Answer | Failure]],
) -> list[Answer | Failure]:
    """Returns the answers, and in place of failures what the requests' `otherwise` is answered."""
    found = list(answers)
    failed = [
        (at, answer, request.otherwise)
        for at, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if isinstance(answer, Failure) and request.otherwise is not None
    ]
    others = ask([other for _, _, other in failed]) if failed else []
    for (at, first, _), other in zip(failed, others, strict=True):
        found[at] = _instead_of(first, other)
    return found


def _instead_of(first: Failure, other: Answer | Failure) -> Answer | Failure:
    """Returns the other model's answer after a first failure; each keeps what it has cost."""
    if isinstance(other, Failure):
        said = f"{first.error}; and the other model: {other.error}"
        return dataclasses.replace(first, error=said, other=other)
    return dataclasses.replace(other, repairs=(*other.repairs, FALLBACK), first=first)
