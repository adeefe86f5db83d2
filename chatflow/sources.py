"""ReadChats: files of JSON Lines to chats."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.io.filesystems import FileSystems

from chatflow import metrics
from chatflow.dead_letters import DeadLettered
from chatflow.errors import BadInputError, UsageError
from chatflow.records import Chat, parse_chat


class Chats(NamedTuple):
    chats: beam.PCollection
    dead_letters: beam.PCollection


@dataclasses.dataclass
class ReadLines(beam.PTransform):
    """Lines of files, as bytes; blank lines are left out.

    Attributes:
      pattern: local or `gs://` glob, or a folder, whose `*.jsonl` files are read.
        Compressed files are known by their endings.
    """

    pattern: str

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection[bytes]:
        lines = begin | "ReadLines" >> beam.io.ReadFromText(
            input_pattern(self.pattern), coder=BytesCoder(), validate=False
        )
        return lines | "DropBlank" >> beam.Filter(bytes.strip).with_output_types(bytes)


@beam.typehints.with_input_types(bytes)
@dataclasses.dataclass
class ParseChats(beam.PTransform):
    """Lines of JSON to chats; what is no chat is a dead letter.

    Attributes:
      max_line_bytes: a longer line is a dead letter (`line_too_long`).
    """

    max_line_bytes: int

    def expand(self, lines: beam.PCollection[bytes]) -> Chats:
        parsed = lines | "ParseChat" >> DeadLettered("read", self.parse, Chat)
        return Chats(parsed.ok, parsed.dead_letters)

    def parse(self, line: bytes) -> Iterable[Chat]:
        metrics.count("lines_read")
        if len(line) > self.max_line_bytes:
            raise BadInputError(
                "line_too_long",
                f"the line has {len(line)} bytes, more than --max_line_bytes={self.max_line_bytes}",
            )
        reading = parse_chat(line)
        metrics.count("chats_read")
        metrics.count("empty_messages", reading.empty_messages)
        metrics.count("duplicate_messages", reading.duplicate_messages)
        yield reading.chat


def input_pattern(pattern: str) -> str:
    """A folder as the pattern of its `*.jsonl` files; a glob as it is."""
    is_local = "://" not in pattern
    if pattern.endswith("/") or (is_local and os.path.isdir(pattern)):
        return str(FileSystems.join(pattern.rstrip("/") or "/", "*.jsonl*"))
    return pattern


def check_input(pattern: str) -> list[str]:
    """The files that a pattern names.

    Raises:
      UsageError: there are none, or they cannot be listed.
    """
    try:
        matches = FileSystems.match([input_pattern(pattern)])[0].metadata_list
    except Exception as error:  # each filesystem has its own
        raise UsageError(f"--input: {pattern!r} cannot be listed: {error}") from None
    if not matches:
        hint = " (looked for *.jsonl in the folder)" if input_pattern(pattern) != pattern else ""
        raise UsageError(f"--input: no file matches {pattern!r}{hint}")
    return [match.path for match in matches]
