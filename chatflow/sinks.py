"""WriteRecords: records to files and Pub/Sub topics, by URI."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import logging
import re
import time
import uuid
from base64 import b64encode
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow import metrics
from chatflow.errors import UsageError, one_line
from chatflow.records import Analysis, DeadLetter, Draft, Record

KINDS = ("analyses", "drafts", "dead_letters")
"""Each kind of record has its destinations, and files of this name in the output folder."""

PUBSUB_TOPIC = re.compile(r"(?:pubsub://)?(projects/[^/]+/topics/[^/]+)")

_log = logging.getLogger(__name__)


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteRecords(beam.PTransform):
    """Records to each of their destinations.

    Attributes:
      destinations: file prefixes and Pub/Sub topics; see `split_destinations`.
      streaming: the records never end, so files are written as they fill up.
    """

    destinations: Sequence[str]
    streaming: bool = False

    def expand(self, records: beam.PCollection[Record]) -> Any:
        return [
            records | f"Write{number or ''}" >> sink(uri, self.streaming)
            for number, uri in enumerate(self.destinations)
        ]


def sink(uri: str, streaming: bool) -> beam.PTransform:
    """What writes to a destination; a new scheme is a new line here."""
    if topic := PUBSUB_TOPIC.fullmatch(uri):
        return PublishRecords(topic[1])
    return AppendFiles(uri) if streaming else WriteFiles(uri)


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteFiles(beam.PTransform):
    """Records to `PREFIX-00000-of-00001.jsonl`, as many shards as the runner wants."""

    prefix: str

    def expand(self, records: beam.PCollection[Record]) -> Any:
        return (
            records
            | "ToJson" >> beam.Map(Record.to_json).with_output_types(str)
            | "WriteFiles" >> beam.io.WriteToText(self.prefix, file_name_suffix=".jsonl")
        )


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class AppendFiles(beam.PTransform):
    """Records of a stream to `PREFIX-TIME-HASH.jsonl`, a new file every so often.

    The name comes from what is in the file, so that a file that is written again, as
    runners do after a fault, takes the place of the first. A file appears whole.

    Attributes:
      seconds: a file is written so long after its first record,
      records: or when there are so many for it.
    """

    prefix: str
    seconds: float = 30
    records: int = 10_000

    def expand(self, records: beam.PCollection[Record]) -> Any:
        return (
            records
            | "ToLine" >> beam.Map(to_line).with_output_types(tuple[str, str])
            | "Gather"
            >> beam.GroupIntoBatches.WithShardedKey(
                self.records, max_buffering_duration_secs=self.seconds
            )
            | "WriteFile" >> beam.MapTuple(self.write)
        )

    def write(self, _: Any, lines: Sequence[str]) -> str:
        text = "".join(sorted(lines))
        content = text.encode()
        newest = max(_MADE_AT.findall(text), default="")
        moment = re.sub(r"[-:]|\.\d+", "", newest)
        name = f"{self.prefix}-{moment}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
        # Written under another name, so that nobody reads half a file.
        scratch = f"{self.prefix}-{uuid.uuid4().hex}.part"
        with FileSystems.create(scratch) as file:
            file.write(content)
        if FileSystems.exists(name):
            FileSystems.delete([scratch])
        else:
            FileSystems.rename([scratch], [name])
        return name


_MADE_AT = re.compile(r'"(?:analysed|drafted|failed)_at":"([^"\\]+)"')


def to_line(record: Record) -> tuple[str, str]:
    return "", record.to_json() + "\n"


PUBSUB_BYTES = 9_500_000
"""Pub/Sub takes 10 MB with all that belongs to a message."""

PUBLISH_SECONDS = 600.0
"""How long a message is tried to be published before its bundle fails, and the runner goes on."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class PublishRecords(beam.PTransform):
    """Records to a Pub/Sub topic, ordered by chat.

    Delivery is at least once: a bundle that the runner does again is published again. A
    record has the same id then (attribute `id`), by which a reader can leave it out.

    Attributes (of a message): `kind`, `id`, `chat_id`, `user_id`, `revision`,
    `sentiment`, `stage`, `reason`; those that the record has. The ordering key is the
    chat's id.

    Beam's own WriteToPubSub has no ordering keys on Dataflow, and gives up at the first
    error that Google's client does not retry, e.g. a topic that is not there yet.
    """

    topic: str

    def expand(self, records: beam.PCollection[Record]) -> Any:
        return records | "Publish" >> beam.ParDo(_PublishDoFn(self.topic))


