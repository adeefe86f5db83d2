"""DraftApologies: for each angry customer, a text for support staff to review."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsIter

from chatflow import metrics
from chatflow.answers import parse_draft
from chatflow.asking import Answered, AskModel
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadAnswerError
from chatflow.models import Model
from chatflow.prompts import DraftPrompt, Question
from chatflow.records import AnalysedChat, Draft, Sentiment, now
from chatflow.routes import Routed
from chatflow.updates import Updates, newest


class Drafted(NamedTuple):
    drafts: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(AnalysedChat)
@dataclasses.dataclass
class DraftApologies(beam.PTransform):
    """Analyses to apology drafts: the angry ones only.

    Attributes:
      model: who writes; the same as for the analyses, so that it is loaded once.
      prompt: the template that asks for an apology, the same or another for each chat.
      updates: of prompts, while the pipeline runs; see `updates.WatchUpdates`.

    Outputs:
      `drafts`: a `Draft` for each angry user; none where the model was less sure of the anger
        than the template's `draft_confidence`.
      `dead_letters`: a letter for each angry user who has none; the analysis stands.
    """

    model: Model
    prompt: DraftPrompt | Routed[DraftPrompt]
    updates: AsIter | None = None

    def expand(self, analysed: beam.PCollection[AnalysedChat]) -> Drafted:
        angry = analysed | "OnlyAngry" >> beam.Filter(is_angry)
        ask = functools.partial(ask_for_draft, self.prompt)
        asked = angry | "RenderPrompt" >> DeadLettered("draft_prompt", ask, Question, self.updates)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "draft_model")
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("draft_answer", drafted, Draft)
        failed = (asked.dead_letters, answered.dead_letters, parsed.dead_letters)
        return Drafted(parsed.ok, failed | beam.Flatten())


def is_angry(analysed: AnalysedChat) -> bool:
    return analysed.analysis.sentiment == Sentiment.ANGRY


def ask_for_draft(
    prompt: DraftPrompt | Routed[DraftPrompt],
    analysed: AnalysedChat,
    updates: Iterable[Updates] = (),
) -> Iterable[Question]:
    chat, analysis = analysed
    metrics.count("drafts_asked")
    question = newest(updates, "draft", prompt).of(chat).question(chat, analysis.user_id, analysis)
    least = question.settings.get("draft_confidence", 0)
    if analysis.confidence is not None and analysis.confidence < least:
        metrics.count("drafts_withheld")
    else:
        yield question


def drafted(answered: Answered) -> Iterable[Draft]:
    draft = to_draft(answered)
    metrics.count("drafted")
    yield draft


def to_draft(answered: Answered) -> Draft:
    """Checks the text that the model wrote.

    Raises:
      BadAnswerError: see `answers.parse_draft`; with the model's finish reason.
    """
    question, answer = answered
    assert question.analysis is not None  # set by DraftApologies.ask
    settings = question.settings
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
        draft_id=question.id_of(answer.model),
        analysis_id=question.analysis.analysis_id,
        chat_id=question.chat.chat_id,
        user_id=question.user_id,
        revision=question.chat.revision,
        text=parsed.text,
        repairs=parsed.repairs,
        model=answer.model,
        prompt_version=question.prompt_version,
        drafted_at=now(),
    )
