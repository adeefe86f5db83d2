"""Writes records to JSON Lines files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import uuid
from collections.abc import Collection, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError
from chatflow.options import SinkSettings
from chatflow.records import Record
from chatflow.sinks.sink import Sink, Uris

_MADE_AT = re.compile(r'"(?:analysed|drafted|failed)_at":"([^"\\]+)"')


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.jsonl")


_APPENDED = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]{12}\.jsonl")


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

    The name is derived from the content, so a file that is written again after a fault replaces the
    first. A file appears complete, `seconds` after its first record or when it has `records` ones.
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
        # Written under another name first, so that no reader sees half a file.
        scratch = f"{self.prefix}-{uuid.uuid4().hex}.part"
        with FileSystems.create(scratch) as file:
            file.write(content)
        if FileSystems.exists(name):
            FileSystems.delete([scratch])
        else:
            FileSystems.rename([scratch], [name])
        return name


def to_line(record: Record) -> tuple[str, str]:
    return "", record.to_json() + "\n"


def result_files(prefix: str) -> list[str]:
    """Returns the files that a run wrote under a prefix, sorted; raises `UsageError`."""
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
    prefixes: Collection[str], inputs: Sequence[str], streaming: bool, local: bool = True
) -> int:
    """Makes the folders, checks that they are writable, and removes an earlier run's files.

    Old files would mix with those of a run with another number of shards. A stream removes nothing,
    because it appends. Returns the number of removed files.

    Args:
      inputs: files that are about to be read.
      local: the pipeline runs here, now. Elsewhere nothing is removed, because the service may
        refuse the job, or an earlier one may still write.

    Raises:
      UsageError: a folder is not writable, or an old file is an input or must not be removed.
    """
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
    """Makes a folder if it is missing, and tests writing to it; raises `UsageError` with `flag`."""
    try:
        if not FileSystems.exists(folder):
            FileSystems.mkdirs(folder)
        probe = FileSystems.join(folder, ".chatflow-can-write")
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

    def prepare(self, uris: Uris, inputs: Sequence[str], streaming: bool, local: bool) -> int:
        return prepare_output(uris, inputs, streaming, local)

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        return AppendFiles(uri) if settings.streaming else WriteFiles(uri)
