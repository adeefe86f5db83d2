"""Writes rows of CSV, Parquet and JSON Lines files: one per record, in flat columns.

A value that does not fit into a cell becomes text: quotations one per line, words separated by
commas, the rest as JSON.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import functools
import io
import os
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import IntEnum
from typing import IO, Any, Protocol

import pydantic_core

from chatflow.records import (
    Analysis,
    DeadLetter,
    Draft,
    FieldValue,
    Quotation,
    Record,
    Reply,
    Response,
    parse_record,
    record_id,
)
from chatflow.sinks.bigquery import columns, id_column

Columns = Mapping[str, str]
"""The type of each column by its name, in order; types are those of BigQuery."""

Row = Mapping[str, Any]
"""Cells by column; missing columns are empty in this row."""

TEXT = "STRING"

GROUP_ROWS, GROUP_CHARACTERS = 10_000, 32_000_000
"""The most rows and characters that wait in memory for a row group of Parquet."""

KINDS = {kind.__name__: kind for kind in (Analysis, Draft, DeadLetter, Reply, Response)}
"""The records that can be rows, by name."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns of a kind of record: its fields in order; dead letters begin with their id.

    Attributes:
      fields: names of an analysis's `fields` that get their own columns, `field.NAME` and
        `confidence.NAME`; the column `fields` has the others as JSON.
    """

    kind: type[Record]
    fields: tuple[str, ...] = ()

    @functools.cached_property
    def columns(self) -> Columns:
        found: dict[str, str] = {}
        for column in columns(self.kind):
            if column["name"] == "fields":
                found |= {f"field.{name}": TEXT for name in self.fields}
                found |= {f"confidence.{name}": "FLOAT" for name in self.fields}
            is_flat = column["mode"] != "REPEATED" and column["type"] != "JSON"
            found[column["name"]] = column["type"] if is_flat else TEXT
        return found

    def row(self, record: Record) -> dict[str, Any]:
        """Returns the cells of a record."""
        values = {id_column(self.kind): record_id(record)}
        values |= {name: getattr(record, name) for name in self.kind.model_fields}
        if isinstance(record, Analysis):
            values |= self._fields(record.fields)
        return {name: cell(value) for name, value in values.items()}

    def _fields(self, given: Mapping[str, FieldValue]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.fields:
            if name in given:
                found[f"field.{name}"] = given[name].value
                found[f"confidence.{name}"] = given[name].confidence
        others = {name: value for name, value in given.items() if name not in self.fields}
        return {**found, "fields": others}

    def to_line(self) -> bytes:
        """Returns this layout as a line of JSON, which `parse` reads."""
        value = {"rows_of": self.kind.__name__, "fields": self.fields}
        return pydantic_core.to_json(value) + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Layout:
        """Reads what `to_line` returns; raises `ValueError` or `KeyError`."""
        value = pydantic_core.from_json(line)
        return cls(KINDS[value["rows_of"]], tuple(value["fields"]))


def cell(value: Any) -> Any:
    """Returns a value in the form of a cell: a text, number, boolean or time, or None."""
    if isinstance(value, str):
        # Half a surrogate pair cannot be written.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, datetime)):
        return value
    if isinstance(value, (int, IntEnum)):
        return int(value)
    if isinstance(value, float):
        return value if value - value == 0 else None  # neither NaN nor infinite
    if not isinstance(value, Record) and not value:
        return None
    if isinstance(value, tuple) and all(isinstance(item, Quotation) for item in value):
        return cell("\n".join(item.text for item in value))
    if isinstance(value, tuple) and not any(isinstance(item, Record) for item in value):
        return cell(", ".join(map(str, value)))
    return cell(pydantic_core.to_json(value, exclude_none=True, inf_nan_mode="null").decode())


class Writer(Protocol):
    """Writes rows to a file, which stays open."""

    def __init__(self, file: IO[bytes], columns: Columns): ...

    def write(self, row: Row) -> None: ...

    def close(self) -> None:
        """Writes the rest."""


class CsvWriter:
    """Writes CSV (RFC 4180) that spreadsheets read well: with a byte order mark, without formulas.

    Without the mark, Excel reads UTF-8 as the code page of Windows. Times are written as
    `2026-03-01 10:00:00` in UTC, which spreadsheets recognise.
    """

    def __init__(self, file: IO[bytes], columns: Columns):
        self._file, self._columns = file, columns
        self._csv = csv.writer(self, lineterminator="\r\n")
        file.write(codecs.BOM_UTF8)
        self._csv.writerow(map(guarded, columns))

    def write(self, row: Row | str) -> None:
        if isinstance(row, str):  # a row that `csv` has formatted
            self._file.write(row.encode())
        else:
            self._csv.writerow([_shown(row.get(name)) for name in self._columns])

    def close(self) -> None:
        pass


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return guarded(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    return value


def guarded(text: str) -> str:
    """Returns a text that no spreadsheet reads as a formula; adds an apostrophe if necessary.

    A text needs it if it begins with = + - @ (of any width, or after blanks and invisible
    characters), or with a tab or line break.
    https://owasp.org/www-community/attacks/CSV_Injection
    """
    if text[:1] in _BREAKS:
        return f"'{text}" if text else text
    for character in text:
        if unicodedata.category(character)[0] not in "ZC":  # separators and controls
            is_formula = unicodedata.normalize("NFKC", character)[0] in _OPERATORS
            return f"'{text}" if is_formula else text
    return text


_BREAKS = "\t\r\n"
_OPERATORS = "=+-@\N{MINUS SIGN}"


class ParquetWriter:
    """Writes Parquet with the types of the columns; times are microseconds in UTC."""

    def __init__(self, file: IO[bytes], columns: Columns):
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {
            TEXT: pa.string(), "INTEGER": pa.int64(), "FLOAT": pa.float64(), "BOOLEAN": pa.bool_(),
            "TIMESTAMP": pa.timestamp("us", "UTC"),
        }  # fmt: skip
        self._schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
        self._parquet = pq.ParquetWriter(file, self._schema)
        self._rows: list[Row] = []
        self._characters = 0

    def write(self, row: Row) -> None:
        self._rows.append(row)
        self._characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self._rows) >= GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._characters = [], 0

    def close(self) -> None:
        self._flush()
        self._parquet.close()


class JsonWriter:
    """Writes one object per line, without empty cells."""

    def __init__(self, file: IO[bytes], columns: Columns):
        self._file, self._columns = file, columns

    def write(self, row: Row) -> None:
        cells = {name: row[name] for name in self._columns if row.get(name) is not None}
        self._file.write(pydantic_core.to_json(cells) + b"\n")

    def close(self) -> None:
        pass


WRITERS: Mapping[str, type[Writer]] = {
    ".csv": CsvWriter,
    ".parquet": ParquetWriter,
    ".jsonl": JsonWriter,
}
"""The writer of rows, by the ending of the file."""


TABLES = (".csv", ".parquet")
"""The endings of destinations that are tables; JSON Lines contain whole records."""


def ending_of(path: str) -> str:
    """Returns the ending of a path, in its case, if it is that of a table; else ""."""
    ending = os.path.splitext(path)[1]
    return ending if ending.lower() in TABLES else ""


def writer_of(path: str) -> type[Writer]:
    """Returns the writer for a file; raises `KeyError` for an unknown ending."""
    return WRITERS[os.path.splitext(path)[1].lower()]


def as_table(path: str, layout: Layout, lines: bytes) -> bytes:
    """Returns the content of a table, made from records as JSON Lines; `path` shows its format."""
    file = io.BytesIO()
    writer = writer_of(path)(file, layout.columns)
    for line in lines.split(b"\n"):
        if line:
            writer.write(layout.row(parse_record(layout.kind, line)))
    writer.close()
    return file.getvalue()


def count_rows(path: str, file: IO[bytes]) -> int:
    """Returns the number of rows of a table."""
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(file).metadata.num_rows)
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    return sum(1 for _ in csv.reader(text)) - 1
