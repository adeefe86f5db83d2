"""When a chat is analysed, and with which messages: the rules, without Beam.

What happens to a chat is decided by event time alone: by when its messages were sent,
not by when they arrive. So the messages of a stream and the same messages in a file
give the same chats; only what arrives late, after a decision, makes one more revision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from chatflow import metrics
from chatflow.options import Rules
from chatflow.records import Chat, Event, Message


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


NEW = Conversation()


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
    timeline = _in_order(events, conversation.dropped_until)
    walk = _Walk(chat_id, conversation, upto, rules)
    walk.begin([event for event in timeline if event.at <= conversation.walked])
    for event in timeline:
        if event.at > conversation.walked and not (walk.silence(event.at) and walk.take(event)):
            break
    else:
        walk.silence(_FOREVER)
    return walk.end([event for event in timeline if event.at > walk.upto])


_FOREVER = 1 << 62


class _Walk:
    """Goes through a chat's events in order, and decides on the way.

    `silence` and `take` return whether to go on: the first decision that is not due yet
    ends the walk, for by its time more may have arrived. It is when to wake.
    """

    def __init__(self, chat_id: str, conversation: Conversation, upto: int, rules: Rules):
        self.chat_id, self.rules = chat_id, rules
        self.quiet, self.retention = micros(rules.quiet), micros(rules.retention)
        self.upto = max(upto, conversation.walked)
        self.counted, self.analysed = conversation.counted, conversation.analysed
        self.dropped, self.dropped_until = conversation.dropped, conversation.dropped_until
        self.joined = 0
        self.history: list[Kept] = []
        self.ends: list[Kept] = []
        self.revisions: list[Chat | Event] = []
        self.wake: int | None = None

    @property
    def pending(self) -> int:
        return self.dropped + len(self.history) - self.analysed

    @property
    def _surplus(self) -> int:
        return len(self.history) - self.rules.max_messages

    def begin(self, past: list[Kept]) -> None:
        """Takes up what was walked before, and what has come to it late."""
        self.history = [event for event in past if event.message]
        self.ends = [event for event in past if not event.message]
        self.joined = self.dropped + len(self.history) - self.counted
        if self.pending and (self.ends or self._enough()) and _askable(self.history):
            self._revise()

    def silence(self, until: int) -> bool:
        """What a time without messages decides: an analysis, and at last oblivion."""
        if not self.history:
            return True
        last = self.history[-1].at
        if self.pending and last + self.quiet <= until and _askable(self.history):
            if not self._due(last + self.quiet):
                return False
            self._revise()
        if last + self.retention <= until:
            if last + self.retention > self.upto:
                return False  # another timer waits for it
            if self.pending:  # no customer ever wrote
                self._revise()
            metrics.count("chats_forgotten")
            metrics.count("forgotten_messages", max(self._surplus, 0))
            self.history, self.ends, self.dropped, self.analysed = [], [], 0, 0
            self.dropped_until = NEW.dropped_until
        return True

    def take(self, event: Kept) -> bool:
        """A message, which may be enough for an analysis; or an end, which always is."""
        (self.history if event.message else self.ends).append(event)
        if event.message and event.at <= self.upto:
            self.joined += 1
        enough = self._enough() if event.message else self.pending > 0
        if enough and _askable(self.history):
            if not self._due(event.at):
                return False
            self._revise()
        return True

    def end(self, later: list[Kept]) -> Advanced:
        """What is known now, and what is kept of it."""
        self.history = [event for event in self.history if event.at <= self.upto]
        kept_ends = self._unknown_ends()
        pending = self.pending
        if (surplus := self._surplus) > 0:
            self.dropped += surplus
            self.dropped_until = self.history[surplus - 1][:2]
            self.history = self.history[surplus:]
            metrics.count("forgotten_messages", surplus)
        metrics.count("messages_joined", self.joined)
        counted = self.dropped + len(self.history)
        conversation = Conversation(
            self.upto, counted, self.analysed, self.dropped, self.dropped_until
        )
        events = [*kept_ends, *self.history, *later]
        return Advanced(self.revisions, conversation, events, self.wake, pending)

    def _unknown_ends(self) -> list[Kept]:
        """Ends that came before their chat. Those that waited long enough are given up."""
        waiting = []
        for end in self.ends:
            if self.history or self.dropped or end.at > self.upto:
                continue  # it was an end of what is there, or is still to come
            if end.at + self.quiet > self.upto:
                waiting.append(end)
                self.wake = min(self.wake or _FOREVER, end.at + self.quiet)
            else:
                at = _time(end.at) if end.at else None
                self.revisions.append(Event(chat_id=self.chat_id, at=at))
        return waiting

    def _enough(self) -> bool:
        return 0 < self.rules.every_messages <= self.pending

    def _due(self, at: int) -> bool:
        if at > self.upto:
            self.wake = at
        return at <= self.upto

    def _revise(self) -> None:
        newest = self.history[-self.rules.max_messages :]
        self.analysed = self.dropped + len(self.history)
        self.revisions.append(_chat(self.chat_id, newest, self.analysed))


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


def micros(duration: timedelta) -> int:
    """A duration in microseconds."""
    return duration // timedelta(microseconds=1)


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _time(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)
