"""AnalyseChats: finds out how each customer feels, and summarises the chat."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsIter

from chatflow import metrics
from chatflow.choices.heads import Chosen, Read
from chatflow.choices.plain import plainly_read
from chatflow.choices.sentences import Sentence
from chatflow.choices.summaries import composed
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadAnswerError, ElementError
from chatflow.models.requests import Answer
from chatflow.models.spec import Model
from chatflow.prompts.answers import copies_template, grounding, repeats_itself
from chatflow.prompts.questions import AnalysisPrompt, ChatQuestion, reader, tones_of
from chatflow.prompts.routes import Routed
from chatflow.prompts.truth import summary_faults
from chatflow.prompts.updates import Updates, newest
from chatflow.records import (
    AnalysedChat,
    Analysis,
    Chat,
    FieldValue,
    FirstOpinion,
    Quotation,
    Sentiment,
    now,
)
from chatflow.stages.ask import Answered, AskModel, Unanswered
from chatflow.stages.skip import SkipDone


class Analysed(NamedTuple):
    analysed: beam.PCollection
    dead_letters: beam.PCollection
    undrafted: beam.PCollection | None = None


@beam.typehints.with_input_types(Chat)
@dataclasses.dataclass
class AnalyseChats(beam.PTransform):
    """Turns chats into analyses: renders the prompt, asks the model, parses the answer.

    Attributes:
      prompt: asks for tone and summary; the same for all chats, or chosen for each chat.
      updates: prompts that change while the pipeline runs; see `prompts.updates.WatchUpdates`.
      escalates: whether any prompt has a second one for chats that the model is not sure of.
      skip: leaves out users whose analysis is in earlier results.

    Outputs:
      `analysed`: one `AnalysedChat` per user whose tone was asked for.
      `dead_letters`: one letter, with the reason, per user without an analysis.
      `undrafted`: with `skip`, earlier analyses that still need a draft.
    """

    model: Model
    prompt: AnalysisPrompt | Routed[AnalysisPrompt]
    updates: AsIter | None = None
    escalates: bool = False
    skip: SkipDone | None = None

    def expand(self, chats: beam.PCollection[Chat]) -> Analysed:
        ask = functools.partial(ask_for_analysis, self.prompt)
        users = chats | "EachUser" >> beam.FlatMap(each_user)
        undrafted = None
        if self.skip is not None:
            users, undrafted = users | "SkipDone" >> self.skip
        asked = users | "RenderPrompt" >> DeadLettered("prompt", ask, ChatQuestion, self.updates)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "model")
        parse = parsed_only if self.escalates else analysed
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("answer", parse, AnalysedChat)
        failed = (asked.dead_letters, answered.dead_letters, parsed.dead_letters)
        found = parsed.ok
        if self.escalates:
            find = functools.partial(ask_again, self.prompt)
            found = found | "SecondOpinion" >> SecondOpinion(self.model, find, self.updates)
            found = found | "Count" >> beam.Map(count_analysed)
            found.element_type = AnalysedChat
        return Analysed(found, failed | beam.Flatten(), undrafted)


@dataclasses.dataclass
class SecondOpinion(beam.PTransform):
    """Asks another model to analyse the chats that the first model is not sure of.

    If the answer of the second model cannot be used, the first analysis stays, and there is no dead
    letter.
    """

    model: Model
    ask: Callable[..., Iterable[ChatQuestion | AnalysedChat]]
    updates: AsIter | None = None

    def expand(self, analysed: beam.PCollection[AnalysedChat]) -> beam.PCollection[AnalysedChat]:
        sides = filter(None, [self.updates])
        found = analysed | "AskWhatIsUnsure" >> beam.FlatMap(self.ask, *sides)
        sure, unsure = found | "ByKind" >> beam.Partition(_is_question, 2)
        sure.element_type, unsure.element_type = AnalysedChat, ChatQuestion
        answered = unsure | "AskModel" >> AskModel(self.model, "second_model", with_letters=False)
        second = answered.ok | "ParseAnswer" >> beam.FlatMap(second_opinion)
        second.element_type = AnalysedChat
        return (sure, second) | beam.Flatten()


def _is_question(found: ChatQuestion | AnalysedChat, _: int) -> int:
    return int(isinstance(found, ChatQuestion))


def ask_again(
    prompt: AnalysisPrompt | Routed[AnalysisPrompt],
    analysed: AnalysedChat,
    updates: Iterable[Updates] = (),
) -> Iterable[ChatQuestion | AnalysedChat]:
    """Yields a question to the second model, or an analysis that is sure enough."""
    chat, analysis, _ = analysed
    first = newest(updates, "analysis", prompt).of(chat)
    if first.second is None or not first.is_unsure(analysis):
        yield analysed
        return
    metrics.count("escalated")
    try:
        question = first.second.question(chat, analysis.user_id)
    except Exception as error:  # from a template; the chat already has an analysis
        yield kept_first(analysed, reason_of(error))
    else:
        yield dataclasses.replace(question, first=analysed)


def second_opinion(
    answered: Answered[ChatQuestion] | Unanswered[ChatQuestion],
) -> Iterable[AnalysedChat]:
    """Yields the second model's analysis, with the fields that only the first one has."""
    first = answered.question.first
    assert first is not None  # set by ask_again
    if isinstance(answered, Unanswered):
        yield kept_first(first, answered.failure.reason)
        return
    try:
        analysis = to_analysis(answered)
    except Exception as error:  # the chat already has an analysis
        yield kept_first(first, reason_of(error))
        return
    before = first.analysis
    if before.sentiment != analysis.sentiment:
        metrics.count("escalated_changed")
    opinion = FirstOpinion(
        sentiment=before.sentiment, confidence=before.confidence, model=before.model
    )
    fields = analysis.fields or before.fields
    analysis = analysis.model_copy(update={"first": opinion, "fields": fields})
    yield AnalysedChat(first.chat, analysis, read_of(answered) or first.read)


