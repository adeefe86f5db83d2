"""Decides, without Beam, when a chat is analysed, and with which messages.

Decisions depend on event time (when messages were sent), not on the time of arrival. So a stream
and a file with the same messages yield the same chats; only a message that arrives after a decision
adds a revision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

from chatflow import metrics
from chatflow.options import Rules
from chatflow.records import EPOCH, Chat, Event, Message, revision_of


class Kept(NamedTuple):
    """An event in the state of a chat.

    `at` is its event time in microseconds since 1970. `number` is its position in the order of
    arrival, which decides between events of the same time. `message` is None for the close of the
    chat.
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
    """What is known about a chat in addition to its events.

    Attributes:
      walked: all decisions up to this event time have been made.
      counted: messages up to `walked`, including dropped ones.
      analysed: messages in the last revision.
      dropped: the number of oldest messages that were dropped.
      dropped_until: time and number of the newest dropped message.
    """

    walked: int = -(1 << 62)
    counted: int = 0
    analysed: int = 0
    dropped: int = 0
    dropped_until: tuple[int, int] = (-(1 << 62), 0)


NEW = Conversation()


class Advanced(NamedTuple):
    """The result of `advance`; an `Event` in `revisions` is the close of an unknown chat.

    `events` are the ones to keep, oldest first. `wake` is when the next decision is due, if that is
    known. `pending` counts messages that are not in a revision yet.
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
      events: in any order; may be repeated, or later than `upto`.
      upto: microseconds since 1970; events before it are late if they still arrive.
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
    """Goes through a chat's events in order, and makes decisions.

    `silence` and `take` return whether to go on. The walk ends at the first decision that is not
    due yet, because more messages may arrive before then; `wake` is set to that time.
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
        """Loads earlier events and late ones, which may make a revision due."""
        self.history = [event for event in past if event.message]
        self.ends = [event for event in past if not event.message]
        self.joined = self.dropped + len(self.history) - self.counted
        if self.pending and (self.ends or self._enough()) and _askable(self.history):
            self._revise()

    def silence(self, until: int) -> bool:
        """Handles a silent period: makes a revision, and finally expires the chat."""
        if not self.history:
            return True
        last = self.history[-1].at
        if self.pending and last + self.quiet <= until and _askable(self.history):
            if not self._due(last + self.quiet):
                return False
            self._revise()
        if last + self.retention <= until:
            if last + self.retention > self.upto:
                return False  # another timer handles it
            if self.pending:  # no customer ever wrote
                self._revise()
            metrics.count("chats_forgotten")
            metrics.count("forgotten_messages", max(self._surplus, 0))
            self.history, self.ends, self.dropped, self.analysed = [], [], 0, 0
            self.dropped_until = NEW.dropped_until
        return True

    def take(self, event: Kept) -> bool:
        """Adds a message, which may make a revision due, or a close, which always does."""
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
        """Returns the new state; drops the oldest messages beyond `max_messages`."""
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
        """Returns closes that came before their chat; gives up those that waited long enough."""
        waiting = []
        for end in self.ends:
            if self.history or self.dropped or end.at > self.upto:
                continue  # it closed this chat, or its time has not come
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
    """Returns events by time, without repeated ones and those older than a dropped message."""
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
    """Returns whether a customer wrote; if nobody has a role, the first author is the customer."""
    roles = {kept.message.role for kept in history if kept.message and kept.message.is_said}
    return "customer" in roles or roles == {None}


def _chat(chat_id: str, history: list[Kept], messages: int) -> Chat:
    texts = tuple(event.message for event in history if event.message)
    attributes = {name: value for m in texts for name, value in m.attributes.items()}
    revision = revision_of(history[-1].at, messages)
    return Chat(chat_id=chat_id, messages=texts, attributes=attributes, revision=revision)


def micros(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)


def _time(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)
