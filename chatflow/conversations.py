"""AssembleChats: single messages to the chats that they belong to.

What happens to a chat is decided by event time alone: by when its messages were sent,
not by when they arrive. So the messages of a stream and the same messages in a file
give the same chats; only what arrives late, after a decision, makes one more revision.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
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
from chatflow.records import Chat, Event, Message, check_chat


@dataclasses.dataclass(frozen=True)
class Rules:
    """When a chat is analysed, and how much of it is kept.

    Attributes:
      quiet: a chat is analysed when nothing was said in it for so long (event time).
      every_messages: while it goes on, it is analysed each time after so many messages;
        0 for never.
      max_messages: the newest messages that are kept; older ones are dropped.
      retention: a chat is forgotten so long after its last message (event time).
    """

    quiet: timedelta = timedelta(seconds=60)
    every_messages: int = 20
    max_messages: int = 500
    retention: timedelta = timedelta(hours=24)


@beam.typehints.with_input_types(Event)
@dataclasses.dataclass
class AssembleChats(beam.PTransform):
    """Events to chats: each chat in revisions, a later one with the whole history.

    A revision is made when the chat was quiet, when it was closed, and after each
    `every_messages`; also when a message comes late. Its number is the time of its
    newest message (milliseconds since 1970) plus the number of its messages: the same
    messages give the same number, and one more message a greater one, also where it is
    late, or the chat had been forgotten.

    Attributes:
      rules: when a chat is analysed.

    Outputs:
      `ok`: a `Chat` for each revision.
      `dead_letters`: chats in which no customer wrote (`no_customer`), and ends of chats
        of which no message is known (`unknown_chat`).
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
    """A revision that can be analysed.

    Raises:
      BadInputError: `unknown_chat`, or as `records.check_chat`.
    """
    if isinstance(revision, Event):
        raise BadInputError(
            "unknown_chat", f"chat {revision.chat_id} was closed, but no message of it is known"
        )
    chat = check_chat(revision)
    metrics.count("chats_assembled")
    yield chat


