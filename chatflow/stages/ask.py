"""Questions to answers: RunInference between two Reshuffles, failures as dead letters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import apache_beam as beam
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference

from chatflow import metrics
from chatflow.dead_letters import DeadLettered, Outcome, payload_of
from chatflow.errors import ModelError
from chatflow.models.requests import Answer, Failure
from chatflow.models.spec import Model
from chatflow.prompts.questions import ChatQuestion, Question
from chatflow.records import AnalysedChat

RESHUFFLE_KEYS = 1024
"""Random keys of a reshuffle: more than a step has threads, and not a new one for each
element of a stream, for runners keep a little of each key that they have seen."""


QuestionT = TypeVar("QuestionT", bound=Question)


class Answered(NamedTuple, Generic[QuestionT]):
    question: QuestionT
    answer: Answer


@beam.typehints.with_input_types(Question)
@dataclasses.dataclass
class AskModel(beam.PTransform):
    """Questions to answers.

    Reshuffles before and after: the read is not fused to the model, and a sink that is
    tried again never asks the model again.

    Attributes:
      model: its handler answers `Request`s with `Answer`s, or with a `Failure` for each
        that fails.
      stage: names this step in dead letters.
    """

    model: Model
    stage: str

    def expand(self, questions: beam.PCollection[Question]) -> Outcome:
        infer = RunInference(
            KeyedModelHandler(self.model.handler), model_identifier=self.model.identifier
        ).with_resource_hints(**self.model.hints)
        outcome: Outcome = (
            questions
            | "BeforeModel" >> beam.Reshuffle(RESHUFFLE_KEYS)
            | "WithKey" >> beam.Map(_keyed)
            | "RunInference" >> infer
            | "AfterModel" >> beam.Reshuffle(RESHUFFLE_KEYS)
            | "TakeAnswers" >> DeadLettered(self.stage, answered, Answered)
        )
        return outcome


def _keyed(question: Question) -> tuple[Question, Any]:
    return question, question.request


def answered(result: tuple[QuestionT, Any]) -> Iterable[Answered[QuestionT]]:
    """An answer beside its question; counts what it took.

    Raises:
      ModelError: the model gave a `Failure`.
    """
    question, prediction = result
    inference = prediction.inference
    metrics.count("prompt_tokens", inference.prompt_tokens)
    metrics.count("answer_tokens", inference.answer_tokens)
    if isinstance(inference, Failure):
        raise ModelError(inference.reason, inference.error, inference.answer)
    metrics.observe("prompt_tokens_per_answer", inference.prompt_tokens)
    metrics.observe("answer_tokens_per_answer", inference.answer_tokens)
    metrics.observe("latency_ms", round(inference.seconds * 1000))
    yield Answered(question, inference)


@payload_of.register
def _question_payload(question: ChatQuestion) -> dict[str, Any]:
    """One user of the chat failed, so it is this user who is asked for again."""
    if question.analysis is not None:
        return payload_of(AnalysedChat(question.chat, question.analysis))
    return payload_of(question.chat.model_copy(update={"user_id": question.user_id}))
