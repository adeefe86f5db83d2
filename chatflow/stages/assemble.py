"""AssembleChats: joins single messages into the chats that they belong to; see `revisions`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.utils.timestamp import Timestamp

from chatflow import metrics
from chatflow.dead_letters import DeadLettered, Outcome
from chatflow.errors import BadInputError
from chatflow.options import Rules
from chatflow.records import EPOCH, Chat, Event, check_chat
from chatflow.stages.revisions import NEW, Conversation, Kept, advance, micros


@beam.typehints.with_input_types(Event)
@dataclasses.dataclass
class AssembleChats(beam.PTransform):
    """Turns events into chats: each chat in revisions, later ones with the whole history.

    A chat gets a revision when it was quiet, when it was closed, after each `every_messages`, and
    when a message comes late. The revision's number is the time of its newest message (milliseconds
    since 1970) plus the number of its messages. So the same messages have the same number, and one
    more message has a greater one, even if it is late or the chat had expired.

    Outputs:
      `ok`: one `Chat` per revision.
      `dead_letters`: `no_customer` (no customer wrote), `unknown_chat` (an end without messages).
    """

    rules: Rules

    def expand(self, events: beam.PCollection[Event]) -> Outcome:
        revisions = (
            events
            | "ByChat" >> beam.Map(by_chat).with_output_types(tuple[str, Event])
            | "Assemble" >> beam.ParDo(_AssembleDoFn(self.rules))
        )
        outcome: Outcome = revisions | "CheckChat" >> DeadLettered("assemble", check, Chat)
        return outcome


def by_chat(event: Event) -> tuple[str, Event]:
    return event.chat_id, event


def check(revision: Chat | Event) -> Iterable[Chat]:
    """Yields a revision; raises `BadInputError`: `unknown_chat`, or as `records.check_chat`."""
    if isinstance(revision, Event):
        raise BadInputError(
            "unknown_chat", f"chat {revision.chat_id} was closed, but no message of it is known"
        )
    chat = check_chat(revision)
    metrics.count("chats_assembled")
    yield chat


@dataclasses.dataclass(frozen=True)
class _Progress:
    """The small part of a chat's state, which is read and written with each event.

    Attributes:
      arrived: events so far; `added` of them came after the last call of `advance`.
      pending: messages that no revision holds yet; may count repeated ones.
      newest: event time of the newest event; `wake` is the time to which the timer is set.
    """

    arrived: int = 0
    added: int = 0
    pending: int = 0
    newest: int = 0
    wake: int | None = None
    conversation: Conversation = NEW

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def decode(cls, raw: bytes | None) -> _Progress:
        if raw is None:
            return cls()
        fields = json.loads(raw)
        known = fields.pop("conversation")
        known["dropped_until"] = tuple(known["dropped_until"])
        return cls(**fields, conversation=Conversation(**known))


class _AssembleDoFn(beam.DoFn):
    """Keeps a chat's events, and calls `advance` when a decision may be due.

    An event is stored without reading the others, so that it costs no more in a long chat.
    """

    EVENTS = BagStateSpec("events", BytesCoder())
    PROGRESS = ReadModifyWriteStateSpec("progress", BytesCoder())
    WAKE = TimerSpec("wake", beam.TimeDomain.WATERMARK)
    FORGET = TimerSpec("forget", beam.TimeDomain.WATERMARK)

    def __init__(self, rules: Rules):
        self.rules = rules

    def process(
        self,
        keyed: tuple[str, Event],
        events: Any = beam.DoFn.StateParam(EVENTS),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        wake: Any = beam.DoFn.TimerParam(WAKE),
        forget: Any = beam.DoFn.TimerParam(FORGET),
    ) -> None:
        rules, (_, event) = self.rules, keyed
        before = _Progress.decode(progress.read())
        at = micros(event.at - EPOCH) if event.at else before.newest
        events.add(Kept(at, before.arrived, event.message).encode())
        after = dataclasses.replace(
            before,
            arrived=before.arrived + 1,
            added=before.added + 1,
            pending=before.pending + (event.message is not None),
            newest=max(before.newest, at),
        )
        enough = rules.every_messages and after.pending >= rules.every_messages
        due = at
        if event.message and not enough and after.added < rules.max_messages:
            due = at + micros(rules.quiet)
        if before.wake is None or due < before.wake:
            wake.set(Timestamp(micros=due))
            after = dataclasses.replace(after, wake=due)
        if not before.arrived or after.newest > before.newest:
            forget.set(Timestamp(micros=after.newest + micros(rules.retention)))
        progress.write(after.encode())

    @on_timer(WAKE)
    @on_timer(FORGET)
    def decide(
        self,
        chat_id: Any = beam.DoFn.KeyParam,
        at: Any = beam.DoFn.TimestampParam,
        events: Any = beam.DoFn.StateParam(EVENTS),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[Chat | Event]:
        before = _Progress.decode(progress.read())
        kept = [Kept.decode(raw) for raw in events.read()]
        done = advance(chat_id, before.conversation, kept, at.micros, self.rules)
        yield from done.revisions
        events.clear()
        if not done.events:
            progress.clear()
            wake.clear()
            return
        for event in done.events:
            events.add(event.encode())
        if done.wake is not None:
            wake.set(Timestamp(micros=done.wake))
        else:
            wake.clear()
        progress.write(
            dataclasses.replace(
                before,
                added=0,
                pending=done.pending,
                wake=done.wake,
                conversation=done.conversation,
            ).encode()
        )
