"""Lines of files that a command reads itself, as a stream, and refuses if they are not whole."""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import gzip
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError, one_line

_OPENERS: Mapping[str, Callable[[Any], Any]] = {
    CompressionTypes.GZIP: gzip.open,
    CompressionTypes.BZIP2: bz2.open,
    CompressionTypes.LZMA: lzma.open,
}
"""Beam's own readers take the end of a compressed file that was cut off for its end."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """The non-blank lines of files without their line ends, read again by each iteration.

    Attributes:
      paths: local or on any filesystem that Beam knows; their endings show compression.
      flag: what names the files on the command line, for messages.

    Iterating it raises `UsageError` for a file that cannot be read to its end or is UTF-16.
    """

    paths: Sequence[str]
    flag: str

    def __iter__(self) -> Iterator[bytes]:
        for path in self.paths:
            for _, line in numbered(path, self.flag):
                yield line


def numbered(path: str, flag: str = "") -> Iterator[tuple[int, bytes]]:
    """Yields the non-blank lines of a file with their numbers from 1; raises as `Lines` does."""
    name = f"{flag}: {path!r}" if flag else repr(path)
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(file.readline, b""), 1):
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UsageError(f"{name} is UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8")
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except UsageError:
        raise
    except Exception as error:  # each filesystem and each compression has its own
        said = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"{name} cannot be read: {said}") from None


def _opened(path: str) -> Any:
    if opener := _OPENERS.get(CompressionTypes.detect_compression_type(path)):
        return opener(FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED))
    return FileSystems.open(path)
