"""ParseArrivals: parses lines into chats and single events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import apache_beam as beam

from chatflow import metrics
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadInputError
from chatflow.records import Arrival, Chat, Event, Reading, load_object, read_chat, validate

_FIELDS = frozenset(("chat_id", "user_id", "message_id", "role", "sent_at", "event"))


_CLOCKS_DIFFER = timedelta(seconds=1)


class Parsed(NamedTuple):
    chats: beam.PCollection
    events: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(Arrival)
@dataclasses.dataclass
class ParseArrivals(beam.PTransform):
    """Parses arrivals into whole chats, which have the field `messages`, and events of chats.

    Attributes:
      max_line_bytes: a longer line becomes a dead letter (`line_too_long`).
      retention: how long before its publication an event can be; see `event_time`.
    """

    max_line_bytes: int
    retention: timedelta = timedelta(hours=24)

    def expand(self, arrivals: beam.PCollection[Arrival]) -> Parsed:
        parsed = arrivals | "Parse" >> DeadLettered("read", self.parse)
        chats, events = parsed.ok | "ByKind" >> beam.Partition(_is_event, 2)
        chats.element_type, events.element_type = Chat, Event
        return Parsed(chats, events, parsed.dead_letters)

    def parse(self, arrival: Arrival) -> Iterable[Chat | Event]:
        metrics.count("lines_read")
        if len(arrival.line) > self.max_line_bytes:
            raise BadInputError(
                "line_too_long",
                f"the line has {len(arrival.line)} bytes, more than "
                f"--max_line_bytes={self.max_line_bytes}",
            )
        read = parse_arrival(arrival, self.retention)
        if isinstance(read, Reading):
            metrics.count("chats_read")
            metrics.count("empty_messages", read.empty_messages)
            metrics.count("duplicate_messages", read.duplicate_messages)
            yield read.chat
        elif read.message is None:
            metrics.count("closes_read")
            yield read
        elif read.message.text.strip():
            metrics.count("messages_read")
            yield read
        else:
            metrics.count("empty_events")


def _is_event(read: Chat | Event, _: int) -> int:
    return int(isinstance(read, Event))


def parse_arrival(arrival: Arrival, retention: timedelta) -> Reading | Event:
    """Reads a chat or an event; attributes fill in fields that the line does not have.

    Raises `BadInputError`: `unknown_event`, or that of `load_object`, `validate` or `read_chat`.
    """
    value = _with_attributes(load_object(arrival.line), arrival.attributes)
    if "messages" in value:
        return read_chat(value)
    if "event" in value and value["event"] not in ("message", "closed"):
        raise BadInputError(
            "unknown_event", f"event {value['event']!r} is not known; known are message and closed"
        )
    closed = value.get("event") == "closed"
    event = validate(
        Event,
        {
            "chat_id": value.get("chat_id"),
            "message": None if closed else value,
            "at": value.get("sent_at"),
        },
    )
    at = event_time(event.at, arrival, retention)
    message = event.message
    if message is not None:
        message_id = message.message_id or arrival.message_id
        message = message.model_copy(update={"sent_at": at, "message_id": message_id})
    return event.model_copy(update={"at": at, "message": message})


def _with_attributes(value: dict[str, Any], attributes: Mapping[str, str]) -> dict[str, Any]:
    if not attributes:
        return value
    fields = {k: v for k, v in attributes.items() if k in _FIELDS}
    own = value.get("attributes", {})
    if isinstance(own, dict):
        others = {k: v for k, v in attributes.items() if k not in _FIELDS}
        value = {**value, "attributes": {**others, **own}}
    return {**fields, **value}


def event_time(sent_at: datetime | None, arrival: Arrival, retention: timedelta) -> datetime | None:
    """Returns when an event happened: `sent_at`, or its publication if `sent_at` is wrong or unset.

    `sent_at` is wrong if it is more than `retention` before publication, or more than a second
    after it (clocks differ). Files have no time of publication, so `sent_at` is used unchecked.
    """
    published = arrival.published_at
    if published is None:
        return sent_at
    if sent_at is not None and published - retention <= sent_at <= published + _CLOCKS_DIFFER:
        return sent_at
    if sent_at is not None:
        metrics.count("clock_skewed_messages")
    return published
