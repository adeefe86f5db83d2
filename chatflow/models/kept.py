"""A model that keeps its answers in a database, and asks nothing twice."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence

import pydantic

from chatflow.chat_text import encodable
from chatflow.errors import one_line
from chatflow.models.base import OVER_BUDGET, LanguageModel
from chatflow.models.prices import Price
from chatflow.models.requests import Answer, Failure, Request, with_others
from chatflow.models.spec import name_of

_log = logging.getLogger(__name__)

_ANSWER = pydantic.TypeAdapter(Answer)


@dataclasses.dataclass(frozen=True)
class KeptSettings:
    """Where answers are kept, and what a run may spend on them.

    Attributes:
      uri, password: of the database; see `connections.Database`, `secrets.PLACES`.
      run: names the run; all its workers book what they spend under it.
      most_usd: the most to spend, in US dollars; 0: any sum.
      prices: of each model, by its name.
    """

    uri: str = dataclasses.field(repr=False)  # it may hold a password
    password: str = ""
    run: str = ""
    most_usd: float = 0.0
    prices: Mapping[str, Price] = dataclasses.field(default_factory=dict)


class KeptAnswers(LanguageModel):
    """Answers from a database what was answered before, by any process; asks a model the rest.

    Each answer is kept as soon as it arrives: a run that is stopped loses only what is in flight.
    Failures and answers that cannot be used are not kept. If the database cannot be read, the
    requests fail, so that nothing is paid for twice. If it cannot be written, the answer is still
    used.

    Once a run has spent `most_usd`, requests fail with `over_budget`. Requests in flight at that
    moment are still answered, and may cost more.
    """

    loads = 0

    def __init__(self, model: LanguageModel, settings: KeptSettings):
        from chatflow.database import answers
        from chatflow.database.connections import opened, password_at

        self.settings = settings
        self._model, self._answers = model, answers
        self._database = opened(settings.uri, password_at(settings.password))
        self._spent = answers.spend(self._database, settings.run, 0.0) if settings.most_usd else 0.0
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        ids = [question_id(request) for request in requests]
        kept = self._answers.kept_answers(self._database, ids)
        missing = [at for at, one in enumerate(ids) if one not in kept]
        # The other model's answer may be kept, too: `with_others` looks for it.
        some = [dataclasses.replace(requests[at], otherwise=None) for at in missing]
        asked = self._model.answer_each(some, self) if some else []
        answers = dict(zip(missing, asked, strict=True))
        self._count("answers_known", len(ids) - len(missing))
        found = [answers[at] if at in answers else _free(kept[one]) for at, one in enumerate(ids)]
        return with_others(requests, found, self.answer)

    def refusal(self) -> Failure | None:
        most, spent = self.settings.most_usd, self._spent
        if not most or spent < most:
            return None
        said = f"the run has spent {spent:.4f} of --max_cost_usd={most:g}; replay this later"
        return Failure(OVER_BUDGET, said)

    def note(self, request: Request, answer: Answer | Failure) -> None:
        try:
            if isinstance(answer, Answer) and _is_usable(request, answer):
                whole = dataclasses.replace(answer, text=encodable(answer.text))
                text = _ANSWER.dump_json(whole).decode()
                kept = self._answers.Kept(
                    question_id(request), request.chat_id, request.model, text
                )
                self._answers.keep_answer(self._database, kept)
        except Exception as error:  # the answer was paid for, and is used
            self._count("answers_not_kept")
            _log.warning("could not keep an answer in %s: %s", self._database.uri, one_line(error))
        price = self.settings.prices.get(name_of(request.model))
        if self.settings.most_usd and price is not None:
            self._spend(price.of(answer.prompt_tokens, answer.answer_tokens, answer.cached_tokens))

    def _spend(self, usd: float) -> None:
        total = self._spent + usd
        try:
            total = self._answers.spend(self._database, self.settings.run, usd)
        except Exception as error:  # it counts in this process, at least
            _log.warning("could not book a cost in %s: %s", self._database.uri, one_line(error))
        self._spent = max(self._spent, total)

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def new_counts(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
        return {**self._model.new_counts(), **counts}

    def throttled(self) -> float:
        return self._model.throttled()

    def close(self) -> None:
        self._model.close()


def question_id(request: Request) -> str:
    """Returns what identifies a question: the model with its weights, and the prompts."""
    asked = (request.id, request.task, *(part.prompt for part in request.parts))
    return hashlib.sha256(repr(asked).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _is_usable(request: Request, answer: Answer) -> bool:
    """Returns whether an answer is worth keeping: whole, and of the form that was asked for."""
    try:
        for part in request.parts:
            if part.check is not None:
                part.check(answer.text)
    except Exception:  # a check failed; a replay must ask again
        return False
    return answer.finish_reason != "length"


def _free(text: str) -> Answer:
    """Returns an answer that was paid for before, at no cost."""
    answer = _ANSWER.validate_json(text)
    return dataclasses.replace(
        answer, prompt_tokens=0, answer_tokens=0, cached_tokens=0, seconds=0.0
    )