class Kept(NamedTuple):
    """An event in the state of a chat.

    Attributes:
      at: event time, in microseconds since 1970.
      number: counts the events of a chat as they arrive; orders those of the same time.
      message: None for the end of the chat.
    """

    at: int
    number: int
    message: Message | None

    def encode(self) -> bytes:
        text = self.message.to_json() if self.message else ""
        return f"{self.at} {self.number} {text}".encode()

    @classmethod
    def decode(cls, raw: bytes) -> Kept:
        at, number, text = raw.split(b" ", 2)
        message = Message.model_validate_json(text) if text else None
        return cls(int(at), int(number), message)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is known of a chat, beside its events.

    Attributes:
      walked: all decisions up to this event time have been made.
      counted: messages up to there, those dropped included.
      analysed: messages in the last revision.
      dropped: the oldest messages, which are kept no more.
      dropped_until: time and number of the newest of these.
    """

    walked: int = -(1 << 62)
    counted: int = 0
    analysed: int = 0
    dropped: int = 0
    dropped_until: tuple[int, int] = (-(1 << 62), 0)


class Advanced(NamedTuple):
    """What follows when event time has passed; see `advance`.

    Attributes:
      revisions: chats to analyse, in order; an `Event` is an end of an unknown chat.
      events: what is still kept, oldest first.
      wake: when the next decision is due, as far as is known.
      pending: messages that no revision holds yet.
    """

    revisions: list[Chat | Event]
    conversation: Conversation
    events: list[Kept]
    wake: int | None
    pending: int


def advance(
    chat_id: str, conversation: Conversation, events: Iterable[Kept], upto: int, rules: Rules
) -> Advanced:
    """Makes all decisions about a chat that are due up to an event time.

    Args:
      events: of the chat, in any order, repeated ones too; also later than `upto`.
      upto: microseconds since 1970; no event before it is missing but late ones.
    """
    quiet, retention = _micros(rules.quiet), _micros(rules.retention)
    upto = max(upto, conversation.walked)
    dropped, dropped_until = conversation.dropped, conversation.dropped_until
    analysed, wake = conversation.analysed, None
    revisions: list[Chat | Event] = []
    timeline = _in_order(events, dropped_until)
    past = [event for event in timeline if event.at <= conversation.walked]
    history = [event for event in past if event.message]
    open_ends = [event for event in past if not event.message]
    joined = dropped + len(history) - conversation.counted

    def pending() -> int:
        return dropped + len(history) - analysed

    def revise() -> None:
        nonlocal analysed
        kept = history[-rules.max_messages :]
        revisions.append(_chat(chat_id, kept, dropped + len(history)))
        analysed = dropped + len(history)

    due = rules.every_messages or 1 << 62
    if history and _askable(history) and (pending() >= due or (open_ends and pending())):
        revise()  # for what came late
    for event in [*timeline[len(past) :], None]:
        now = event.at if event else 1 << 62
        if history:
            last = history[-1].at
            if pending() and last + quiet <= now and _askable(history):
                if last + quiet > upto:
                    wake = last + quiet
                    break
                revise()
            if last + retention <= now:
                if last + retention > upto:
                    break
                if pending():  # no customer ever wrote
                    revise()
                metrics.count("chats_forgotten")
                history, open_ends, dropped, analysed = [], [], 0, 0
                dropped_until = Conversation.dropped_until
        if event is None:
            break
        if event.message:
            history.append(event)
            joined += event.at <= upto
        else:
            open_ends.append(event)
        if pending() >= (due if event.message else 1) and _askable(history):
            if event.at > upto:
                wake = event.at
                break
            revise()

    history = [event for event in history if event.at <= upto]
    later = [event for event in timeline if event.at > upto]
    ends = []
    for end in open_ends:
        if history or dropped or end.at > upto:
            continue  # it is an end of what was there, or still among the later events
        if end.at + quiet <= upto:
            revisions.append(Event(chat_id=chat_id, at=_time(end.at) if end.at else None))
        else:
            ends.append(end)
            wake = min(wake or end.at + quiet, end.at + quiet)
    unanalysed = dropped + len(history) - analysed
    if (surplus := len(history) - rules.max_messages) > 0:
        dropped, dropped_until = dropped + surplus, history[surplus - 1][:2]
        history = history[surplus:]
        metrics.count("forgotten_messages", surplus)
    metrics.count("messages_joined", joined)
    return Advanced(
        revisions,
        Conversation(upto, dropped + len(history), analysed, dropped, dropped_until),
        [*ends, *history, *later],
        wake,
        unanalysed,
    )


def _in_order(events: Iterable[Kept], after: tuple[int, int]) -> list[Kept]:
    """By time, without repeated ones, and without those before the oldest kept."""
    seen: set[str] = set()
    timeline, duplicates, too_late = [], 0, 0
    for event in sorted(events, key=lambda event: event.number):
        message_id = event.message.message_id if event.message else None
        if message_id is not None and message_id in seen:
            duplicates += 1
        elif event.message and event[:2] <= after:
            too_late += 1
        else:
            timeline.append(event)
        if message_id is not None:
            seen.add(message_id)
    metrics.count("duplicate_events", duplicates)
    metrics.count("too_late_events", too_late)
    return sorted(timeline, key=lambda event: (event.at, event.message is None, event.number))


def _askable(history: list[Kept]) -> bool:
    """Whether there is a customer; without any roles, it is the first author."""
    roles = {event.message.role for event in history if event.message}
    return "customer" in roles or roles == {None}


def _chat(chat_id: str, history: list[Kept], messages: int) -> Chat:
    texts = tuple(event.message for event in history if event.message)
    attributes = {name: value for m in texts for name, value in m.attributes.items()}
    revision = max(history[-1].at // 1000, 0) + messages
    return Chat(chat_id=chat_id, messages=texts, attributes=attributes, revision=revision)


def _micros(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _time(micros: int) -> datetime:
    return _EPOCH + timedelta(microseconds=micros)


@dataclasses.dataclass(frozen=True)
class _Progress:
    """The small state of a chat: what is read and written with each event.

    Attributes:
      arrived: events so far.
      added: of these, since the last call of `advance`.
      pending: messages that no revision holds yet; repeated ones may be counted.
      newest: event time of the newest event.
      wake: when the timer is set to.
    """

    arrived: int = 0
    added: int = 0
    pending: int = 0
    newest: int = 0
    wake: int | None = None
    conversation: Conversation = Conversation()

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

    An event is only added to the state, unread, and moves the timer forward where it
    must; so a chat of many messages costs no more for each of them.
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
        at = (event.at - _EPOCH) // timedelta(microseconds=1) if event.at else before.newest
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
            due = at + _micros(rules.quiet)
        if before.wake is None or due < before.wake:
            wake.set(Timestamp(micros=due))
            after = dataclasses.replace(after, wake=due)
        if not before.arrived or after.newest > before.newest:
            forget.set(Timestamp(micros=after.newest + _micros(rules.retention)))
        progress.write(after.encode())

    @on_timer(WAKE)
    def wake(
        self,
        chat_id: Any = beam.DoFn.KeyParam,
        at: Any = beam.DoFn.TimestampParam,
        events: Any = beam.DoFn.StateParam(EVENTS),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[Chat | Event]:
        yield from self._advance(chat_id, at, events, progress, wake)

    @on_timer(FORGET)
    def forget(
        self,
        chat_id: Any = beam.DoFn.KeyParam,
        at: Any = beam.DoFn.TimestampParam,
        events: Any = beam.DoFn.StateParam(EVENTS),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[Chat | Event]:
        yield from self._advance(chat_id, at, events, progress, wake)

    def _advance(
        self, chat_id: str, at: Timestamp, events: Any, progress: Any, wake: Any
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
