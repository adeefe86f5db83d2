"""Writes records to files: JSON Lines under a prefix, or a single CSV or Parquet file."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filebasedsink import FileBasedSink
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import BadInputError, UsageError, one_line
from chatflow.options import SinkSettings
from chatflow.records import Record
from chatflow.sinks import tables
from chatflow.sinks.locks import take
from chatflow.sinks.sink import Sink, Uris
from chatflow.sinks.tables import Columns, Layout, Row, Writer, as_table, ending_of, writer_of

_log = logging.getLogger(__name__)


_MADE_AT = re.compile(rb'"(?:analysed|drafted|failed)_at":"([^"\\]+)"')


_SHARD = r"-\d{5}-of-\d{5}"


_APPENDED = r"-\d{8}T\d{6}Z-[0-9a-f]{12}"


PROBE = ".chatflow-can-write"
"""The beginning of the names of files that only test whether a folder can be written."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteFiles(beam.PTransform):
    """Writes records to `PREFIX-00000-of-00001.jsonl`; the runner chooses the number of shards.

    A prefix that ends in `.csv` or `.parquet` is the name of a single file with one row per record;
    one worker writes it.

    Attributes:
      fields: see `Layout`.
    """

    prefix: str
    fields: tuple[str, ...] = ()

    def expand(self, records: beam.PCollection[Record]) -> Any:
        if layout := layout_of(self.prefix, records, self.fields):
            sink = _TableSink(self.prefix, layout.columns)
            return (
                records
                | "ToRow" >> beam.Map(layout.row).with_output_types(dict[str, Any])
                | "WriteFiles" >> beam.io.Write(sink)
            )
        return (
            records
            | "ToJson" >> beam.Map(Record.to_json).with_output_types(str)
            | "WriteFiles" >> beam.io.WriteToText(self.prefix, file_name_suffix=".jsonl")
        )


def layout_of(
    prefix: str, records: beam.PCollection[Record], fields: tuple[str, ...]
) -> Layout | None:
    """Returns the layout of records as rows, or None if they are written as lines of JSON.

    Raises `UsageError` if the kind of the records is not known, but the destination is a table.
    """
    if not ending_of(prefix):
        return None
    kind = records.element_type
    if kind not in tables.KINDS.values():
        raise UsageError(
            f"{prefix!r}: a table has the columns of one kind of record, but these are {kind}; "
            "declare their type, e.g. with_output_types(Analysis), or name a prefix for JSON Lines"
        )
    return Layout(kind, fields)


class _TableSink(FileBasedSink):
    """Writes rows to one file."""

    def __init__(self, path: str, columns: Columns):
        plain = CompressionTypes.UNCOMPRESSED
        super().__init__(path, coder=None, shard_name_template="", compression_type=plain)
        self.path, self.columns = path, columns

    def open(self, temp_path: str) -> tuple[Writer, Any]:
        file = super().open(temp_path)
        return writer_of(self.path)(file, self.columns), file

    def write_record(self, opened: tuple[Writer, Any], row: Row) -> None:
        opened[0].write(row)

    def close(self, opened: tuple[Writer, Any]) -> None:
        opened[0].close()
        opened[1].close()


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class AppendFiles(beam.PTransform):
    """Writes a stream's records to files `PREFIX-TIME-HASH.jsonl`.

    A file appears only when it is complete: `seconds` after its first record, or when it has
    `records` records. For files in a bucket, the runner keeps the records until then. The name
    comes from the content, so that a file that is written again after a fault replaces the first.
    On this machine, where the runner's state ends with the process, records are on the disk before
    their bundle ends; see `recover`. With a prefix `NAME.csv` or `NAME.parquet`, files
    `NAME-TIME-HASH.csv` have one row per record.

    Attributes:
      fields: see `Layout`.
    """

    prefix: str
    seconds: float = 30
    records: int = 10_000
    fields: tuple[str, ...] = ()

    def expand(self, records: beam.PCollection[Record]) -> Any:
        layout = layout_of(self.prefix, records, self.fields)
        if is_local(self.prefix):
            append = _AppendDoFn(self.prefix, self.seconds, self.records, layout)
            return records | "Append" >> beam.ParDo(append)
        return (
            records
            | "ToLine" >> beam.Map(to_line).with_output_types(tuple[str, str])
            | "Gather"
            >> beam.GroupIntoBatches.WithShardedKey(
                self.records, max_buffering_duration_secs=self.seconds
            )
            | "WriteFile" >> beam.MapTuple(self.write, layout=layout)
        )

    def write(self, _: Any, lines: Sequence[str], layout: Layout | None = None) -> str:
        content = "".join(sorted(lines)).encode()
        name = final_name(self.prefix, content)
        # Another name at first, so that readers never see half a file.
        scratch = f"{self.prefix}-{uuid.uuid4().hex}.part"
        with FileSystems.create(scratch) as file:
            file.write(as_table(name, layout, content) if layout else content)
        if FileSystems.exists(name):
            FileSystems.delete([scratch])
        else:
            FileSystems.rename([scratch], [name])
        return name