def reason_of(error: Exception) -> str:
    return error.reason if isinstance(error, ElementError) else f"internal_{type(error).__name__}"


def kept_first(first: AnalysedChat, reason: str) -> AnalysedChat:
    """Returns the first analysis, and counts why the second one is missing."""
    metrics.count(f"escalated_kept/{reason}")
    return first


def each_user(chat: Chat) -> Iterable[tuple[Chat, str]]:
    """Yields the chat and a user id for each user who needs an analysis."""
    for user_id in chat.users():
        metrics.count("asked")
        yield chat.model_copy(update={"user_id": user_id}), user_id


def ask_for_analysis(
    prompt: AnalysisPrompt | Routed[AnalysisPrompt],
    asked_for: tuple[Chat, str],
    updates: Iterable[Updates] = (),
) -> Iterable[ChatQuestion]:
    chat, user_id = asked_for
    question = newest(updates, "analysis", prompt).of(chat).question(chat, user_id)
    metrics.count("dropped_messages", question.dropped_messages)
    metrics.count("cut_messages", question.cut_messages)
    yield question


def analysed(answered: Answered[ChatQuestion]) -> Iterable[AnalysedChat]:
    for one in parsed_only(answered):
        yield count_analysed(one)


def parsed_only(answered: Answered[ChatQuestion]) -> Iterable[AnalysedChat]:
    yield AnalysedChat(answered.question.chat, to_analysis(answered), read_of(answered))


def count_analysed(analysed: AnalysedChat) -> AnalysedChat:
    analysis = analysed.analysis
    metrics.count("analysed")
    metrics.result(analysis)
    metrics.count(f"analysed/{analysis.sentiment.name.lower()}")
    metrics.count(f"summaries/{analysis.summary_source}")
    for repair in analysis.repairs:
        metrics.count(f"repaired/{repair}")
    return analysed


def read_of(answered: Answered[ChatQuestion]) -> Read | None:
    """Returns what the heads read and chose for an answer, or None if the model has no heads."""
    question, answer = answered
    return Read(question.sentences, answer.chosen) if answer.chosen is not None else None


def to_analysis(answered: Answered[ChatQuestion]) -> Analysis:
    """Turns an answer into an `Analysis`.

    If the model wrote no summary, or one about something else, the summary is composed of sentences
    of the chat.

    Raises:
      BadAnswerError: see `prompts.answers.parse_analysis`; adds the model's finish reason.
    """
    question, answer = answered
    settings, chat, user_id = question.settings, question.chat, question.user_id
    language = question.language
    proven = settings.get("proven_languages")
    unproven = bool(language) and proven is not None and language not in proven
    made: dict[str, Any] = {}
    repairs = answer.repairs
    if answer.chosen is not None:
        tone, sure = tone_of(answer.chosen, settings)
        made = {"sentiment": tone, "confidence": sure, "fields": fields_of(answer.chosen)}
    else:
        try:
            of_summary = any(part.field != "sentiment" for part in question.request.parts)
            parsed = reader(settings, of_summary)(answer.text)
        except BadAnswerError as error:
            raise error.explained(answer.circumstances) from None
        repairs += parsed.repairs
        made = {
            "sentiment": parsed.sentiment,
            "confidence": confidence(answered, parsed.sentiment),
        }
        if parsed.summary and is_beside_the_point(parsed.summary, question):
            repairs += ("composed",)
        elif parsed.summary:
            made["summary"] = parsed.summary
    if "summary" not in made:
        made |= summary_of(question, read_of(answered), not unproven)
    return Analysis.model_validate(
        {
            "analysis_id": question.id_of(answer.model),
            "chat_id": chat.chat_id,
            "user_id": user_id,
            "revision": chat.revision,
            "language": language or None,
            "unproven_language": unproven or None,
            "tone_scores": scores_of(answer) or None,
            "dropped_messages": question.dropped_messages,
            "cut_messages": question.cut_messages,
            "redacted": chat.redacted,
            "repairs": repairs,
            "model": answer.model,
            "prompt_version": question.prompt_version,
            "analysed_at": now(),
            **made,
        }
    )


