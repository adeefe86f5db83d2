"""SkipDone: skips chats whose results are in earlier runs, before a model is asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import apache_beam as beam

from chatflow import metrics
from chatflow.errors import BadInputError
from chatflow.prompts.questions import AnalysisPrompt, DraftPrompt, Prompt
from chatflow.prompts.routes import Routed
from chatflow.records import (
    FAILED,
    AnalysedChat,
    Analysis,
    Chat,
    Draft,
    Identity,
    Record,
    Sentiment,
)


class Skipped(NamedTuple):
    """The users to ask about, and analyses of earlier runs that still need a draft."""

    users: beam.PCollection
    undrafted: beam.PCollection


@dataclasses.dataclass
class SkipDone(beam.PTransform):
    """Splits pairs of a chat and a user by whether their analysis is in earlier results.

    An earlier analysis counts if it was made from the same content with the same prompt and model.
    If the chat has grown or the prompt has changed, the model is asked again. The runner does the
    join, in its own memory.

    Attributes:
      earlier: `Analysis` and `Draft` records.
    """

    earlier: beam.PCollection
    analysis: AnalysisPrompt | Routed[AnalysisPrompt]
    draft: DraftPrompt | Routed[DraftPrompt]

    def expand(self, users: beam.PCollection[tuple[Chat, str]]) -> Skipped:
        keyed = users | "KeyUsers" >> beam.Map(_key_of_user)
        known = self.earlier | "KeyResults" >> beam.Map(_key_of_record)
        divide = functools.partial(divided, self.analysis, self.draft)
        outputs = (
            {"users": keyed, "known": known}
            | "Join" >> beam.CoGroupByKey()
            | "Divide" >> beam.FlatMap(divide).with_outputs(_UNDRAFTED, main="users")
        )
        outputs[_UNDRAFTED].element_type = AnalysedChat
        return Skipped(outputs["users"], outputs[_UNDRAFTED])


_UNDRAFTED = "undrafted"


def _key_of_user(pair: tuple[Chat, str]) -> tuple[tuple[str, str], tuple[Chat, str]]:
    return (pair[0].chat_id, pair[1]), pair


def _key_of_record(record: Record) -> tuple[tuple[str, str], Record]:
    assert isinstance(record, (Analysis, Draft))
    return (record.chat_id, record.user_id), record


def divided(
    analysis_prompt: AnalysisPrompt | Routed[AnalysisPrompt],
    draft_prompt: DraftPrompt | Routed[DraftPrompt],
    joined: tuple[Any, dict[str, Iterable[Any]]],
) -> Iterable[Any]:
    """Yields users to ask about, and users with an analysis but without a draft."""
    found = joined[1]
    known = list(found["known"])
    for chat, user_id in found["users"]:
        made = (record for record in known if isinstance(record, Analysis))
        try:
            analysis = next((one for one in made if _is_of(one, chat, analysis_prompt)), None)
        except BadInputError:  # it no longer has a model; the question will report that
            analysis = None
        if analysis is None:
            yield chat, user_id
            continue
        metrics.count("skipped")
        if analysis.sentiment != Sentiment.ANGRY:
            continue
        drafts = (one for one in known if isinstance(one, Draft) and one.flag != FAILED)
        if not any(_is_of(one, chat, draft_prompt) for one in drafts):
            yield beam.pvalue.TaggedOutput(_UNDRAFTED, AnalysedChat(chat, analysis))


def _is_of(record: Analysis | Draft, chat: Chat, prompt: Prompt | Routed[Any]) -> bool:
    """Returns whether this chat and this prompt would produce the record again."""
    identity = Identity.of(chat, record.user_id, record.prompt_version, record.model)
    own_id = record.analysis_id if isinstance(record, Analysis) else record.draft_id
    versions = {(one.version, one.result_name) for one in prompt.of(chat).every}
    return own_id == identity.digest() and (record.prompt_version, record.model) in versions
