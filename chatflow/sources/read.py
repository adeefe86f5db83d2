"""ReadArrivals: reads lines of JSON from files or Pub/Sub."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp.pubsub import PubsubMessage, ReadFromPubSub

from chatflow.errors import UsageError
from chatflow.records import Arrival
from chatflow.sources.puller import open_puller

PUBSUB_INPUT = re.compile(r"(?:pubsub://)?(projects/[^/]+/(?:subscriptions|topics)/[^/]+)")


@dataclasses.dataclass
class ReadArrivals(beam.PTransform):
    """Reads chats and events as they arrive, from files or from Pub/Sub.

    Attributes:
      inputs: globs and folders of files (local or `gs://`; their endings show compression), or
        Pub/Sub subscriptions and topics; see `split_inputs`.
      id_label: attribute whose value identifies repeated Pub/Sub messages; the runner leaves them
        out if it can (Dataflow does).
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
    """Reads lines of files; leaves out blank lines."""

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
    """Reads messages of a Pub/Sub subscription, or of a topic from now on."""

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
    # With the time, because the emulator starts its ids again when it restarts.
    own_id = f"{message.message_id}-{published:%Y%m%dT%H%M%S.%f}" if message.message_id else None
    return Arrival(message.data or b"", attributes, own_id, published)


def split_inputs(inputs: str) -> tuple[str, ...]:
    """Splits `--input` at commas; raises `UsageError` for files beside Pub/Sub, or a wrong path."""
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
    """Returns whether `--input` never ends, because it is Pub/Sub."""
    return any(map(PUBSUB_INPUT.fullmatch, split_inputs(inputs)))


def input_pattern(pattern: str) -> str:
    """Returns the pattern of a folder's `*.jsonl` files; returns a glob unchanged."""
    is_local = "://" not in pattern
    if pattern.endswith("/") or (is_local and os.path.isdir(pattern)):
        return str(FileSystems.join(pattern.rstrip("/") or "/", "*.jsonl*"))
    return pattern


def check_input(inputs: str) -> list[str]:
    """Returns the files of `--input`, none for Pub/Sub; raises the errors of `files_of`."""
    sources = [] if is_stream(inputs) else split_inputs(inputs)
    return [path for pattern in sources for path in files_of(pattern, "--input")]


def check_messages(inputs: str) -> None:
    """Raises `UsageError` if a subscription or topic does not exist or cannot be reached."""
    for path in filter(None, map(PUBSUB_INPUT.fullmatch, split_inputs(inputs))):
        try:
            open_puller(path[1]).close()
        except UsageError as error:
            raise UsageError(f"--input: {error}") from None


def files_of(pattern: str, flag: str) -> list[str]:
    """Returns the files of a glob or folder; raises `UsageError` with the flag if it has none."""
    try:
        matches = FileSystems.match([input_pattern(pattern)])[0].metadata_list
    except Exception as error:  # each filesystem raises its own errors
        raise UsageError(f"{flag}: {pattern!r} cannot be listed: {error}") from None
    if not matches:
        hint = " (looked for *.jsonl in the folder)" if input_pattern(pattern) != pattern else ""
        raise UsageError(f"{flag}: no file matches {pattern!r}{hint}")
    return [match.path for match in matches]
