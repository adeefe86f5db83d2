"""WriteRecords: records to files of JSON Lines."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError
from chatflow.records import Record

KINDS = ("analyses", "drafts", "dead_letters")
"""Each kind of record has files of this name in the output folder."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteRecords(beam.PTransform):
    """Records to `FOLDER/KIND-00000-of-00001.jsonl`, as many shards as the runner wants.

    Attributes:
      folder: local or `gs://`.
      kind: one of `KINDS`.
    """

    folder: str
    kind: str

    def expand(self, records: beam.PCollection[Record]) -> Any:
        return (
            records
            | "ToJson" >> beam.Map(Record.to_json).with_output_types(str)
            | "WriteFiles"
            >> beam.io.WriteToText(
                FileSystems.join(self.folder, self.kind), file_name_suffix=".jsonl"
            )
        )


_SHARD = re.compile(rf"(?:{'|'.join(KINDS)})-\d{{5}}-of-\d{{5}}\.jsonl")


def result_files(folder: str, kind: str | None = None) -> list[str]:
    """The files that a run wrote to a folder, in order."""
    try:
        pattern = FileSystems.join(folder, f"{kind or ''}*.jsonl")
        found = FileSystems.match([pattern])[0].metadata_list
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"--output: {folder!r} cannot be listed: {error}") from None
    return sorted(m.path for m in found if _SHARD.fullmatch(FileSystems.split(m.path)[1]))


def prepare_output(folder: str, inputs: list[str]) -> int:
    """Makes the folder, tries to write to it, and removes an earlier run's files.

    A run with another number of shards would else leave a mixture of both.

    Args:
      inputs: files that are about to be read.

    Returns:
      how many files of an earlier run were removed.

    Raises:
      UsageError: the folder cannot be written, or holds a file that is an input.
    """
    try:
        if not FileSystems.exists(folder):
            FileSystems.mkdirs(folder)
        probe = FileSystems.join(folder, ".chatflow-can-write")
        FileSystems.create(probe).close()
        FileSystems.delete([probe])
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"--output: {folder!r} cannot be written: {error}") from None
    stale = result_files(folder)
    if read := sorted(set(stale) & set(inputs)):
        raise UsageError(
            f"--output: {folder!r} holds {read[0]}, which is read; name another folder"
        )
    if stale:
        FileSystems.delete(stale)
    return len(stale)