def final_name(prefix: str, content: bytes) -> str:
    """Returns the name of a stream's file, made from its content, which is lines of JSON."""
    newest = max(_MADE_AT.findall(content), default=b"").decode()
    moment = re.sub(r"[-:]|\.\d+", "", newest)
    stem, ending = _divided(prefix)
    return f"{stem}-{moment}-{hashlib.sha256(content).hexdigest()[:12]}{ending}"


def _divided(prefix: str) -> tuple[str, str]:
    """Returns the beginning and the ending of the names of a prefix's files."""
    ending = ending_of(prefix)
    return (prefix.removesuffix(ending), ending) if ending else (prefix, ".jsonl")


class _AppendDoFn(beam.DoFn):
    """Appends the lines of each bundle to a file, which gets its final name when it is complete.

    For a table, the file begins with the layout; when the file is complete, it becomes the table.
    """

    def __init__(self, prefix: str, seconds: float, records: int, layout: Layout | None = None):
        self.prefix, self.seconds, self.records, self.layout = prefix, seconds, records, layout

    def setup(self) -> None:
        self.file: Any = None
        self.changing = threading.Lock()

    def start_bundle(self) -> None:
        self.lines: list[str] = []

    def process(self, record: Record) -> None:
        self.lines.append(record.to_json() + "\n")

    def finish_bundle(self) -> None:
        if not self.lines:
            return
        with self.changing:
            if self.file is None:
                self.file = open(f"{self.prefix}-{uuid.uuid4().hex}.part", "ab")  # noqa: SIM115
                hold(self.file)
                self.written = 0
                self.timer = threading.Timer(self.seconds, self.complete, [self.file])
                self.timer.daemon = True
                self.timer.start()
                if self.layout:
                    self.file.write(self.layout.to_line())
            self.file.write("".join(self.lines).encode())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.written += len(self.lines)
            if self.written >= self.records:
                self._complete()

    def teardown(self) -> None:
        self.complete(self.file)

    def complete(self, file: Any) -> None:
        with self.changing:
            if file is not None and file is self.file:
                self._complete()

    def _complete(self) -> None:
        file, self.file = self.file, None
        self.timer.cancel()
        try:
            with open(file.name, "rb") as whole:
                _put_in_place(file.name, self.prefix, whole.read())
        except Exception as error:  # its records are on the disk and must not be written again
            _log.error(
                "%s cannot be put in place, the next run does it: %s", file.name, one_line(error)
            )
        finally:
            file.close()


def hold(file: Any) -> bool:
    """Locks a file until it is closed or the process dies; returns whether that worked.

    It also returns True if the file system has no locks.
    """
    try:
        return take(file, fcntl.LOCK_EX)
    except OSError:
        _log.debug("%s cannot be locked", file.name, exc_info=True)
        return True


def recover(path: str, prefix: str) -> None:
    """Puts the whole lines of a killed stream's file in place, if its process has ended."""
    with open(path, "rb+") as file:
        if hold(file):
            content = file.read()
            content = content[: content.rfind(b"\n") + 1]  # the bundle of the rest did not finish
            file.truncate(len(content))
            try:
                _put_in_place(path, prefix, content)
            except (BadInputError, KeyError, ValueError) as error:
                raise UsageError(
                    f"--output: {path}, left by an earlier stream, cannot be turned into a table: "
                    f"{error}; move it away"
                ) from None


