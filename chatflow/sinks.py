"""WriteRecords: records to files, topics, BigQuery, databases and webhooks, by URI."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow import bigquery
from chatflow.errors import UsageError
from chatflow.publishing import PUBSUB_TOPIC, PublishRecords
from chatflow.records import DeadLetter, Record
from chatflow.sql import DATABASE, UpsertRecords, check_uri, without_passwords
from chatflow.webhooks import WEBHOOK, PostRecords, check_address
from chatflow.webhooks import shown as shown_webhook


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteRecords(beam.PTransform):
    """Records to each of their destinations.

    Attributes:
      destinations: file prefixes, Pub/Sub topics, tables, webhooks; see `split_destinations`.
      streaming: the records never end, so files are written as they fill up.
      webhook_secret: where the secret is by which webhooks are signed; see `secrets.PLACES`.
      database_password: where the password of databases is.

    Output: a `DeadLetter` for each record that a destination refused for good; None where no
    destination ever does. Dead letters themselves have no other place to go: one that is refused
    fails its bundle, so that the runner tries again.
    """

    destinations: Sequence[str] = dataclasses.field(repr=False)  # there may be secrets in them
    streaming: bool = False
    webhook_secret: str = dataclasses.field(default="", repr=False)
    database_password: str = dataclasses.field(default="", repr=False)

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter] | None:
        written = [
            records | f"Write{number or ''}" >> self.sink(uri)
            for number, uri in enumerate(self.destinations)
        ]
        refused = [letters for letters in written if _are_letters(letters)]
        return refused | "Refused" >> beam.Flatten() if refused else None

    def sink(self, uri: str) -> beam.PTransform:
        """What writes to a destination; a new scheme is a new line here.

        One that may refuse a record for good gives a collection of type `DeadLetter`; what
        others give is nobody's concern.
        """
        if topic := PUBSUB_TOPIC.fullmatch(uri):
            return PublishRecords(topic[1])
        if bigquery.TABLE.fullmatch(uri):
            return bigquery.WriteRows(uri)
        if DATABASE.match(uri):
            return UpsertRecords(uri, self.database_password)
        if WEBHOOK.match(uri):
            return PostRecords(uri, self.webhook_secret)
        return AppendFiles(uri) if self.streaming else WriteFiles(uri)


def _are_letters(output: Any) -> bool:
    return isinstance(output, beam.PCollection) and output.element_type is DeadLetter


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


def split_destinations(kind: str, own: str, output: str, database: str = "") -> tuple[str, ...]:
    """Where a kind of record goes: what its own flag says, else the folder `--output`.

    Args:
      own: file prefixes, topics, tables, databases and webhooks, divided by commas.
      database: where all go besides.

    Raises:
      UsageError: there is none, or one of a scheme that is not known.
    """
    destinations = tuple(filter(None, (uri.strip() for uri in own.split(","))))
    if not destinations and output:
        destinations = (str(FileSystems.join(output, kind)),)
    if database and database not in destinations:
        destinations += (database,)
    if not destinations:
        raise UsageError(f"--output is missing, and --{kind}: one of them says where {kind} go")
    for uri in destinations:
        if WEBHOOK.match(uri):
            check_address(uri, f"--{kind}")
        if DATABASE.match(uri):
            check_uri(uri, f"--{kind}")
        if not is_file(uri):
            continue
        if uri.startswith("bigquery:"):
            raise UsageError(
                f"--{kind}: {uri!r} is no table; it is bigquery://PROJECT.DATASET.TABLE"
            )
        if re.match(r"pubsub:|projects/[^/]+/(topics|subscriptions)\b", uri):
            raise UsageError(f"--{kind}: {uri!r} is no topic; it is projects/PROJECT/topics/NAME")
        try:
            FileSystems.get_filesystem(uri)
        except ValueError:
            raise UsageError(
                f"--{kind}: nothing writes to {uri!r}; known are file prefixes, local or of a "
                "file system of Beam's (gs://…), projects/PROJECT/topics/NAME, "
                "bigquery://PROJECT.DATASET.TABLE, sqlite:///FILE, postgresql+psycopg://…, and "
                "https://… (a webhook)"
            ) from None
    return destinations


def is_file(uri: str) -> bool:
    """Whether a destination is a file prefix."""
    others = (PUBSUB_TOPIC.fullmatch, bigquery.TABLE.fullmatch, DATABASE.match, WEBHOOK.match)
    return not any(is_other(uri) for is_other in others)


def shown(text: str) -> str:
    """A text with destinations, less what may be secret in them."""
    return without_passwords(shown_webhook(text))


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


def prepare_output(
    destinations: Iterable[str], inputs: list[str], streaming: bool, local: bool = True
) -> int:
    """Makes the folders, tries to write to them, and removes an earlier run's files.

    A run with another number of shards would else leave a mixture of both. A stream
    leaves what is there, and adds to it.

    Args:
      inputs: files that are about to be read.
      local: the pipeline runs here, and now. Elsewhere it may be refused, or an earlier one may
        still write, so nothing is removed.

    Returns:
      how many files of an earlier run were removed.

    Raises:
      UsageError: a folder cannot be written, or holds a file that is an input, or one that
        would have to be removed.
    """
    prefixes = list(filter(is_file, destinations))
    for folder in {FileSystems.split(prefix)[0] or "." for prefix in prefixes}:
        check_writable(folder, "--output")
    stale = [] if streaming else [path for prefix in prefixes for path in result_files(prefix)]
    if read := sorted(set(stale) & set(inputs)):
        raise UsageError(f"--output: {read[0]} is read, and would be replaced; name another folder")
    if stale and not local:
        raise UsageError(
            f"--output: {stale[0]} is there, of another run; name another folder, or remove it"
        )
    if stale:
        FileSystems.delete(stale)
    return len(stale)


def check_writable(folder: str, flag: str) -> None:
    """Makes a folder where there is none, and writes a file in it, which is removed.

    Raises:
      UsageError: it cannot; with the flag that names it.
    """
    try:
        if not FileSystems.exists(folder):
            FileSystems.mkdirs(folder)
        probe = FileSystems.join(folder, ".chatflow-can-write")
        FileSystems.create(probe).close()
        FileSystems.delete([probe])
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"{flag}: {folder!r} cannot be written: {error}") from None
