"""What is asked of a model, and what it gives back: the same for all models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Part:
    """One prompt of a request.

    Attributes:
      field: the field of the JSON answer that this part fills; None: the model's text
        is the whole answer.
      prompt: the text to continue.
      shared: how many characters of it, from its start, all prompts of the template share.
      lead: the end of the prompt that is also the start of the answer ("221 wants").
      tail: fixed text that ends the answer, in place of the model's last full stop.
      max_tokens: of the answer; unused where there are choices.
      stop: texts that end the answer and are not part of it; on the worker.
      characters: of the answer, at most, where the model can be held to it; 0: any.
      schema: JSON schema of the answer, where the model writes JSON: a flat object of one
        enumeration and one string.
      choices: if any, one of these is scored best, and nothing is generated.
      values: what each choice stands for in the JSON answer.
      bias: constants taken off the choices' log-probabilities, in nats.
      temperature: by which these differences are divided where they become probabilities.
      check: raises `BadAnswerError` where an answer is not what was asked for. A remote model
        is then asked once more, with the error.
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
    check: Callable[[str], object] | None = dataclasses.field(default=None, compare=False)


class Version(NamedTuple):
    """Which weights of a model; later ones are greater.

    Attributes:
      seen: when they were seen to be the newest, in seconds since 1970.
      path: a preset's folder, an adapter or a state dict; empty: those that `--model` names.
      modified: when they were written; the same path may hold other weights later.
    """

    seen: float = 0.0
    path: str = ""
    modified: float = 0.0

    @property
    def weights(self) -> tuple[str, float]:
        """What is loaded for it."""
        return self.path, self.modified

    def named(self, model: str) -> str:
        """How results call a model with these weights.

        >>> Version(path="gs://b/german.lora.h5").named("gemma3-270m")
        'gemma3-270m@gs://b/german.lora.h5'
        """
        return f"{model}@{self.path}" if self.path else model


FIRST = Version()


@dataclasses.dataclass(frozen=True)
class Request:
    """All that one model call (or one row of a batch) needs.

    Attributes:
      id: deterministic; see `records.Identity`.
      task: `analysis` or `apology`.
      model: which of a pipeline's models is asked, where there are several.
      version: of its weights; a model that has no later ones takes them up.
    """

    id: str
    task: str
    chat_id: str
    user_id: str
    parts: tuple[Part, ...]
    model: str = ""
    version: Version = FIRST


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said: JSON with `sentiment` and `summary`, or the text of a draft.

    Attributes:
      model: who answered.
      prompt_tokens, answer_tokens: what was read and written, in all calls for this answer;
        what a model thinks before it answers is written, too.
      tone_scores: log-probability by tone word, where the tone was a scored choice.
      seconds: from asking to answer; of the whole batch, where there was one.
      finish_reason: `stop`, `length` (cut at the limit), or the service's own word.
      repairs: `asked_again`, where a first answer was of no use.
    """

    text: str
    model: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    finish_reason: str = "stop"
    tone_scores: tuple[tuple[str, float], ...] = ()
    repairs: tuple[str, ...] = ()

    @property
    def circumstances(self) -> str:
        """What explains an answer that is of no use, for an error message."""
        again = "asked twice, " if self.repairs else ""
        return f" ({again}finish reason {self.finish_reason})"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a model gave no answer to one request; the others of its batch are not touched.

    Attributes:
      reason: a short code for counting, e.g. `prompt_too_long`.
      answer: what the model said all the same.
      prompt_tokens, answer_tokens: paid for nevertheless.
    """

    reason: str
    error: str
    answer: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