def scores_of(answer: Answer) -> dict[str, float]:
    """Returns the finite scores of the tones; JSON cannot hold the others."""
    return {tone: score for tone, score in answer.tone_scores if math.isfinite(score)}


def tone_of(chosen: Chosen, settings: Mapping[str, Any]) -> tuple[Sentiment, float]:
    """Returns the most likely tone and its probability."""
    tones = tones_of(settings)
    name, sure = max(chosen.chat["tone"].items(), key=lambda pair: pair[1])
    return tones[name], sure


LEAST_GRIEVANCE = 0.5
"""The least probability for a grievance to apply."""


def fields_of(chosen: Chosen) -> dict[str, FieldValue]:
    """Returns what was chosen for the chat in addition to the tone."""
    found: dict[str, FieldValue] = {}
    for name, values in chosen.chat.items():
        likeliest, sure = max(values.items(), key=lambda pair: pair[1])
        if name in chosen.sets:
            apply = {value: p for value, p in values.items() if p >= LEAST_GRIEVANCE}
            some = tuple(sorted(apply, key=lambda value: -apply[value]))
            found[name] = FieldValue(value=some, confidence=sure if some else round(1 - sure, 4))
        elif name != "tone":
            found[name] = FieldValue(value=likeliest, confidence=sure)
    return found


def is_beside_the_point(summary: str, question: ChatQuestion) -> bool:
    """Returns whether a summary adds things to its chat, or repeats itself or its prompt."""
    needed = question.settings["summary_grounding"]
    chat, user_id = question.chat, question.user_id
    return (
        bool(needed and grounding(summary, chat, user_id) < needed)
        or repeats_itself(summary)
        or bool(summary_faults(summary, chat, user_id))
        or any(copies_template(summary, part.prompt, chat) for part in question.request.parts)
    )


def summary_of(question: ChatQuestion, read: Read | None, proven: bool) -> dict[str, Any]:
    """Returns a summary composed of quotations, as fields of an analysis.

    It begins with a sentence about the state of the chat only if the model was measured in the
    chat's language.
    """
    chat, settings = question.chat, question.settings
    opening = ""
    if read is not None and proven and "resolved" in read.chosen.chat:
        state, sure = max(read.chosen.chat["resolved"].items(), key=lambda pair: pair[1])
        if sure >= settings.get("opening_confidence", 2.0):
            opening = question.openings["resolved" if state == "yes" else "unresolved"]
    read = read or plainly_read(chat, question.user_id)
    parts = np.array(read.chosen.parts["part"], np.float32).reshape(-1, 4)
    limit = settings["summary_characters"]
    text, quoted = composed(read.sentences, parts, limit, opening, question.speakers)
    return {
        "summary": text,
        "summary_source": "quotations",
        "quotations": quotations(chat, read.sentences, [at for q in quoted for at in q.sentences]),
    }


def quotations(
    chat: Chat, sentences: Sequence[Sentence], quoted: Iterable[int]
) -> tuple[Quotation, ...]:
    """Returns quoted sentences in the form that a record has them."""
    return tuple(
        Quotation(
            message=sentences[at].message,
            text=sentences[at].text,
            message_id=chat.messages[sentences[at].message].message_id,
        )
        for at in quoted
    )


def confidence(answered: Answered[ChatQuestion], sentiment: Sentiment) -> float | None:
    """Returns the probability of a sentiment among all three; None if the model has no scores."""
    scores = dict(answered.answer.tone_scores)
    for part in answered.question.request.parts:
        if scores and part.choices:
            words = [choice.strip() for choice in part.choices]
            logits = [
                (scores[word] - bias) / part.temperature
                for word, bias in zip(words, part.bias, strict=True)
            ]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            return round(weights[part.values.index(sentiment)] / sum(weights), 4)
    return None
