"""DraftApologies: for each angry customer, a text for support staff to review."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam

from chatflow import metrics
from chatflow.answers import parse_draft
from chatflow.asking import Answered, AskModel
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadAnswerError
from chatflow.models import Model
from chatflow.prompts import DraftPrompt, Question
from chatflow.records import AnalysedChat, Draft, Sentiment, now


class Drafted(NamedTuple):
    drafts: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(AnalysedChat)
@dataclasses.dataclass
class DraftApologies(beam.PTransform):
    """Analyses to apology drafts: the angry ones only.

    Attributes:
      model: who writes; the same as for the analyses, so that it is loaded once.
      prompt: the template that asks for an apology.

    Outputs:
      `drafts`: a `Draft` for each angry user.
      `dead_letters`: a letter for each angry user who has none; the analysis stands.
    """

    model: Model
    prompt: DraftPrompt

    def expand(self, analysed: beam.PCollection[AnalysedChat]) -> Drafted:
        angry = analysed | "OnlyAngry" >> beam.Filter(is_angry)
        asked = angry | "RenderPrompt" >> DeadLettered("draft_prompt", self.ask, Question)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "draft_model")
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("draft_answer", self.parse, Draft)
        failed = (asked.dead_letters, answered.dead_letters, parsed.dead_letters)
        return Drafted(parsed.ok, failed | beam.Flatten())

    def ask(self, analysed: AnalysedChat) -> Iterable[Question]:
        metrics.count("drafts_asked")
        yield self.prompt.question(analysed.chat, analysed.analysis.user_id, analysed.analysis)

    def parse(self, answered: Answered) -> Iterable[Draft]:
        draft = to_draft(answered, self.prompt)
        metrics.count("drafted")
        yield draft


def is_angry(analysed: AnalysedChat) -> bool:
    return analysed.analysis.sentiment == Sentiment.ANGRY


def to_draft(answered: Answered, prompt: DraftPrompt) -> Draft:
    """Checks the text that the model wrote.

    Raises:
      BadAnswerError: see `answers.parse_draft`; with the model's finish reason.
    """
    question, answer = answered
    assert question.analysis is not None  # set by DraftApologies.ask
    settings = prompt.template.settings
    try:
        parsed = parse_draft(
            answer.text,
            question.request.parts[0],
            question.chat,
            settings["draft_characters"],
            settings.get("refused_phrases", ()),
        )
    except BadAnswerError as error:
        raise error.explained(answer.circumstances) from None
    return Draft(
        draft_id=question.request.id,
        analysis_id=question.analysis.analysis_id,
        chat_id=question.chat.chat_id,
        user_id=question.user_id,
        revision=question.chat.revision,
        text=parsed.text,
        repairs=parsed.repairs,
        model=answer.model,
        prompt_version=prompt.version,
        drafted_at=now(),
    )
