"""DraftApologies: writes a text or a flag for each angry customer, which support staff reviews."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsIter

from chatflow import metrics
from chatflow.choices.drafts import apology
from chatflow.choices.heads import Read
from chatflow.choices.plain import plainly_read
from chatflow.choices.words import Words
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
from chatflow.prompts.truth import draft_faults
from chatflow.prompts.updates import Updates, newest
from chatflow.records import (
    FAILED,
    AnalysedChat,
    Analysis,
    DeadLetter,
    Draft,
    Flag,
    Sentiment,
    digest,
    now,
)
from chatflow.stages.analyse import quotations
from chatflow.stages.ask import Answered, AskModel
from chatflow.stages.replay import open_analysis


class Drafted(NamedTuple):
    drafts: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(AnalysedChat)
@dataclasses.dataclass
class DraftApologies(beam.PTransform):
    """Turns analyses of angry customers into apology drafts.

    `prompt` and `updates` are as in `AnalyseChats`. If both have the same `model`, it is loaded
    only once.

    Outputs:
      `drafts`: one `Draft` per angry user. It has a flag instead of a text if the analysis is less
        confident than the template's `draft_confidence` (the model is then not asked), or if the
        model's text must not be shown.
      `dead_letters`: one letter per angry user without a draft; the analysis is kept.
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
        parse = functools.partial(drafted, self.prompt)
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("draft_answer", parse, Draft)
        failed = (rendered.dead_letters, answered.dead_letters, parsed.dead_letters)
        return Drafted((parsed.ok, unsure) | "AllDrafts" >> beam.Flatten(), failed | beam.Flatten())


def is_angry(analysed: AnalysedChat) -> bool:
    return analysed.analysis.sentiment == Sentiment.ANGRY


def ask_for_draft(
    prompt: DraftPrompt | Routed[DraftPrompt],
    analysed: AnalysedChat,
    updates: Iterable[Updates] = (),
) -> Iterable[ChatQuestion | Draft]:
    """Yields a question for the model, or a draft if the model is not needed.

    Such a draft is a flag if the analysis is not sure enough or the customer is angry at somebody
    else, and a composed text if the prompt folder has no block `draft`.
    """
    chat, analysis, read = analysed
    metrics.count("drafts_asked")
    asking = newest(updates, "draft", prompt).of(chat)
    question = asking.question(chat, analysis.user_id, analysis, read)
    sure = confidence(analysis, read)
    if sure is not None and sure < question.settings.get("draft_confidence", 0):
        toward = read.chosen.chat.get("toward", {}) if read is not None else {}
        by_others = toward.get("third_party", 0.0) > toward.get("company", 0.0)
        flag: Flag = "third_party" if by_others else "low_confidence"
        yield counted(draft_of(question, asking.result_name, flag=flag))
        return
    if not asking.block_names:
        yield counted(composed(question, asking.result_name, asking.words))
    elif asking.version == prompt.of(chat).version:
        yield question
    else:  # an update, which `instead_of` does not know
        yield with_instead(question, asking)


def with_instead(question: ChatQuestion, asking: DraftPrompt) -> ChatQuestion:
    """Returns a question with the drafts to use if what models write is unfit."""
    other = question.otherwise
    if other is not None and asking.fallback is not None:
        name, words = asking.fallback.result_name, asking.fallback.words
        other = dataclasses.replace(other, instead=composed(other, name, words))
    made = composed(question, asking.result_name, asking.words)
    return dataclasses.replace(question, instead=made, otherwise=other)


def instead_of(question: ChatQuestion, prompt: DraftPrompt | Routed[DraftPrompt]) -> Draft:
    """Returns the draft to use if the one that the model wrote is unfit.

    It is composed only then, by the prompt that asked: `prompt`, or one that it leads to.
    """
    if question.instead is not None:
        return question.instead
    asked = prompt.of(question.chat)
    for other in asked.every:
        if isinstance(other, DraftPrompt) and other.version == question.prompt_version:
            asked = other
    return composed(question, asked.result_name, asked.words)


