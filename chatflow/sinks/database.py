"""UpsertRecords: records to a database, each once; what is newer supersedes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence

import apache_beam as beam
import tenacity

from chatflow.dead_letters import WRITE, dead_letter
from chatflow.errors import ElementError, UsageError, one_line
from chatflow.network import attempts
from chatflow.options import SinkSettings
from chatflow.records import DeadLetter, Record
from chatflow.sinks.sink import Sink, Uris

ROWS = 500
"""The most records of a transaction."""

UPSERT_SECONDS = 600.0
"""How long records are tried to be written before their bundle fails, and the runner goes on."""


_log = logging.getLogger(__name__)


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class UpsertRecords(beam.PTransform):
    """Records to rows of the tables in `chatflow.database.tables`, upserted by their ids.

    So a bundle that the runner does again, a replay or a backfill has each row once, however
    many workers write at the same time. Of a chat the newest revision is kept. A draft that
    waits for review is superseded when there is a newer analysis of its customer, or a newer
    draft; what people did with a draft is never written over.

    Gives dead letters: of records that the database will not take, whatever the try.

    Attributes:
      uri: `sqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`.
      password: where the password is, for a URI without one; see `secrets.PLACES`.
    """

    uri: str = dataclasses.field(repr=False)  # it may hold a password
    password: str = dataclasses.field(default="", repr=False)

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter]:
        return (
            records
            | "Batch" >> beam.BatchElements(ROWS, ROWS)
            | "Upsert"
            >> beam.ParDo(_UpsertDoFn(self.uri, self.password)).with_output_types(DeadLetter)
        )


class _UpsertDoFn(beam.DoFn):
    def __init__(self, uri: str, password: str = ""):
        self.uri, self.password = uri, password

    def setup(self) -> None:
        from chatflow.database.connections import opened, password_at

        self.database = opened(self.uri, password_at(self.password))

    def process(self, records: Sequence[Record]) -> Iterable[DeadLetter]:
        """Writes records; those that are refused on their own are dead letters.

        Raises:
          DBAPIError: the database cannot be reached, or lets nobody write.
        """
        import sqlalchemy as sa

        from chatflow.database.upserts import upsert

        passing = tenacity.retry_if_exception(_may_pass)
        try:
            for attempt in attempts(f"writing to {self.database.uri}", UPSERT_SECONDS, passing):
                with attempt, self.database.write() as connection:
                    upsert(connection, records)
            return
        except sa.exc.DBAPIError as error:
            if _may_pass(error):
                raise
            refused = error
        if len(records) > 1:
            half = len(records) // 2
            yield from self.process(records[:half])
            yield from self.process(records[half:])
        elif isinstance(records[0], DeadLetter):
            raise refused  # there is no other place for it
        else:
            said = one_line(Exception(getattr(refused, "orig", refused)))
            yield dead_letter(WRITE, records[0], ElementError("sql_refused", said))


def _may_pass(error: BaseException) -> bool:
    """Tells whether the database or its settings are at fault, and not a record."""
    import sqlalchemy as sa

    code = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
    # 54: an id too long for an index. https://www.postgresql.org/docs/current/errcodes-appendix.html
    if isinstance(error, (sa.exc.DataError, sa.exc.IntegrityError)) or code.startswith("54"):
        return False
    return isinstance(error, (sa.exc.DBAPIError, sa.exc.TimeoutError))


_PASSWORD = re.compile(r"(postgresql(?:\+psycopg)?://[^:@/,\s]*):(?:[^/,\s]*@|[^@?,\s]*@)")


class Database(Sink):
    """SQLite, with four slashes before an absolute path, or PostgreSQL."""

    example = "sqlite:///FILE, postgresql+psycopg://…"
    pattern = re.compile(r"(?:sqlite|postgresql(?:\+psycopg)?):")
    reviewed = True

    def check_uri(self, uri: str) -> None:
        from chatflow.database.connections import parse_uri

        parse_uri(uri)

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:
        """Makes the tables where they are missing; workers elsewhere make them as they start."""
        from chatflow.database import connections

        for uri in uris:
            if uri.startswith("sqlite:") and not share_files:
                raise UsageError(f"{uri} is a file of this machine, where no worker comes to")
            try:
                password = connections.password_at(settings.database_password)
                with contextlib.closing(connections.Database(uri, password)) as database:
                    database.upgrade()
            except UsageError as error:
                if local:
                    raise
                _log.warning("not checked: %s", error)

    def shown(self, text: str) -> str:
        return _PASSWORD.sub(r"\1:***@", text)

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        return UpsertRecords(uri, settings.database_password)
