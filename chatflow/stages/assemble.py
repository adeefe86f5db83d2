"""AssembleChats: joins single messages into the chats that they belong to; see `revisions`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

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

_log = logging.getLogger(__name__)


@beam.typehints.with_input_types(Event)
@dataclasses.dataclass
class AssembleChats(beam.PTransform):
    """Turns events into chats. Each chat has revisions; each revision has the whole history.

    A chat gets a revision when it was quiet, when it was closed, after each `every_messages`, and
    when a message comes late. The revision's number is the time of its newest message (milliseconds
    since 1970) plus the number of its messages. So the same messages have the same number, and one
    more message makes it greater, even if the message is late or the chat had expired.

    Outputs:
      `ok`: one `Chat` per revision.
      `dead_letters`: `no_customer` (no customer wrote), `unknown_chat` (a close without messages),
        `cannot_assemble` (an error in chatflow; the chat's other events go on).
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


class Unassembled(NamedTuple):
    """An event, or its JSON, that could not be added to its chat; `error` says why."""

    event: Event | bytes
    error: str


def check(revision: Chat | Event | Unassembled) -> Iterable[Chat]:
    """Yields a revision.

    Raises `BadInputError`: `unknown_chat`, `cannot_assemble`, or as `records.check_chat`.
    """
    if isinstance(revision, Unassembled):
        raise BadInputError("cannot_assemble", revision.error)
    if isinstance(revision, Event):
        raise BadInputError(
            "unknown_chat", f"chat {revision.chat_id} was closed, but none of its messages is known"
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


class _Arrived(NamedTuple):
    """What an event changes in the state of its chat, with the times of new timers, if any."""

    kept: bytes
    progress: bytes
    wake: Timestamp | None
    forget: Timestamp | None


class _Decided(NamedTuple):
    """What a decision changes in the state of a chat; without `kept`, the state is cleared."""

    revisions: list[Chat | Event]
    kept: list[bytes]
    progress: bytes
    wake: Timestamp | None


class _AssembleDoFn(beam.DoFn):
    """Keeps a chat's events, and calls `advance` when a decision may be due.

    An event is stored without reading the others, so that it does not cost more in a long chat. The
    new state is computed before any of it is stored. If that fails, either the state stays as it
    was, or it is cleared and the events become dead letters. Otherwise one event would fail its
    bundle again and again.
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
    ) -> Iterator[Unassembled]:
        _, event = keyed
        known = progress.read()
        try:
            arrived = self.arrive(event, known)
        except Exception as error:  # any error concerns only this event
            metrics.count("unassembled_messages", int(event.message is not None))
            yield Unassembled(event, _said(error))
            return
        events.add(arrived.kept)
        if arrived.wake is not None:
            wake.set(arrived.wake)
        if arrived.forget is not None:
            forget.set(arrived.forget)
        progress.write(arrived.progress)

    def arrive(self, event: Event, known: bytes | None) -> _Arrived:
        rules, before = self.rules, _Progress.decode(known)
        at = micros(event.at - EPOCH) if event.at else before.newest
        kept = Kept(at, before.arrived, event.message).encode()
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
        wake = forget = None
        if before.wake is None or due < before.wake:
            wake = Timestamp(micros=due)
            after = dataclasses.replace(after, wake=due)
        if not before.arrived or after.newest > before.newest:
            forget = Timestamp(micros=after.newest + micros(rules.retention))
        return _Arrived(kept, after.encode(), wake, forget)

    @on_timer(WAKE)
    @on_timer(FORGET)
    def decide(
        self,
        chat_id: Any = beam.DoFn.KeyParam,
        at: Any = beam.DoFn.TimestampParam,
        events: Any = beam.DoFn.StateParam(EVENTS),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[Chat | Event | Unassembled]:
        known, kept = progress.read(), list(events.read())
        try:
            done = self.advance(chat_id, known, kept, at.micros)
        except Exception as error:  # any error concerns only this chat
            yield from _given_up(chat_id, known, kept, error)
            done = _Decided([], [], b"", None)
        yield from done.revisions
        events.clear()
        for event in done.kept:
            events.add(event)
        if done.wake is not None:
            wake.set(done.wake)
        else:
            wake.clear()
        if done.kept:
            progress.write(done.progress)
        else:
            progress.clear()

    def advance(
        self, chat_id: str, known: bytes | None, kept: Iterable[bytes], upto: int
    ) -> _Decided:
        before = _Progress.decode(known)
        done = advance(chat_id, before.conversation, map(Kept.decode, kept), upto, self.rules)
        after = dataclasses.replace(
            before, added=0, pending=done.pending, wake=done.wake, conversation=done.conversation
        )
        wake = None if done.wake is None or not done.events else Timestamp(micros=done.wake)
        return _Decided(
            done.revisions, [event.encode() for event in done.events], after.encode(), wake
        )


def _said(error: Exception) -> str:
    _log.error("an event or a chat is dead-lettered: unexpected error", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _given_up(
    chat_id: str, known: bytes | None, kept: Iterable[bytes], error: Exception
) -> Iterator[Unassembled]:
    """Yields all events of a chat whose state is unusable; counts messages not counted before."""
    said, messages = _said(error), 0
    for raw in kept:
        try:
            at, _, message = Kept.decode(raw)
            time = EPOCH + timedelta(microseconds=at) if message is None and at else None
            yield Unassembled(Event(chat_id=chat_id, message=message, at=time), said)
            messages += message is not None
        except Exception:  # this event may be the cause
            yield Unassembled(raw.split(b" ", 2)[-1], f"{said} (in chat {chat_id})")
            messages += 1
    with contextlib.suppress(Exception):
        conversation = _Progress.decode(known).conversation
        messages += conversation.dropped - conversation.counted
    metrics.count("unassembled_messages", max(messages, 0))
