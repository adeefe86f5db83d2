"""ReadArrivals and ParseArrivals: files or Pub/Sub to chats and to single events."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp.pubsub import PubsubMessage, ReadFromPubSub

from chatflow import metrics
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadInputError, UsageError
from chatflow.pulling import open_puller
from chatflow.records import Arrival, Chat, Event, Reading, load_object, read_chat, validate

PUBSUB_INPUT = re.compile(r"(?:pubsub://)?(projects/[^/]+/(?:subscriptions|topics)/[^/]+)")


@dataclasses.dataclass
class ReadArrivals(beam.PTransform):
    """Chats and events as they arrive, from files or from Pub/Sub.

    Attributes:
      inputs: globs and folders of files (local or `gs://`, compressed ones are known by
        their endings), or Pub/Sub subscriptions and topics; see `split_inputs`.
      id_label: attribute by whose value the runner leaves out repeated Pub/Sub
        messages, where it can (Dataflow does).
    """

    inputs: Sequence[str]
    id_label: str = ""

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Arrival]:
        read: list[beam.PCollection] = []
        reader: beam.PTransform
        for number, source in enumerate(self.inputs):
            if pubsub := PUBSUB_INPUT.fullmatch(source):
                name, reader = "ReadMessages", ReadMessages(pubsub[1], self.id_label or None)
            else:
                name, reader = "ReadLines", ReadLines(source)
            read.append(begin | f"{name}{number or ''}" >> reader)
        return read | "Flatten" >> beam.Flatten()


@dataclasses.dataclass
class ReadLines(beam.PTransform):
    """Lines of files; blank lines are left out."""

    pattern: str

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Arrival]:
        lines = begin | "ReadLines" >> beam.io.ReadFromText(
            input_pattern(self.pattern), coder=BytesCoder(), validate=False
        )
        return (
            lines
            | "DropBlank" >> beam.Filter(bytes.strip).with_output_types(bytes)
            | "ToArrival" >> beam.Map(Arrival).with_output_types(Arrival)
        )


@dataclasses.dataclass
class ReadMessages(beam.PTransform):
    """Messages of a Pub/Sub subscription, or of a topic from now on."""

    path: str
    id_label: str | None = None

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Arrival]:
        kind = "subscription" if "/subscriptions/" in self.path else "topic"
        messages = begin | "ReadFromPubSub" >> ReadFromPubSub(
            **{kind: self.path}, id_label=self.id_label, with_attributes=True
        )
        return messages | "ToArrival" >> beam.Map(to_arrival).with_output_types(Arrival)


def to_arrival(message: PubsubMessage, timestamp: Any = beam.DoFn.TimestampParam) -> Arrival:
    published = message.publish_time or timestamp.to_utc_datetime(has_tz=True)
    attributes = {
        name: value
        for name, value in (message.attributes or {}).items()
        if not name.startswith("googclient_")
    }
    # The time, too: the emulator begins anew with its ids when it is restarted.
    own_id = f"{message.message_id}-{published:%Y%m%dT%H%M%S.%f}" if message.message_id else None
    return Arrival(message.data or b"", attributes, own_id, published)


class Parsed(NamedTuple):
    chats: beam.PCollection
    events: beam.PCollection
    dead_letters: beam.PCollection


@beam.typehints.with_input_types(Arrival)
@dataclasses.dataclass
class ParseArrivals(beam.PTransform):
    """Arrivals to whole chats and to events of chats, told apart by the field `messages`.

    Attributes:
      max_line_bytes: a longer line is a dead letter (`line_too_long`).
      retention: how far before its publication an event can have been; see `event_time`.
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
    """Reads a chat or an event. Attributes stand in for fields that the line lacks.

    Raises:
      BadInputError: see `load_object`, `validate` and `read_chat`; `unknown_event`.
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


_FIELDS = frozenset(("chat_id", "user_id", "message_id", "role", "sent_at", "event"))


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
    """When an event was: `sent_at`, as far as it can be.

    Nothing is sent after it was published (by more than a second, for clocks differ), and
    nothing is published later than `retention` after it was sent: then the clock was
    wrong, and the time of publication stands in, as it does where there is no time. In
    files, which know no time of publication, `sent_at` is taken as it is.
    """
    published = arrival.published_at
    if published is None:
        return sent_at
    if sent_at is not None and published - retention <= sent_at <= published + _CLOCKS_DIFFER:
        return sent_at
    if sent_at is not None:
        metrics.count("clock_skewed_messages")
    return published


_CLOCKS_DIFFER = timedelta(seconds=1)


def split_inputs(inputs: str) -> tuple[str, ...]:
    """The sources of `--input`, which are divided by commas; all of one sort.

    Raises:
      UsageError: files beside Pub/Sub, or a malformed path of Pub/Sub.
    """
    sources = tuple(filter(None, (source.strip() for source in inputs.split(","))))
    pubsub = [bool(PUBSUB_INPUT.fullmatch(source)) for source in sources]
    for source, known in zip(sources, pubsub, strict=True):
        if not known and re.match(r"pubsub:|projects/[^/]+/(subscriptions|topics)\b", source):
            raise UsageError(
                f"--input: {source!r} is no Pub/Sub path; it is "
                "projects/PROJECT/subscriptions/NAME or projects/PROJECT/topics/NAME"
            )
    if any(pubsub) and not all(pubsub):
        raise UsageError(f"--input: {inputs!r} names files beside Pub/Sub; run them apart")
    return sources


def is_stream(inputs: str) -> bool:
    """Whether `--input` never ends."""
    return any(map(PUBSUB_INPUT.fullmatch, split_inputs(inputs)))


def input_pattern(pattern: str) -> str:
    """A folder as the pattern of its `*.jsonl` files; a glob as it is."""
    is_local = "://" not in pattern
    if pattern.endswith("/") or (is_local and os.path.isdir(pattern)):
        return str(FileSystems.join(pattern.rstrip("/") or "/", "*.jsonl*"))
    return pattern


def check_input(inputs: str) -> list[str]:
    """The files that `--input` names; none where it is Pub/Sub.

    Raises:
      UsageError: a source has no files, or they cannot be listed.
    """
    sources = [] if is_stream(inputs) else split_inputs(inputs)
    return [path for pattern in sources for path in files_of(pattern, "--input")]


def check_messages(inputs: str) -> None:
    """Makes sure that Pub/Sub can be read from here.

    Raises:
      UsageError: a subscription or topic does not exist, or is out of reach.
    """
    for path in filter(None, map(PUBSUB_INPUT.fullmatch, split_inputs(inputs))):
        try:
            open_puller(path[1]).close()
        except UsageError as error:
            raise UsageError(f"--input: {error}") from None


def files_of(pattern: str, flag: str) -> list[str]:
    """The files that a glob or a folder names.

    Raises:
      UsageError: there are none, or they cannot be listed; with the flag that names them.
    """
    try:
        matches = FileSystems.match([input_pattern(pattern)])[0].metadata_list
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"{flag}: {pattern!r} cannot be listed: {error}") from None
    if not matches:
        hint = " (looked for *.jsonl in the folder)" if input_pattern(pattern) != pattern else ""
        raise UsageError(f"{flag}: no file matches {pattern!r}{hint}")
    return [match.path for match in matches]