def _put_in_place(path: str, prefix: str, content: bytes) -> None:
    layout = b""
    if ending_of(prefix):
        layout, _, content = content.partition(b"\n")
    if not content:
        os.remove(path)
    elif not layout:
        os.replace(path, final_name(prefix, content))
    else:  # after a fault before the end, the same lines get the same name again
        name = final_name(prefix, content)
        with whole_file(name, f"{path}.new") as file:
            file.write(as_table(name, Layout.parse(layout), content))
        os.remove(path)


@contextlib.contextmanager
def whole_file(path: str, scratch: str = "") -> Iterator[Any]:
    """Opens a file for writing; it gets its name when it is complete, and is deleted on an error.

    Until then its name is `scratch`, by default `PATH.part`.
    """
    scratch = scratch or f"{path}.part"
    try:
        with FileSystems.create(scratch, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            yield file
            if is_local(scratch):
                file.flush()
                os.fsync(file.fileno())
        move(scratch, path)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            FileSystems.delete([scratch])
        raise


def move(source: str, target: str) -> None:
    """Moves a file over another; does nothing if it was moved before."""
    if not FileSystems.exists(source):
        return
    if is_local(source):
        os.replace(source, target)
        return
    if FileSystems.exists(target):  # some file systems cannot rename onto an existing file
        FileSystems.delete([target])
    FileSystems.rename([source], [target])


def to_line(record: Record) -> tuple[str, str]:
    return "", record.to_json() + "\n"


def result_files(prefix: str) -> list[str]:
    """Returns the files that a run wrote under a prefix, sorted; raises `UsageError`."""
    stem, ending = _divided(prefix)
    is_table = bool(ending_of(prefix))
    own = re.compile(f"({'' if is_table else f'{_SHARD}|'}{_APPENDED}){re.escape(ending)}")
    found = files_under(stem if is_table else f"{stem}-")
    return sorted(path for path in found if path == prefix or own.fullmatch(path, len(stem)))


def files_under(prefix: str) -> dict[str, float]:
    """Returns the files whose paths start with a prefix, and when they changed (Unix time).

    On this machine it does not look into subfolders, and `*` and `[` have no special meaning.
    """
    try:
        if not is_local(prefix):
            files = FileSystems.match([f"{prefix}*"])[0].metadata_list
            return {file.path: file.last_updated_in_seconds for file in files}
        folder, name = os.path.split(prefix)
        found = {}
        for other in os.listdir(folder or ".") if os.path.isdir(folder or ".") else ():
            path = os.path.join(folder, other)
            if other.startswith(name) and os.path.isfile(path):
                with contextlib.suppress(FileNotFoundError):  # another process just removed it
                    found[path] = os.path.getmtime(path)
        return found
    except Exception as error:  # each filesystem raises its own errors
        raise UsageError(f"{prefix!r} cannot be listed: {error}") from None


def is_local(path: str) -> bool:
    """Returns whether a path is on this machine's file system."""
    return FileSystems.get_filesystem(path).scheme() is None


def check_writable(folder: str, flag: str) -> None:
    """Makes a folder if it is missing, and tests writing to it; raises `UsageError` with `flag`."""
    try:
        if not FileSystems.exists(folder):
            FileSystems.mkdirs(folder)
        # Two runs may test the same folder at once.
        probe = FileSystems.join(folder, f"{PROBE}-{uuid.uuid4().hex}")
        FileSystems.create(probe).close()
        FileSystems.delete([probe])
    except Exception as error:  # each filesystem raises its own errors
        raise UsageError(f"{flag}: {folder!r} cannot be written: {error}") from None


class Files(Sink):
    example = (
        "file prefixes (or NAME.csv, NAME.parquet), local or on a file system of Beam (gs://…)"
    )

    def takes(self, uri: str) -> bool:
        try:
            FileSystems.get_filesystem(uri)
        except ValueError:
            return False
        return True

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:
        """Refuses a table for several kinds of records."""
        for uri, kinds in uris.items():
            if ending_of(uri) and len(kinds) > 1:
                raise UsageError(
                    f"--{kinds[0]}, --{kinds[1]}: {uri!r} is a table of one kind of record; name "
                    "a separate file for each"
                )

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        if settings.streaming:
            return AppendFiles(uri, fields=settings.fields)
        return WriteFiles(uri, settings.fields)
