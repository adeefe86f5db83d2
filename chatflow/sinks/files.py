"""Writes records to JSON Lines files."""

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
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError
from chatflow.options import SinkSettings
from chatflow.records import Record
from chatflow.sinks.locks import take
from chatflow.sinks.sink import Sink

_MADE_AT = re.compile(rb'"(?:analysed|drafted|failed)_at":"([^"\\]+)"')


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.jsonl")


_APPENDED = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]{12}\.jsonl")


PROBE = ".chatflow-can-write"
"""How files begin that only test whether a folder can be written."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteFiles(beam.PTransform):
    """Writes records to `PREFIX-00000-of-00001.jsonl`; the runner chooses the number of shards."""

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
    """Writes a stream's records to files `PREFIX-TIME-HASH.jsonl`.

    A file appears complete, `seconds` after its first record or when it has `records` ones. Until
    then a runner keeps the records of a bucket's file, and the name is derived from the content, so
    that a file that is written again after a fault replaces the first. On this machine, where a
    runner's state ends with the process, they are on the disk before their bundle ends; see
    `recover`.
    """

    prefix: str
    seconds: float = 30
    records: int = 10_000

    def expand(self, records: beam.PCollection[Record]) -> Any:
        if is_local(self.prefix):
            append = _AppendDoFn(self.prefix, self.seconds, self.records)
            return records | "Append" >> beam.ParDo(append)
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
        content = "".join(sorted(lines)).encode()
        name = final_name(self.prefix, content)
        # Written under another name first, so that no reader sees half a file.
        scratch = f"{self.prefix}-{uuid.uuid4().hex}.part"
        with FileSystems.create(scratch) as file:
            file.write(content)
        if FileSystems.exists(name):
            FileSystems.delete([scratch])
        else:
            FileSystems.rename([scratch], [name])
        return name


def final_name(prefix: str, content: bytes) -> str:
    newest = max(_MADE_AT.findall(content), default=b"").decode()
    moment = re.sub(r"[-:]|\.\d+", "", newest)
    return f"{prefix}-{moment}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"


class _AppendDoFn(beam.DoFn):
    """Appends the lines of each bundle to a file, which gets its final name when it is complete."""

    def __init__(self, prefix: str, seconds: float, records: int):
        self.prefix, self.seconds, self.records = prefix, seconds, records

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
        with open(file.name, "rb") as whole:
            _put_in_place(file.name, self.prefix, whole.read())
        file.close()


def hold(file: Any) -> bool:
    """Locks a file until it is closed or the process dies; returns whether nobody else holds it.

    Where the file system has no locks, nobody does.
    """
    try:
        return take(file, fcntl.LOCK_EX)
    except OSError:
        logging.getLogger(__name__).debug("%s cannot be locked", file.name, exc_info=True)
        return True


def recover(path: str, prefix: str) -> None:
    """Puts the whole lines of a killed stream's file in place, if its process has ended."""
    with open(path, "rb+") as file:
        if hold(file):
            content = file.read()
            content = content[: content.rfind(b"\n") + 1]  # the bundle of the last did not end
            file.truncate(len(content))
            _put_in_place(path, prefix, content)


def _put_in_place(path: str, prefix: str, content: bytes) -> None:
    if content:
        os.replace(path, final_name(prefix, content))
    else:
        os.remove(path)


def to_line(record: Record) -> tuple[str, str]:
    return "", record.to_json() + "\n"


def result_files(prefix: str) -> list[str]:
    """Returns the files that a run wrote under a prefix, sorted; raises `UsageError`."""
    start = len(prefix)
    return sorted(
        path
        for path in files_under(f"{prefix}-")
        if _SHARD.fullmatch(path, start) or _APPENDED.fullmatch(path, start)
    )


def files_under(prefix: str) -> dict[str, float]:
    """Returns the files whose paths start with a prefix, and when they changed (Unix time).

    On this machine it does not look into folders below, and takes `*` and `[` as they are.
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
                with contextlib.suppress(FileNotFoundError):  # another process removed it now
                    found[path] = os.path.getmtime(path)
        return found
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"{prefix!r} cannot be listed: {error}") from None


def is_local(path: str) -> bool:
    """Returns whether a path is in this machine's file system."""
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
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"{flag}: {folder!r} cannot be written: {error}") from None


class Files(Sink):
    example = "file prefixes, local or of a file system of Beam's (gs://…)"

    def takes(self, uri: str) -> bool:
        try:
            FileSystems.get_filesystem(uri)
        except ValueError:
            return False
        return True

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        return AppendFiles(uri) if settings.streaming else WriteFiles(uri)
