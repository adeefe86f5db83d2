"""ReadArrivals: reads lines of JSON from files or Pub/Sub."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp.pubsub import PubsubMessage, ReadFromPubSub

from chatflow.coders import register
from chatflow.errors import UsageError
from chatflow.options import MAX_LINE_BYTES
from chatflow.records import Arrival, Range
from chatflow.sources.chats import USUAL, Customs
from chatflow.sources.formats.common import COMPRESSED
from chatflow.sources.formats.convokit import without_beside
from chatflow.sources.lines import fault_of, ranges_of, read_lines, root_of
from chatflow.sources.puller import open_puller

register(Arrival, Range)

PUBSUB_INPUT = re.compile(r"(?:pubsub://)?(projects/[^/]+/(?:subscriptions|topics)/[^/]+)")


@dataclasses.dataclass
class ReadArrivals(beam.PTransform):
    """Reads chats and events as they arrive, from files or from Pub/Sub.

    Attributes:
      inputs: globs and folders of files (local or `gs://`), or Pub/Sub subscriptions and topics;
        see `split_inputs`.
      max_line_bytes: a longer line of a file becomes an `Arrival` with a fault.
      customs: the format of the files, and the columns of tables.
      id_label: attribute whose value identifies repeated Pub/Sub messages; the runner drops them
        if it can (Dataflow does).
    """

    inputs: Sequence[str]
    id_label: str = ""
    max_line_bytes: int = MAX_LINE_BYTES
    customs: Customs = USUAL

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Arrival]:
        read: list[beam.PCollection] = []
        reader: beam.PTransform
        root = root_of(self.inputs)
        for number, source in enumerate(self.inputs):
            if pubsub := PUBSUB_INPUT.fullmatch(source):
                name, reader = "ReadMessages", ReadMessages(pubsub[1], self.id_label or None)
            else:
                name, reader = (
                    "ReadLines",
                    ReadLines(source, self.max_line_bytes, customs=self.customs, root=root),
                )
            read.append(begin | f"{name}{number or ''}" >> reader)
        return read | "Flatten" >> beam.Flatten()


@dataclasses.dataclass
class ReadLines(beam.PTransform):
    """Reads the lines of files that are not blank; reads each file as far as possible.

    Attributes:
      plain: whether the lines are texts, not JSON.
      customs: see `ReadArrivals`.
      root: the folder of all inputs, if there are others; see `root_of`.
    """

    pattern: str
    max_line_bytes: int = MAX_LINE_BYTES
    plain: bool = False
    customs: Customs = USUAL
    root: str | None = None

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Arrival]:
        read = functools.partial(
            read_lines,
            most=self.max_line_bytes,
            plain=self.plain,
            customs=self.customs,
            root=root_of([self.pattern]) if self.root is None else self.root,
        )
        return (
            begin
            | "Pattern" >> beam.Create([self.pattern])
            | "Files" >> beam.FlatMap(parts_of, customs=self.customs).with_output_types(Range)
            | "Distribute" >> beam.Reshuffle()
            | "ReadLines" >> beam.FlatMap(read).with_output_types(Arrival)
        )


def parts_of(pattern: str, customs: Customs = USUAL) -> Iterator[Range]:
    """Yields the parts in which to read the files of a pattern."""
    for found in _matches(pattern):
        yield from ranges_of(found.path, found.size_in_bytes, customs)


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
    # The time is part of the id because the emulator repeats its ids after a restart.
    own_id = f"{message.message_id}-{published:%Y%m%dT%H%M%S.%f}" if message.message_id else None
    return Arrival(message.data or b"", attributes, own_id, published)


def split_inputs(inputs: str) -> tuple[str, ...]:
    """Splits `--input` at commas; raises `UsageError` for a wrong path or files with Pub/Sub."""
    sources = tuple(filter(None, (source.strip() for source in inputs.split(","))))
    pubsub = [bool(PUBSUB_INPUT.fullmatch(source)) for source in sources]
    for source, known in zip(sources, pubsub, strict=True):
        if not known and re.match(r"pubsub:|projects/[^/]+/(subscriptions|topics)\b", source):
            raise UsageError(
                f"--input: {source!r} is not a Pub/Sub path; write "
                "projects/PROJECT/subscriptions/NAME or projects/PROJECT/topics/NAME"
            )
    if any(pubsub) and not all(pubsub):
        raise UsageError(
            f"--input: {inputs!r} has both files and Pub/Sub; use a separate run for each"
        )
    return sources


def is_stream(inputs: str) -> bool:
    """Returns whether `--input` never ends, because it is Pub/Sub."""
    return any(map(PUBSUB_INPUT.fullmatch, split_inputs(inputs)))


def _is_folder(pattern: str) -> bool:
    return pattern.endswith("/") or ("://" not in pattern and os.path.isdir(pattern))


_IN_FOLDERS = re.compile(
    rf"(?!\.|manifest\.json)[^/]*\.(?:(?:jsonl|ndjson|json|csv|tsv){COMPRESSED}|parquet|zip)"
)


def _matches(pattern: str) -> list[Any]:
    """Returns the metadata of the files of a pattern, or of a folder's files with known endings.

    It leaves out files that only describe others and are read with them; see `formats.convokit`.
    """
    folder = pattern.rstrip("/") or "/"
    among = FileSystems.join(folder, "*") if _is_folder(pattern) else pattern
    found = FileSystems.match([among])[0].metadata_list
    if _is_folder(pattern):
        found = [file for file in found if _IN_FOLDERS.fullmatch(FileSystems.split(file.path)[1])]
    kept = {*without_beside([file.path for file in found])}
    return [file for file in found if file.path in kept]


def check_input(inputs: str, customs: Customs = USUAL) -> list[str]:
    """Returns the files of `--input`; none for Pub/Sub.

    Raises `UsageError` as `files_of` does, and if none of the files can be read.
    """
    sources = [] if is_stream(inputs) else split_inputs(inputs)
    paths = [path for pattern in sources for path in files_of(pattern, "--input")]
    first = None
    for path in paths:
        if (fault := fault_of(path, customs)) is None:
            return paths
        first = first or fault
    if first is not None:
        others = f"; none of the {len(paths)} files can be read" if len(paths) > 1 else ""
        raise UsageError(f"--input: {first.message}{others}")
    return paths


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
        matches = _matches(pattern)
    except Exception as error:  # each filesystem raises its own errors
        raise UsageError(f"{flag}: {pattern!r} cannot be listed: {error}") from None
    if not matches:
        hint = (
            " (looked for .jsonl, .json, .csv, .tsv, .parquet and .zip in the folder)"
            if _is_folder(pattern)
            else ""
        )
        raise UsageError(f"{flag}: no file matches {pattern!r}{hint}")
    return [match.path for match in matches]
