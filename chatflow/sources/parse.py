"""ParseArrivals: parses lines into chats and single events."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import apache_beam as beam

from chatflow import metrics
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadInputError
from chatflow.records import Arrival, Chat, Event, load_object, validate
from chatflow.sources.chats import USUAL, Customs, as_id, message_fields, read_chat, time
from chatflow.sources.formats.objects import as_ours

_FIELDS = frozenset(("chat_id", "user_id", "message_id", "role", "sent_at", "event"))


_CLOCKS_DIFFER = timedelta(seconds=1)


class Parsed(NamedTuple):
    chats: beam.PCollection
    events: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(Arrival)
@dataclasses.dataclass
class ParseArrivals(beam.PTransform):
    """Parses arrivals into whole chats (with the field `messages`) and events of chats.

    Attributes:
      max_line_bytes: a longer line becomes a dead letter (`line_too_long`).
      retention: how long before its publication an event can have happened; see `event_time`.
      customs: the roles and placeholders of the system that the chats come from.
    """

    max_line_bytes: int
    retention: timedelta = timedelta(hours=24)
    customs: Customs = USUAL

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
        counts: Counter[str] = Counter()
        try:
            found = parse_arrival(arrival, self.retention, self.customs, counts)
        except BadInputError as error:
            if arrival.source:
                raise BadInputError(error.reason, f"{error} ({arrival.source})") from None
            raise
        kept = []
        for read in found:
            if isinstance(read, Chat):
                counts["chats_read"] += 1
            elif read.message is None:
                counts["closes_read"] += 1
            elif read.message.text.strip() or read.message.original:
                counts["messages_read"] += 1
            else:
                counts["empty_events"] += 1
                continue
            kept.append(read)
        for name, count in counts.items():
            metrics.count(name, count)
        yield from kept


def _is_event(read: Chat | Event, _: int) -> int:
    return int(isinstance(read, Event))


def parse_arrival(
    arrival: Arrival,
    retention: timedelta,
    customs: Customs = USUAL,
    counts: Counter[str] | None = None,
) -> list[Chat | Event]:
    """Returns a chat or an event, or all chats and events in an object of another system.

    Attributes of the arrival fill in fields that the line does not have. `counts` counts what was
    converted or left out, by name.

    Raises `BadInputError`: `unknown_event`, or as `load_object`, `validate` or `read_chat`.
    """
    counts = Counter() if counts is None else counts
    value = load_object(arrival.read())
    found = as_ours(value, arrival.name, customs.format)
    values = [value] if found is None else found.values
    if found is not None:
        counts[f"formats/{found.format}"] += len(values)
        counts["input/events_left_out"] += not values
        if len(values) == 1 and "chat_id" in arrival.attributes:  # more reliable than the content
            values = [{**values[0], "chat_id": arrival.attributes["chat_id"]}]
    given = (_with_attributes(one, arrival.attributes) for one in values)
    return [_parse(one, arrival, retention, customs, counts) for one in given]


def _parse(
    value: dict[str, Any],
    arrival: Arrival,
    retention: timedelta,
    customs: Customs,
    counts: Counter[str],
) -> Chat | Event:
    if value.get("messages") is not None:
        return read_chat(value, customs, counts)
    kind = value.get("event")
    if kind not in (None, "", "message", "closed"):
        raise BadInputError(
            "unknown_event", f"event {str(kind)[:80]!r} is not known; known are message and closed"
        )
    if isinstance(value.get("row"), dict) and value.get("chat_id") is None:
        raise BadInputError("bad_row", str(value.get("error") or "the chat's id is missing"))
    fields: dict[str, Any] = {"chat_id": as_id(value.get("chat_id"))}
    at = event_time(time(value.get("sent_at"), counts), arrival, retention)
    if kind == "closed":
        return validate(Event, {**fields, "at": at})
    if "text" not in value and "user_id" not in value and "role" not in value:
        raise BadInputError("wrong_shape", "there is neither text nor messages nor an event")
    message = message_fields({**value, "sent_at": None}, customs, counts)
    message["message_id"] = message.get("message_id") or arrival.message_id
    return validate(Event, {**fields, "at": at, "message": {**message, "sent_at": at}})


def _with_attributes(value: dict[str, Any], attributes: Mapping[str, str]) -> dict[str, Any]:
    if not attributes:
        return value
    fields = {k: v for k, v in attributes.items() if k in _FIELDS}
    own = value.get("attributes") or {}
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
