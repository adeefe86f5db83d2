"""DraftApologies: for each angry customer, a text for support staff to review, or a flag."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsIter

from chatflow import metrics
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadAnswerError, BadInputError
from chatflow.models.spec import Model
from chatflow.prompts.answers import (
    accuses,
    draft_grounding,
    parse_draft,
    says_any,
)
from chatflow.prompts.questions import ChatQuestion, DraftPrompt
from chatflow.prompts.routes import Routed
from chatflow.prompts.updates import Updates, newest
from chatflow.records import (
    FAILED,
    AnalysedChat,
    DeadLetter,
    Draft,
    Flag,
    Sentiment,
    digest,
    now,
)
from chatflow.stages.ask import Answered, AskModel
from chatflow.stages.replay import open_analysis


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
      `drafts`: a `Draft` for each angry user. It has a flag in place of a text, and the model
        is not asked for one, where the analysis is less sure of the anger than the template's
        `draft_confidence`; also where the model's text is not fit to be shown.
      `dead_letters`: a letter for each angry user who has none; the analysis stands.
    """

    model: Model
    prompt: DraftPrompt | Routed[DraftPrompt]
    updates: AsIter | None = None

    def expand(self, analysed: beam.PCollection[AnalysedChat]) -> Drafted:
        angry = analysed | "OnlyAngry" >> beam.Filter(is_angry)
        ask = functools.partial(ask_for_draft, self.prompt)
        rendered = angry | "RenderPrompt" >> DeadLettered(
            "draft_prompt", ask, ChatQuestion | Draft, self.updates
        )
        asked, unsure = rendered.ok | "ByKind" >> beam.Partition(_is_flagged, 2)
        asked.element_type, unsure.element_type = ChatQuestion, Draft
        answered = asked | "AskModel" >> AskModel(self.model, "draft_model")
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("draft_answer", drafted, Draft)
        failed = (rendered.dead_letters, answered.dead_letters, parsed.dead_letters)
        return Drafted((parsed.ok, unsure) | "AllDrafts" >> beam.Flatten(), failed | beam.Flatten())


def is_angry(analysed: AnalysedChat) -> bool:
    return analysed.analysis.sentiment == Sentiment.ANGRY


def ask_for_draft(
    prompt: DraftPrompt | Routed[DraftPrompt],
    analysed: AnalysedChat,
    updates: Iterable[Updates] = (),
) -> Iterable[ChatQuestion | Draft]:
    """A question for the model; a flagged draft where the analysis is too unsure for one."""
    chat, analysis = analysed
    metrics.count("drafts_asked")
    asking = newest(updates, "draft", prompt).of(chat)
    question = asking.question(chat, analysis.user_id, analysis)
    least = question.settings.get("draft_confidence", 0)
    if analysis.confidence is not None and analysis.confidence < least:
        yield counted(draft_of(question, asking.result_name, flag="low_confidence"))
    else:
        yield question


def _is_flagged(asked: ChatQuestion | Draft, _: int) -> int:
    return int(isinstance(asked, Draft))


def drafted(answered: Answered[ChatQuestion]) -> Iterable[Draft]:
    yield counted(to_draft(answered))


def counted(draft: Draft) -> Draft:
    metrics.count(f"drafts_flagged/{draft.flag}" if draft.flag else "drafted")
    return draft


def to_draft(answered: Answered[ChatQuestion]) -> Draft:
    """Checks the text that the model wrote; where it is not fit to be shown, a flag says so.

    Raises:
      BadAnswerError: see `answers.parse_draft`; with the model's finish reason.
    """
    question, answer = answered
    settings, asked = question.settings, question.request.parts[0]
    try:
        parsed = parse_draft(answer.text, asked, question.chat, settings["draft_characters"])
    except BadAnswerError as error:
        raise error.explained(answer.circumstances) from None
    if says_any(parsed.text, settings.get("refused_phrases", ())):
        return draft_of(question, answer.model, flag="refused_phrase")
    chat, user_id = question.chat, question.user_id
    if settings.get("flag_accusations", False) and accuses(answer.text, chat, user_id):
        return draft_of(question, answer.model, flag="accuses_customer")
    needed = settings.get("draft_grounding", 0)
    # The template's own words around the model's do not count.
    written = answer.text.strip().removesuffix(asked.tail).removeprefix(asked.lead)
    if needed and draft_grounding(written, chat, user_id) < needed:
        return draft_of(question, answer.model, flag="ungrounded")
    return draft_of(question, answer.model, text=parsed.text, repairs=parsed.repairs)


def draft_of(
    question: ChatQuestion,
    model: str,
    text: str | None = None,
    flag: Flag | None = None,
    repairs: tuple[str, ...] = (),
) -> Draft:
    assert question.analysis is not None  # set by ask_for_draft
    return Draft(
        draft_id=question.id_of(model),
        analysis_id=question.analysis.analysis_id,
        chat_id=question.chat.chat_id,
        user_id=question.user_id,
        revision=question.chat.revision,
        text=text,
        flag=flag,
        repairs=repairs,
        model=model,
        prompt_version=question.prompt_version,
        drafted_at=now(),
    )


def to_be_written(letter: DeadLetter) -> Iterable[Draft]:
    """For a draft that failed: word for the databases in which drafts are reviewed.

    So its customer waits there like others, until there is a draft after all.
    """
    with contextlib.suppress(BadInputError):  # the letter is there all the same
        for _, analysis in open_analysis(letter):
            yield Draft(
                draft_id=digest(FAILED, analysis.analysis_id),
                flag=FAILED,
                prompt_version="",  # none wrote it
                drafted_at=letter.failed_at,
                **{name: getattr(analysis, name) for name in _OF_ANALYSIS},
            )


_OF_ANALYSIS = ("analysis_id", "chat_id", "user_id", "revision", "model")
