"""WriteFiles and AppendFiles: records to files of JSON Lines."""

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


def to_line(record: Record) -> tuple[str, str]:
    return "", record.to_json() + "\n"


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
    prefixes: Collection[str], inputs: Sequence[str], streaming: bool, local: bool = True
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
