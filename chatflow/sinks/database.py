"""Writes each record once to a database; newer records supersede older ones."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence

import apache_beam as beam

from chatflow.dead_letters import refused
from chatflow.errors import ElementError, UsageError, one_line
from chatflow.network import attempts
from chatflow.options import SinkSettings
from chatflow.records import DeadLetter, Record
from chatflow.sinks.sink import Sink, Uris

ROWS = 500
"""Records in a transaction."""

UPSERT_SECONDS = 600.0
"""How long to retry writing before the bundle fails and the runner retries it."""


_log = logging.getLogger(__name__)


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class UpsertRecords(beam.PTransform):
    """Upserts records by id into `chatflow.database.tables`; outputs a dead letter per refused one.

    A repeated bundle, a replay or a backfill writes each row once, even with several workers. The
    newest revision of a chat is kept. A newer analysis of the customer or a newer draft supersedes
    a draft that waits for review. People's decisions on a draft are never overwritten.

    Attributes:
      uri: `sqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`.
      password: where the password is, if the URI has none; see `secrets.PLACES`.
    """

    uri: str = dataclasses.field(repr=False)  # it may hold a password
    password: str = dataclasses.field(default="", repr=False)

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter]:
        return (
            records
            | "Batch" >> beam.BatchElements(1, ROWS)  # the first are there soon
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
        """Writes records in one transaction; splits a refused batch to find the refused records.

        Raises `DBAPIError` if the database cannot be reached or written to.
        """
        import tenacity

        from chatflow.database.upserts import upsert

        passing = tenacity.retry_if_exception(_may_pass)
        try:
            for attempt in attempts(f"writing to {self.database.uri}", UPSERT_SECONDS, passing):
                with attempt, self.database.write() as connection:
                    upsert(connection, records)
            return
        except Exception as error:  # also raised for values that a statement cannot contain
            if _may_pass(error):
                raise
            fault = error
        if len(records) > 1:
            half = len(records) // 2
            yield from self.process(records[:half])
            yield from self.process(records[half:])
        else:
            said = one_line(Exception(getattr(fault, "orig", fault)))
            yield refused(records[0], ElementError("sql_refused", said))


def _may_pass(error: BaseException) -> bool:
    """Returns whether the database or its settings, and not a record, caused an error."""
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
        """Creates missing tables; workers elsewhere create them when they start."""
        from chatflow.database import connections

        for uri in uris:
            if uri.startswith("sqlite:") and not share_files:
                raise UsageError(f"{uri} is a file on this machine, which the workers cannot reach")
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
