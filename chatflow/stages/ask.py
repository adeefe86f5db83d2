"""AskModel: runs RunInference between two Reshuffles; failures become dead letters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import apache_beam as beam

from chatflow import metrics
from chatflow.chat_text import encodable
from chatflow.dead_letters import DeadLettered, Outcome, payload_of
from chatflow.errors import ModelError
from chatflow.models.inference import KeyedModelHandler, RunInference
from chatflow.models.requests import FALLBACK, Answer, Failure, Request
from chatflow.models.spec import Model, name_of
from chatflow.prompts.questions import ChatQuestion, Question
from chatflow.records import AnalysedChat

RESHUFFLE_KEYS = 1024
"""The number of random keys: more than a step has threads; few, as runners keep state per key."""

AFTER_MODEL = "AfterModel"
"""The label of the Reshuffle behind a model."""


QuestionT = TypeVar("QuestionT", bound=Question)


class Answered(NamedTuple, Generic[QuestionT]):
    question: QuestionT
    answer: Answer


class Unanswered(NamedTuple, Generic[QuestionT]):
    question: QuestionT
    failure: Failure


@beam.typehints.with_input_types(Question)
@dataclasses.dataclass
class AskModel(beam.PTransform):
    """Turns questions into answers; `stage` names this step in dead letters.

    Without `with_letters`, a failure leaves as an `Unanswered` instead of a dead letter.

    The model's handler returns one `Answer` or `Failure` per `Request`. The Reshuffle before it
    prevents fusion of the read with the model; the one after it prevents that a retried sink asks
    the model again.
    """

    model: Model
    stage: str
    with_letters: bool = True

    def expand(self, questions: beam.PCollection[Question]) -> Outcome:
        infer = RunInference(
            KeyedModelHandler(self.model.handler), model_identifier=self.model.identifier
        ).with_resource_hints(**self.model.hints)
        outcome: Outcome = (
            questions
            | "BeforeModel" >> beam.Reshuffle(RESHUFFLE_KEYS)
            | "WithKey" >> beam.Map(_keyed)
            | "RunInference" >> infer
            | AFTER_MODEL >> beam.Reshuffle(RESHUFFLE_KEYS)
            | "TakeAnswers"
            >> DeadLettered(
                self.stage,
                answered if self.with_letters else tried,
                Answered if self.with_letters else Answered | Unanswered,
            )
        )
        return outcome


def _keyed(question: Question) -> tuple[Question, Any]:
    return question, question.request


def answered(result: tuple[QuestionT, Any]) -> Iterable[Answered[QuestionT]]:
    """Yields an answer with its question; counts tokens; raises `ModelError` for a `Failure`."""
    for found in tried(result):
        if isinstance(found, Unanswered):
            failure = found.failure
            raise ModelError(failure.reason, failure.error, failure.answer)
        yield found


def tried(
    result: tuple[QuestionT, Any],
) -> Iterable[Answered[QuestionT] | Unanswered[QuestionT]]:
    """Yields an answer or a failure with its question; counts tokens."""
    question, prediction = result
    inference: Answer | Failure = prediction.inference
    request = question.request
    if isinstance(inference, Failure):
        _count_tokens(request, inference)
        _count_tokens(request.otherwise, inference.other)
        yield Unanswered(question, inference)
        return
    if FALLBACK in inference.repairs:
        _count_tokens(request, inference.first)
        question = getattr(question, "otherwise", None) or question
    _count_tokens(question.request, inference)
    metrics.observe("prompt_tokens_per_answer", inference.prompt_tokens)
    metrics.observe("answer_tokens_per_answer", inference.answer_tokens)
    metrics.observe("latency_ms", round(inference.seconds * 1000))
    yield Answered(question, dataclasses.replace(inference, text=encodable(inference.text)))


def _count_tokens(request: Request | None, said: Answer | Failure | None) -> None:
    """Counts the tokens that a model used, in total and by its name."""
    if request is None or said is None:
        return
    for kind in ("prompt_tokens", "answer_tokens", "cached_tokens"):
        metrics.count(kind, getattr(said, kind))
        metrics.count(f"{kind}_of/{name_of(request.model)}", getattr(said, kind))


@payload_of.register
def _question_payload(question: ChatQuestion) -> dict[str, Any]:
    """Returns the chat with the user whose question failed, so that a replay asks only for them."""
    if question.analysis is not None:
        return payload_of(AnalysedChat(question.chat, question.analysis))
    return payload_of(question.chat.model_copy(update={"user_id": question.user_id}))