class _PublishDoFn(beam.DoFn):
    def __init__(self, topic: str):
        self.topic = topic

    def setup(self) -> None:
        self.publisher = publisher()

    def start_bundle(self) -> None:
        self.waiting: list[tuple[dict[str, Any], Any]] = []

    def process(self, record: Record) -> None:
        message = to_message(record)
        self.waiting.append((message, self.publisher.publish(self.topic, **message)))

    def teardown(self) -> None:
        self.publisher.stop()

    def finish_bundle(self) -> None:
        give_up = time.monotonic() + PUBLISH_SECONDS
        for message, future in self.waiting:
            wait_published(self.publisher, self.topic, message, future, give_up)


def publisher() -> Any:
    import google.cloud.pubsub_v1 as pubsub_v1

    return pubsub_v1.PublisherClient(
        publisher_options=pubsub_v1.types.PublisherOptions(enable_message_ordering=True)
    )


def wait_published(
    publisher: Any, topic: str, message: dict[str, Any], future: Any, give_up: float
) -> None:
    """Waits until a message is published; tries again while the topic cannot be reached.

    Raises:
      Exception: the client's own, when the time (of `time.monotonic`) is over.
    """
    pause = 0.5
    while True:
        try:
            future.result(timeout=max(give_up - time.monotonic(), 1))
            return
        except Exception as error:
            if time.monotonic() + pause > give_up:
                raise
            _log.warning("publishing to %s failed, trying again: %s", topic, error)
            time.sleep(pause)
            pause = min(2 * pause, 30)
            if key := message.get("ordering_key"):
                publisher.resume_publish(topic, key)
            future = publisher.publish(topic, **message)


def to_message(record: Record) -> dict[str, Any]:
    """The data, ordering key and attributes with which a record is published."""
    data = record.to_json().encode()
    if len(data) > PUBSUB_BYTES and isinstance(record, DeadLetter):
        data = _shrunk(record).to_json().encode()
    fields = {
        "kind": type(record).__name__,
        "id": record_id(record),
        **{name: getattr(record, name, None) for name in _ATTRIBUTES},
    }
    attributes = {name: str(value) for name, value in fields.items() if value is not None}
    if isinstance(record, Analysis):
        attributes["sentiment"] = str(int(record.sentiment))
    short = {k: v for k, v in attributes.items() if len(v.encode()) <= _ATTRIBUTE_BYTES}
    return {"data": data, "ordering_key": ordering_key(attributes.get("chat_id", "")), **short}


def ordering_key(chat_id: str) -> str:
    """The chat's id, or a hash of it where Pub/Sub would not take it."""
    return chat_id if len(chat_id.encode()) <= _ATTRIBUTE_BYTES else _digest(chat_id)


_ATTRIBUTES = ("chat_id", "user_id", "revision", "stage", "reason")
_ATTRIBUTE_BYTES = 1024  # Pub/Sub's limit for a value, and for an ordering key


