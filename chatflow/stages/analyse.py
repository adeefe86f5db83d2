"""AnalyseChats: finds how each customer feels, and summarises the chat."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsIter

from chatflow import metrics
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadAnswerError
from chatflow.models.spec import Model
from chatflow.prompts.answers import copies_template, extract, grounding, repeats_itself
from chatflow.prompts.questions import AnalysisPrompt, ChatQuestion, reader
from chatflow.prompts.routes import Routed
from chatflow.prompts.updates import Updates, newest
from chatflow.records import AnalysedChat, Analysis, Chat, Sentiment, now
from chatflow.stages.ask import Answered, AskModel


class Analysed(NamedTuple):
    analysed: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(Chat)
@dataclasses.dataclass
class AnalyseChats(beam.PTransform):
    """Turns chats into analyses: renders the prompt, asks the model, parses the answer.

    Attributes:
      prompt: asks for tone and summary; the same for all chats, or chosen for each chat.
      updates: prompts that change while the pipeline runs; see `prompts.updates.WatchUpdates`.

    Outputs:
      `analysed`: one `AnalysedChat` per user whose tone was asked for.
      `dead_letters`: one letter, with the reason, per user who has none.
    """

    model: Model
    prompt: AnalysisPrompt | Routed[AnalysisPrompt]
    updates: AsIter | None = None

    def expand(self, chats: beam.PCollection[Chat]) -> Analysed:
        ask = functools.partial(ask_for_analysis, self.prompt)
        users = chats | "EachUser" >> beam.FlatMap(each_user)
        asked = users | "RenderPrompt" >> DeadLettered("prompt", ask, ChatQuestion, self.updates)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "model")
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("answer", analysed, AnalysedChat)
        failed = (asked.dead_letters, answered.dead_letters, parsed.dead_letters)
        return Analysed(parsed.ok, failed | beam.Flatten())


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
    analysis = to_analysis(answered)
    metrics.count("analysed")
    metrics.count(f"analysed/{analysis.sentiment.name.lower()}")
    metrics.count(f"summaries/{analysis.summary_source}")
    for repair in analysis.repairs:
        metrics.count(f"repaired/{repair}")
    yield AnalysedChat(answered.question.chat, analysis)


def to_analysis(answered: Answered[ChatQuestion]) -> Analysis:
    """Parses the answer; replaces a summary that is not about this chat.

    Raises:
      BadAnswerError: see `prompts.answers.parse_analysis`; adds the model's finish reason.
    """
    question, answer = answered
    settings, chat = question.settings, question.chat
    try:
        parsed = reader(settings)(answer.text)
    except BadAnswerError as error:
        raise error.explained(answer.circumstances) from None
    summary, source = parsed.summary, "model"
    needed = settings["summary_grounding"]
    if (
        (needed and grounding(summary, chat, question.user_id) < needed)
        or repeats_itself(summary)
        or any(copies_template(summary, part.prompt, chat) for part in question.request.parts)
    ):
        summary, source = extract(chat, question.user_id, settings["summary_characters"]), "extract"
    return Analysis.model_validate(
        {
            "analysis_id": question.id_of(answer.model),
            "chat_id": chat.chat_id,
            "user_id": question.user_id,
            "revision": chat.revision,
            "sentiment": parsed.sentiment,
            "summary": summary,
            "summary_source": source,
            "tone_scores": dict(answer.tone_scores) or None,
            "confidence": confidence(answered, parsed.sentiment),
            "dropped_messages": question.dropped_messages,
            "cut_messages": question.cut_messages,
            "repairs": (*answer.repairs, *parsed.repairs),
            "model": answer.model,
            "prompt_version": question.prompt_version,
            "analysed_at": now(),
        }
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
