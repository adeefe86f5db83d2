"""A model that keeps its answers in a database, and asks nothing twice."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Sequence

import pydantic

from chatflow.database.answers import keep_answer, kept_answers
from chatflow.database.connections import opened, password_at
from chatflow.errors import one_line
from chatflow.models.base import LanguageModel
from chatflow.models.requests import Answer, Failure, Request

_log = logging.getLogger(__name__)

_ANSWER = pydantic.TypeAdapter(Answer)


class KeptAnswers(LanguageModel):
    """Answers from a database what was answered before, by any process; asks a model the rest.

    Each answer is kept as soon as it is there: a run that is stopped loses only what is in flight.
    Failures are not kept. If the database cannot be read, the requests fail, so that nothing is
    paid for twice. If it cannot be written, the answer is used all the same.

    Args:
      uri, password: of the database; see `connections.Database`, `secrets.PLACES`.
    """

    loads = 0

    def __init__(self, model: LanguageModel, uri: str, password: str = ""):
        self._model = model
        self._database = opened(uri, password_at(password))
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        ids = [question_id(request) for request in requests]
        kept = kept_answers(self._database, ids)
        missing = [at for at, one in enumerate(ids) if one not in kept]
        some = [requests[at] for at in missing]
        asked = self._model.answer_each(some, self._keep) if some else []
        answers = dict(zip(missing, asked, strict=True))
        self._count("answers_known", len(ids) - len(missing))
        return [answers[at] if at in answers else _free(kept[one]) for at, one in enumerate(ids)]

    def _keep(self, request: Request, answer: Answer) -> None:
        try:
            text = _ANSWER.dump_json(answer).decode()
            keep_answer(self._database, question_id(request), answer.model, text)
        except Exception as error:  # the answer was paid for, and is used
            self._count("answers_not_kept")
            _log.warning("an answer is not kept in %s: %s", self._database.uri, one_line(error))

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


def _free(text: str) -> Answer:
    """Returns an answer that was paid for before, at no cost."""
    answer = _ANSWER.validate_json(text)
    return dataclasses.replace(
        answer, prompt_tokens=0, answer_tokens=0, cached_tokens=0, seconds=0.0
    )