def record_id(record: Record) -> str:
    """The id by which a record is known; of a dead letter, a hash of what failed and where."""
    if isinstance(record, Draft):
        return record.draft_id
    if isinstance(record, Analysis):
        return record.analysis_id
    assert isinstance(record, DeadLetter)
    return _digest(record.stage, record.reason, record.payload, record.answer or "")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _shrunk(letter: DeadLetter) -> DeadLetter:
    """A letter that is too large for Pub/Sub: compressed, or else the start of its payload."""
    packed = b64encode(gzip.compress(letter.payload_bytes())).decode()
    if len(packed) > PUBSUB_BYTES - 100_000:
        metrics.count("cut_dead_letters")
        start = letter.payload[: PUBSUB_BYTES // 8]
        note = f"{letter.error} (its payload of {len(letter.payload)} characters was cut)"
        return letter.model_copy(update={"payload": start, "error": note, "answer": None})
    return letter.model_copy(update={"payload": packed, "payload_encoding": "gzip"})


def split_destinations(kind: str, own: str, output: str) -> tuple[str, ...]:
    """Where a kind of record goes: what its own flag says, else the folder `--output`.

    Args:
      own: file prefixes and topics, divided by commas.

    Raises:
      UsageError: there is none, or one of a scheme that is not known.
    """
    destinations = tuple(filter(None, (uri.strip() for uri in own.split(","))))
    if not destinations and not output:
        raise UsageError(f"--output is missing, and --{kind}: one of them says where {kind} go")
    if not destinations:
        return (str(FileSystems.join(output, kind)),)
    for uri in destinations:
        if PUBSUB_TOPIC.fullmatch(uri):
            continue
        if re.match(r"pubsub:|projects/[^/]+/(topics|subscriptions)\b", uri):
            raise UsageError(f"--{kind}: {uri!r} is no topic; it is projects/PROJECT/topics/NAME")
        try:
            FileSystems.get_filesystem(uri)
        except ValueError:
            raise UsageError(
                f"--{kind}: nothing writes to {uri!r}; known are file prefixes, local or of a "
                "file system of Beam's (gs://…), and projects/PROJECT/topics/NAME"
            ) from None
    return destinations


def file_prefixes(destinations: Iterable[str]) -> list[str]:
    return [uri for uri in destinations if not PUBSUB_TOPIC.fullmatch(uri)]


def check_topics(destinations: Iterable[str]) -> None:
    """Makes sure that there are the topics to publish to.

    Raises:
      UsageError: one does not exist, or is out of reach.
    """
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    topics = [found[1] for uri in destinations if (found := PUBSUB_TOPIC.fullmatch(uri))]
    for topic in topics:
        try:
            with publisher() as client:
                client.get_topic(topic=topic, timeout=10, retry=None)
        except (GoogleAPIError, GoogleAuthError) as error:
            raise UsageError(f"{topic} cannot be published to: {one_line(error)}") from None


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.jsonl")
_APPENDED = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]{12}\.jsonl")


def result_files(prefix: str) -> list[str]:
    """The files that a run wrote under a prefix, in order."""
    try:
        found = FileSystems.match([f"{prefix}-*.jsonl"])[0].metadata_list
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"{prefix!r} cannot be listed: {error}") from None
    start = len(prefix)
    return sorted(
        m.path
        for m in found
        if _SHARD.fullmatch(m.path, start) or _APPENDED.fullmatch(m.path, start)
    )


def prepare_output(destinations: Iterable[str], inputs: list[str], streaming: bool) -> int:
    """Makes the folders, tries to write to them, and removes an earlier run's files.

    A run with another number of shards would else leave a mixture of both. A stream
    leaves what is there, and adds to it.

    Args:
      inputs: files that are about to be read.

    Returns:
      how many files of an earlier run were removed.

    Raises:
      UsageError: a folder cannot be written, or holds a file that is an input.
    """
    prefixes = file_prefixes(destinations)
    for folder in {FileSystems.split(prefix)[0] or "." for prefix in prefixes}:
        _check_writable(folder)
    stale = [] if streaming else [path for prefix in prefixes for path in result_files(prefix)]
    if read := sorted(set(stale) & set(inputs)):
        raise UsageError(f"--output: {read[0]} is read, and would be replaced; name another folder")
    if stale:
        FileSystems.delete(stale)
    return len(stale)


def _check_writable(folder: str) -> None:
    try:
        if not FileSystems.exists(folder):
            FileSystems.mkdirs(folder)
        probe = FileSystems.join(folder, ".chatflow-can-write")
        FileSystems.create(probe).close()
        FileSystems.delete([probe])
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"--output: {folder!r} cannot be written: {error}") from None
