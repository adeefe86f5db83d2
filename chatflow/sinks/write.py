"""WriteRecords: records to files, topics, BigQuery, databases and webhooks, by URI."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError
from chatflow.records import DeadLetter, Record
from chatflow.sinks import bigquery
from chatflow.sinks.database import DATABASE, UpsertRecords, check_uri, without_passwords
from chatflow.sinks.files import AppendFiles, WriteFiles
from chatflow.sinks.pubsub import PUBSUB_TOPIC, PublishRecords
from chatflow.sinks.webhooks import WEBHOOK, PostRecords, check_address
from chatflow.sinks.webhooks import shown as shown_webhook


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
