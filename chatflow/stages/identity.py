"""TellApart: lets each chat of a batch through once, and refuses different chats with one id."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import apache_beam as beam

from chatflow import metrics
from chatflow.dead_letters import DeadLettered, Outcome
from chatflow.errors import BadInputError
from chatflow.records import Chat


@beam.typehints.with_input_types(Chat)
@dataclasses.dataclass
class TellApart(beam.PTransform):
    """Compares the chats of a batch that have the same id and revision.

    The same content passes once. If contents differ, nothing says which is newer, or whether they
    belong to one chat. A sink that keeps one chat per id would lose the others.

    Outputs:
      `ok`: the chats, each once.
      `dead_letters`: `shared_id`, for each chat that has the id and revision of another.
    """

    def expand(self, chats: beam.PCollection[Chat]) -> Outcome:
        compared = (
            chats
            | "ById" >> beam.Map(by_revision).with_output_types(tuple[tuple[str, int], Chat])
            | "Together" >> beam.GroupByKey()
            | "Compare" >> beam.FlatMap(compare).with_output_types(tuple[Chat, int])
        )
        outcome: Outcome = compared | "Check" >> DeadLettered("identity", check, Chat)
        return outcome


def by_revision(chat: Chat) -> tuple[tuple[str, int], Chat]:
    return (chat.chat_id, chat.revision), chat


def compare(
    group: tuple[tuple[str, int], Iterable[Chat]],
) -> Iterable[tuple[Chat, int]]:
    """Yields each chat once, and how many chats have its id and revision."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    different: dict[tuple[str, str], Chat] = {}
    for chat in group[1]:
        key = chat.content(), chat.user_id or ""
        counts[key] += 1
        different.setdefault(key, chat)
    metrics.count("duplicate_chats", counts.total() - len(different))
    contents = len({content for content, _ in different})
    for key in sorted(different):
        yield different[key], contents


def check(compared: tuple[Chat, int]) -> Iterable[Chat]:
    chat, contents = compared
    if contents > 1:
        raise BadInputError(
            "shared_id",
            f"{contents} different chats have the id {chat.chat_id} and the revision "
            f"{chat.revision}; give each its own id, or a revision that says which is newer",
        )
    metrics.count("chats_apart")
    yield chat
