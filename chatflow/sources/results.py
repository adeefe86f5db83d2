"""ReadResults: reads the analyses and drafts of earlier runs, from files or a database."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator

import apache_beam as beam

from chatflow import metrics
from chatflow.errors import BadInputError, UsageError
from chatflow.records import Analysis, Arrival, Draft, Record, open_record
from chatflow.sources.read import ReadLines

DATABASE = re.compile(r"(?:sqlite|postgresql(?:\+psycopg)?):")
"""How a place begins if it is a database; otherwise it is a glob or a folder of files."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class ReadResults(beam.PTransform):
    """Reads analyses and drafts; leaves out other lines of files, and counts unreadable ones.

    Attributes:
      place: a glob or a folder of JSON Lines, or a database.
      password: where the database's password is; see `secrets.PLACES`.
    """

    place: str = dataclasses.field(repr=False)  # it may hold a password
    password: str = ""

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[Record]:
        if not DATABASE.match(self.place):
            lines = begin | "ReadLines" >> ReadLines(self.place)
            return lines | "Open" >> beam.FlatMap(_opened).with_output_types(Record)
        read = beam.ParDo(_ReadTable(self.place, self.password)).with_output_types(Record)
        return begin | "Kinds" >> beam.Create(["analyses", "drafts"]) | "ReadTable" >> read


def check_results(uri: str, password: str, local: bool, share_files: bool) -> None:
    """Raises `UsageError` if the database does not exist; opens it if the pipeline runs here."""
    from chatflow.database.connections import Database, check_there, parse_uri, password_at

    try:
        if parse_uri(uri).get_backend_name() == "sqlite" and not share_files:
            raise UsageError("is a file on this machine, which the workers cannot reach")
        check_there(uri)
        if local:
            with contextlib.closing(Database(uri, password_at(password))) as database:
                database.upgrade()
    except UsageError as error:
        raise UsageError(f"--skip_done: {error}") from None


def _opened(arrival: Arrival) -> Iterator[Record]:
    try:
        record = open_record(arrival.read())
    except BadInputError as error:
        metrics.count("earlier_unreadable")
        _log.warning(
            "--skip_done: %s:%s is not a result: %s", arrival.source, arrival.number, error
        )
        return
    if isinstance(record, (Analysis, Draft)):
        yield record


class _ReadTable(beam.DoFn):
    """Reads the records of a table, a few at a time."""

    def __init__(self, uri: str, password: str):
        self.uri, self.password = uri, password

    def process(self, table: str) -> Iterator[Record]:
        import sqlalchemy as sa

        from chatflow.database import tables
        from chatflow.database.connections import opened, password_at

        kind: type[Record] = Analysis if table == "analyses" else Draft
        columns = tables.metadata.tables[table].c
        query = sa.select(*(columns[name] for name in kind.model_fields))
        with opened(self.uri, password_at(self.password)).read() as connection:
            rows = connection.execution_options(stream_results=True, yield_per=500).execute(query)
            for row in rows.mappings():
                yield kind.model_validate({k: v for k, v in row.items() if v is not None})