def confidence(analysis: Analysis, read: Read | None) -> float | None:
    """Returns the probability that the customer is angry at the company; None if it is unknown."""
    toward = read.chosen.chat.get("toward") if read is not None else None
    if toward is None or analysis.confidence is None:
        return analysis.confidence
    company, third_party = toward.get("company", 1.0), toward.get("third_party", 0.0)
    return round(analysis.confidence * company / max(company + third_party, 1e-6), 4)


def composed(question: ChatQuestion, model: str, texts: Mapping[str, Words]) -> Draft:
    """Returns an apology composed of approved clauses and the customer's words, or a flag.

    `texts` are the fixed texts by language.
    """
    chat, analysis = question.chat, question.analysis
    assert analysis is not None  # set by ask_for_draft
    words = texts.get(analysis.language or "en")
    if words is None or analysis.unproven_language:
        return draft_of(question, model, flag="unproven_language")
    read = question.read or plainly_read(chat, question.user_id)
    made = apology(
        read.sentences,
        words,
        read.chosen.chat.get("grievances", {}),
        read.chosen.column("evidence", "yes"),
        read.chosen.column("impact", "yes"),
        read.chosen.chat.get("resolved", {}).get("yes", 0.0),
    )
    return draft_of(
        question,
        model,
        text=made.text,
        flag=made.flag,
        grievances=made.grievances,
        evidence=quotations(chat, read.sentences, made.quoted),
        confidence=confidence(analysis, question.read),
    )


def _is_flagged(asked: ChatQuestion | Draft, _: int) -> int:
    return int(isinstance(asked, Draft))


def drafted(
    prompt: DraftPrompt | Routed[DraftPrompt], answered: Answered[ChatQuestion]
) -> Iterable[Draft]:
    yield counted(to_draft(answered, prompt))


def counted(draft: Draft) -> Draft:
    metrics.count(f"drafts_flagged/{draft.flag}" if draft.flag else "drafted")
    return draft


def to_draft(answered: Answered[ChatQuestion], prompt: DraftPrompt | Routed[DraftPrompt]) -> Draft:
    """Checks the text that the model wrote, and returns the draft; a bad text becomes a flag.

    Raises:
      BadAnswerError: see `prompts.answers.parse_draft`; adds the model's finish reason.
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
    if draft_faults(parsed.text, chat, user_id):
        instead = instead_of(question, prompt)
        repairs = (*answer.repairs, *parsed.repairs)
        if instead.text is not None:
            repairs += ("composed",)
        kept = {"repairs": repairs, "model": answer.model, "draft_id": question.id_of(answer.model)}
        return instead.model_copy(update=kept)
    needed = settings.get("draft_grounding", 0)
    # Only the model's own words count, without those that the template puts around them.
    written = answer.text.strip().removesuffix(asked.tail).removeprefix(asked.lead)
    if needed and draft_grounding(written, chat, user_id) < needed:
        return draft_of(question, answer.model, flag="ungrounded")
    return draft_of(
        question,
        answer.model,
        text=parsed.text,
        repairs=(*answer.repairs, *parsed.repairs),
        confidence=question.analysis.confidence if question.analysis else None,
    )


def draft_of(
    question: ChatQuestion,
    model: str,
    text: str | None = None,
    flag: Flag | None = None,
    repairs: tuple[str, ...] = (),
    **others: Any,
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
        **others,
    )


def to_be_written(letter: DeadLetter) -> Iterable[Draft]:
    """Yields a flagged draft for a failed one, so that reviewers also see its customer."""
    with contextlib.suppress(BadInputError):  # the dead letter exists in any case
        for _, analysis, _ in open_analysis(letter):
            yield Draft(
                draft_id=digest(FAILED, analysis.analysis_id),
                flag=FAILED,
                prompt_version="",  # no prompt wrote it
                drafted_at=letter.failed_at,
                **{name: getattr(analysis, name) for name in _OF_ANALYSIS},
            )


_OF_ANALYSIS = ("analysis_id", "chat_id", "user_id", "revision", "model")
