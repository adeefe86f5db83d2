"""AnalyseChats: how each customer feels, and what the chat is about."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsIter

from chatflow import metrics
from chatflow.answers import copies_template, repeats_itself, shorten
from chatflow.asking import Answered, AskModel
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadAnswerError
from chatflow.models import Model
from chatflow.prompts import AnalysisPrompt, Question, reader
from chatflow.records import AnalysedChat, Analysis, Chat, Sentiment, now
from chatflow.routes import Routed
from chatflow.updates import Updates, newest


class Analysed(NamedTuple):
    analysed: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(Chat)
@dataclasses.dataclass
class AnalyseChats(beam.PTransform):
    """Chats to analyses: render the prompt, ask the model, parse the answer.

    Attributes:
      model: who answers; see `chatflow.models`.
      prompt: the template that asks for tone and summary, the same or another for each chat.
      updates: of prompts, while the pipeline runs; see `updates.WatchUpdates`.

    Outputs:
      `analysed`: an `AnalysedChat` for each user whose tone was asked for.
      `dead_letters`: a letter for each user who has none, with the reason.
    """

    model: Model
    prompt: AnalysisPrompt | Routed[AnalysisPrompt]
    updates: AsIter | None = None

    def expand(self, chats: beam.PCollection[Chat]) -> Analysed:
        ask = functools.partial(ask_for_analysis, self.prompt)
        users = chats | "EachUser" >> beam.FlatMap(each_user)
        asked = users | "RenderPrompt" >> DeadLettered("prompt", ask, Question, self.updates)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "model")
        parsed = answered.ok | "ParseAnswer" >> DeadLettered("answer", analysed, AnalysedChat)
        failed = (asked.dead_letters, answered.dead_letters, parsed.dead_letters)
        return Analysed(parsed.ok, failed | beam.Flatten())


def each_user(chat: Chat) -> Iterable[tuple[Chat, str]]:
    """One analysis is asked for per (chat, user)."""
    for user_id in chat.users():
        metrics.count("asked")
        yield chat.model_copy(update={"user_id": user_id}), user_id


def ask_for_analysis(
    prompt: AnalysisPrompt | Routed[AnalysisPrompt],
    asked_for: tuple[Chat, str],
    updates: Iterable[Updates] = (),
) -> Iterable[Question]:
    chat, user_id = asked_for
    question = newest(updates, "analysis", prompt).of(chat).question(chat, user_id)
    metrics.count("dropped_messages", question.dropped_messages)
    metrics.count("cut_messages", question.cut_messages)
    yield question


def analysed(answered: Answered) -> Iterable[AnalysedChat]:
    analysis = to_analysis(answered)
    metrics.count("analysed")
    metrics.count(f"analysed/{analysis.sentiment.name.lower()}")
    metrics.count(f"summaries/{analysis.summary_source}")
    for repair in analysis.repairs:
        metrics.count(f"repaired/{repair}")
    yield AnalysedChat(answered.question.chat, analysis)


def to_analysis(answered: Answered) -> Analysis:
    """Parses the answer and checks that its summary is about this chat.

    Raises:
      BadAnswerError: see `answers.parse_analysis`; with the model's finish reason.
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


def confidence(answered: Answered, sentiment: Sentiment) -> float | None:
    """The probability of a sentiment among all three, as a model that scores them has it."""
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


_CONTENT_WORD = re.compile(r"\d+|[^\W\d_]{3,}")
_EMPTY_WORDS = frozenset(
    "about after again ago all also and any are because been before being but can could customer "
    "did does doing done down each even every find for from get given give going got had has have "
    "having her here him his how into its just know let like look made make making may more most "
    "much need needs not now off one only other our out over own per please said same saw say "
    "says see she should some such sure take than thank thanks that the their them then there "
    "these they thing things this those through time too two under until use user very want "
    "wanted wants was way well were what when where which while who will with would yet you your "
    "agent company service support".split()
)


def content_words(text: str) -> list[str]:
    """Numbers, and the words that carry meaning, lower-cased, by their first five letters.

    Five letters, so that "refunded" in a summary is found in a chat about a "refund".
    """
    words = _CONTENT_WORD.findall(text.lower())
    return [word[:5] for word in words if word not in _EMPTY_WORDS]


def grounding(
    text: str, chat: Chat, user_id: str, least: int = 2, ignored: Collection[str] = ()
) -> float:
    """The share of a text's content words that the user wrote, too.

    0 where it has too few of them, and so says nothing. Names of the chat's users do not
    count.

    Args:
      least: how many different content words a text must have.
      ignored: content words that do not count, either.
    """
    known = set(content_words(" ".join(chat.texts_of(user_id))))
    words = [word for word in content_words(without_users(text, chat)) if word not in ignored]
    return sum(word in known for word in words) / len(words) if len(set(words)) >= least else 0.0


def without_users(text: str, chat: Chat) -> str:
    """A text without the names of a chat's users."""
    for name in {m.user_id for m in chat.messages}:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text)
    return text


_NO_WORD = re.compile(r"\S*[@/\d]\S*")


def extract(chat: Chat, user_id: str, limit: int) -> str:
    """The user's own words: the first message that says something, whole or shortened.

    That is one of at least three content words, for people mostly begin with their
    concern; where there is none, it is the message with the most. Numbers, addresses
    and links do not count.
    """

    def says(text: str) -> int:
        return len(set(content_words(_NO_WORD.sub(" ", text))))

    own = [" ".join(text.split()) for text in chat.texts_of(user_id)]
    telling = next((text for text in own if says(text) >= 3), None) or max(own, key=says)
    return f"“{shorten(telling, limit - 2)}”"
