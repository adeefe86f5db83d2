"""AskModel: runs RunInference between two Reshuffles; failures become dead letters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import apache_beam as beam
import pydantic

from chatflow import metrics
from chatflow.chat_text import encodable
from chatflow.coders import LOSSLESS, JsonCoder, register
from chatflow.dead_letters import DeadLettered, Outcome, payload_of
from chatflow.errors import ModelError
from chatflow.models.inference import KeyedModelHandler, PredictionResult, RunInference
from chatflow.models.requests import FALLBACK, Answer, Failure, Request
from chatflow.models.spec import Model, name_of
from chatflow.prompts.questions import ChatQuestion, Question, with_read
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


class Prediction:
    """Stands for Beam's `PredictionResult` in types, so that it has its own coder."""


_SAID: pydantic.TypeAdapter[Answer | Failure] = pydantic.TypeAdapter(
    Annotated[Answer | Failure, pydantic.Field(union_mode="left_to_right")], config=LOSSLESS
)


class _PredictionCoder(JsonCoder):
    """Writes what a model said; the request stands beside it, in the question."""

    def to_json(self, element: PredictionResult) -> bytes:
        return _SAID.dump_json(element.inference, exclude_defaults=True, warnings="error")

    def of_json(self, content: bytes) -> PredictionResult:
        return PredictionResult(None, _SAID.validate_json(content))


class _AnalysedCoder(JsonCoder):
    """Knows the type of what was read."""

    def of_json(self, content: bytes) -> AnalysedChat:
        return with_read(super().of_json(content))


register(ChatQuestion)
register(AnalysedChat, coder=_AnalysedCoder)
register(Prediction, coder=_PredictionCoder)


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
        predicted = (
            questions
            | "BeforeModel" >> beam.Reshuffle(RESHUFFLE_KEYS)
            | "WithKey" >> beam.Map(_keyed)
            | "RunInference" >> infer
        )
        predicted.element_type = beam.typehints.Tuple[questions.element_type, Prediction]
        outcome: Outcome = (
            predicted
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
    return question, question.asked


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
        other = getattr(question, "otherwise", None)
        _count_tokens(other and other.request, inference.other)
        yield Unanswered(question, inference)
        return
    if FALLBACK in inference.repairs:
        _count_tokens(request, inference.first)
        question = getattr(question, "otherwise", None) or question
    _count_tokens(question.request, inference)
    metrics.observe("prompt_tokens_per_answer", inference.prompt_tokens)
    metrics.observe("answer_tokens_per_answer", inference.answer_tokens)
    metrics.observe("latency_ms", round(inference.seconds * 1000))
    if (text := encodable(inference.text)) != inference.text:
        inference = dataclasses.replace(inference, text=text)
    yield Answered(question, inference)


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
