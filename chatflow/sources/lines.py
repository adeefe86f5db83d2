"""Reads the lines of files, each file independently, in bounded memory.

Compression, encoding and format are recognised by how a file begins, not by its name. Tables,
archives and other formats become lines of chatflow's own JSON. A part that cannot be read becomes
an `Arrival` with a fault that says where it is; the lines before it are read.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from chatflow import metrics
from chatflow.errors import UsageError, one_line
from chatflow.options import MAX_LINE_BYTES
from chatflow.records import LARGEST_INTEGER, Arrival, Fault, Range
from chatflow.sources.chats import USUAL, Customs
from chatflow.sources.formats import convokit, slack, tables, whatsapp
from chatflow.sources.formats.common import COMPRESSED, COMPRESSIONS, WINDOWS, as_line, name_in
from chatflow.sources.formats.objects import OURS, as_ours
from chatflow.sources.formats.values import Element, elements, pairs

BLOCK = 1 << 20
RANGE = 64 << 20
"""The bytes of each part of an uncompressed file; several workers can read its parts at once."""

_HEAD = 64 << 10


def ranges_of(path: str, size: int, customs: Customs = USUAL) -> list[Range]:
    """Returns the parts in which to read a file; one, if it is compressed or not read by lines."""
    if size > RANGE:
        try:
            with _raw(path) as file:
                head = file.read(_HEAD)
        except Exception:  # the reader reports the error
            return [Range(path)]
        by_lines = customs.format not in READ_WHOLE and kind_of(head, path) == LINES
        if by_lines and not _compression(head) and not _encoding(head):
            starts = range(0, size, RANGE)
            return [Range(path, start, min(start + RANGE, size)) for start in starts]
    return [Range(path)]


def read_lines(
    part: Range,
    most: int,
    plain: bool = False,
    customs: Customs = USUAL,
    root: str | None = None,
) -> Iterator[Arrival]:
    """Yields the lines of a part of a file that are not blank, and its faults.

    Args:
      most: a line with more bytes becomes a fault.
      plain: whether the lines are texts, not JSON.
      customs: the format of the file, and the columns of a table.
      root: the folder of all files that are read, if it is not the file's own; see `root_of`.
    """
    return _Reader(part, most, customs, root=root).all(plain)


def root_of(inputs: Sequence[str]) -> str:
    """Returns the folder, or the archive, that contains the files of all patterns.

    Paths relative to it tell apart files of the same name in different folders.
    """
    folders = []
    for pattern in inputs:
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        is_folder = fixed == pattern and (pattern.endswith(".zip") or os.path.isdir(pattern))
        folders.append((fixed if is_folder else fixed.rpartition("/")[0]).rstrip("/").split("/"))
    shared = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in shared)


def numbered(
    path: str, flag: str = "", customs: Customs | None = None, root: str | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file that are not blank, with their numbers from 1.

    With `customs`, other formats are converted to lines; without it, each line is left as it is.

    Raises `UsageError`, with the `flag` that names the file, if it cannot be read to its end.
    """
    return ((arrival.number, arrival.line) for arrival in whole(path, flag, customs, root))


def whole(
    path: str, flag: str = "", customs: Customs | None = None, root: str | None = None
) -> Iterator[Arrival]:
    """Yields the lines of a file as `numbered` does, but as arrivals, which say where they are."""
    plain = customs is None
    most = LARGEST_INTEGER if plain else MAX_LINE_BYTES
    for arrival in read_lines(Range(path), most, plain, customs or USUAL, root):
        if arrival.fault is not None:
            raise UsageError(f"{flag}: {arrival.fault.message}" if flag else arrival.fault.message)
        yield arrival


def fault_of(path: str, customs: Customs = USUAL) -> Fault | None:
    """Returns what is wrong with a whole file, judged by its beginning; None if it can be read."""
    if os.path.exists(path) and not os.path.isfile(path):
        return None  # a pipe can be read only once
    read = _Reader(Range(path), _HEAD, customs, only_check=True)
    first = next(read.all(), None)
    fault = first.fault if first else None
    return fault if fault and fault.reason in OF_FILES else None


def about(path: str, customs: Customs = USUAL) -> str:
    """Returns a description for people of how a table or an export is read; "" for other files."""
    if not os.path.isfile(path) and "://" not in path:
        return ""
    read = _Reader(Range(path), _HEAD, customs, only_check=True)
    next(read.all(), None)
    return read.about


UNREADABLE, TRUNCATED, CORRUPT, WRONG = OF_FILES = (
    "unreadable_file", "truncated_file", "corrupt_file", "wrong_format",
)  # fmt: skip
"""Reasons why a file was not read, or not to its end."""

_MEDIA = re.compile(
    r"\.(?:jpe?g|png|gif|webp|heic|opus|ogg|mp3|m4a|aac|amr|mp4|mov|3gp|vcf)$", re.IGNORECASE
)
"""Files that messengers export together with a chat."""
_HIDDEN = re.compile(r"(?:^|/)(?:\.|__)|/$")
"""Hidden files and folders in an archive, which are not read."""
_ONE_OBJECT = re.compile(rf"\.json{COMPRESSED}$", re.IGNORECASE)
_DAMAGE = (zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class _Reader:
    """Reads a part of a file; `offset` and `lines` say how far, in uncompressed bytes and in lines.

    With `only_check`, tables and archives are opened, but not read. `beside` opens a file in the
    same folder, if it exists.
    """

    def __init__(
        self,
        part: Range,
        most: int,
        customs: Customs = USUAL,
        only_check: bool = False,
        beside: Callable[[str], Any] | None = None,
        root: str | None = None,
    ):
        self.part, self.most, self.customs = part, most, customs
        self.only_check, self.open_beside = only_check, beside or self._open_beside
        self.root = root_of([part.path]) if root is None else root
        self.offset, self.lines = 0, 0
        self.compression = self.about = ""
        self.unit = "lines"

    def all(
        self, plain: bool = False, opened: Callable[[], Any] | None = None
    ) -> Iterator[Arrival]:
        """Yields the lines of the file; `opened` opens it if it is part of an archive."""
        try:
            with opened() if opened else _raw(self.part.path) as file:
                yield from self.arrivals(file, plain)
        except Exception as error:  # each filesystem and each compression raises its own errors
            yield self.broken(error)

    def arrivals(self, file: Any, plain: bool) -> Iterator[Arrival]:
        path = self.part.path
        stream = io.BufferedReader(file, _HEAD)
        head = stream.peek(_HEAD)
        self.compression = _compression(head)
        ending = COMPRESSIONS.get(path.rpartition(".")[2].lower())
        if ending and not self.compression and head and not head.lstrip().startswith(b"{"):
            yield self.fault(CORRUPT, f"{path} is not {ending}, although its name says so")
            return
        if self.compression:
            stream = _decompressed(stream, self.compression)
            head = stream.peek(_HEAD)
        encoding = _encoding(head)
        text = _decoded(head, encoding)
        is_json = text.lstrip().startswith((b"{", b"["))
        if encoding and not is_json and kind_of(text, path) not in READ_WHOLE:
            encoding = ""
        is_lines = plain or self.part.start or not file.seekable()
        kind = LINES if is_lines else self._kind(_decoded(head, encoding))
        if kind in _HINTS:
            yield self.fault(WRONG, f"{path} is {_HINTS[kind]}")
        elif kind == "zip":
            yield from self.of_archive(stream)
        elif kind in READ_WHOLE:
            if encoding:
                stream = io.BufferedReader(_Recoded(stream, encoding), BLOCK)
            yield from self.of_format(stream, kind)
        elif kind == JSON and (found := self.values(stream, encoding)) is not None:
            yield from found
        else:
            if encoding:
                stream = io.BufferedReader(_Recoded(stream, encoding), BLOCK)
            yield from self.of_lines(stream, seekable=not (encoding or self.compression))

    def _kind(self, head: bytes) -> str:
        """Returns the kind of the file: from `--input_format`, or recognised by its beginning."""
        kind = kind_of(head, self.part.path)
        if self.customs.format in READ_WHOLE and kind != "zip":
            return self.customs.format
        if self.customs.format == OURS and kind not in (JSON, "zip"):
            return LINES
        return kind

    def of_archive(self, stream: Any) -> Iterator[Arrival]:
        """Yields the lines of each file in an archive, except hidden ones."""
        path = self.part.path
        with zipfile.ZipFile(stream) as archive:
            members = [one for one in archive.infolist() if not _HIDDEN.search(one.filename)]
            names = [one.filename for one in members]
            if slack.fits(names) or self.customs.format == "slack":
                self.about = slack.TITLE
                if self.only_check:
                    return
                yield from self._ours(slack.read(archive), "slack", "message")
                return
            faults: list[Arrival] = []
            wanted = {*convokit.without_beside(names)}
            for member in members:  # two of them may have the same name
                if (name := member.filename) not in wanted:
                    continue
                if _MEDIA.search(name):
                    if not self.only_check:
                        metrics.count("input/attachments")
                    continue
                within = Range(f"{path}/{name}")
                beside = functools.partial(_open_member, archive, name.rpartition("/")[0])
                inner = _Reader(within, self.most, self.customs, self.only_check, beside, self.root)
                for arrival in inner.all(opened=functools.partial(archive.open, member)):
                    fault = arrival.fault
                    found = arrival._replace(fault=fault and fault._replace(part=self.part))
                    if self.only_check and fault and fault.reason in OF_FILES:
                        faults.append(found)
                        break
                    yield found
                self.about = self.about or inner.about
            if self.only_check and faults and not self.about:
                yield faults[0]

    def of_format(self, stream: Any, kind: str) -> Iterator[Arrival]:
        """Yields the chats of a table, a WhatsApp chat or a corpus."""
        if kind == "whatsapp":
            self.about = whatsapp.TITLE
            if self.only_check:
                return
            lines = io.TextIOWrapper(stream, "utf-8-sig", WINDOWS, newline="\n")
            chats = enumerate(whatsapp.read(lines, self._name), 1)
            yield from self._ours(chats, "whatsapp", "chat")
            return
        if kind == "convokit":
            self.about = convokit.TITLE
            if not self.only_check:
                yield from self.of_corpus(stream)
            return
        try:
            if kind == "csv":
                header, rows = tables.csv_rows(stream)
            else:
                header, rows = tables.parquet_rows(stream)
            columns = tables.columns_of(header, self.customs.columns)
        except UsageError as error:
            yield self.fault(WRONG, f"{self.part.path}: {error}")
            return
        self.about = f"a table; its columns are read as --columns='{columns}'"
        if not self.only_check:
            yield from self._ours(tables.chats_in(header, rows, columns), kind, "row")

    def of_corpus(self, stream: Any) -> Iterator[Arrival]:
        """Yields the conversations of a corpus, composed of its utterances."""
        plain = _Reader(self.part, self.most, Customs(format=OURS))
        found = None
        if stream.peek(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            found = plain.values(stream, "")
        faults: list[Arrival] = []

        def lines() -> Iterator[tuple[int, bytes]]:
            try:
                for arrival in found or plain.of_lines(stream, seekable=False):
                    if arrival.fault:
                        faults.append(arrival)
                    else:
                        yield arrival.number, arrival.line
            except Exception as error:  # keep what was read before it
                faults.append(plain.broken(error))

        yield from self._ours(convokit.read(lines(), self._beside), "convokit", "utterance")
        yield from faults

    def _beside(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yields the names and values of the object in another file of the folder, if it exists."""
        if (opened := self.open_beside(name)) is not None:
            with opened as file:
                yield from pairs(_pieces(file), self.most)

    def _open_beside(self, name: str) -> Any:
        path = f"{self.part.path.removesuffix(self.part.path.rpartition('/')[2])}{name}"
        return _raw(path) if FileSystems.exists(path) else None

    @property
    def _name(self) -> str:
        """Returns the path of the file in `root` without endings.

        For a file `_chat` in an archive, it is the path of the archive.
        """
        path = self.part.path
        if path.startswith(f"{self.root}/"):
            path = path[len(self.root) + 1 :]
        elif self.root:
            path = path.rpartition("/")[2]
        if name_in(path) == "_chat":
            folder = path.rpartition("/")[0] or self.root.rpartition("/")[2]
            path = folder if folder.endswith(".zip") else path
        return "/".join(map(name_in, path.split("/")))

    def _ours(self, chats: Iterator[tuple[int, Any]], kind: str, unit: str) -> Iterator[Arrival]:
        for number, value in chats:
            if isinstance(value, bytes) or value["chat_id"] is not None:
                metrics.count(f"formats/{kind}")
            source = f"{self.part.path}, {unit} {number}"
            line = value if isinstance(value, bytes) else as_line(value)
            yield Arrival(line, source=source, number=number)

    def each(self, text: bytes, source: str, number: int, name: str) -> Iterator[Arrival]:
        """Yields a line, or a line for each of the chats that an object of another format holds."""
        if b'"chat_id"' not in text and self.customs.format != OURS:
            with contextlib.suppress(Exception):  # the parser says what is wrong with this line
                value = json.loads(text)
                found = as_ours(value, "", self.customs.format) if isinstance(value, dict) else None
                if found is not None and len(found.values) > 1:
                    if not self.only_check:
                        metrics.count(f"formats/{found.format}", len(found.values))
                    for one in found.values:
                        yield Arrival(as_line(one), source=source, number=number)
                    return
        yield Arrival(text, source=source, number=number, name=name)

    def of_lines(self, stream: Any, seekable: bool) -> Iterator[Arrival]:
        """Yields lines; keeps only a block of a line in memory if the line is too long."""
        path, start, end = self.part
        if start:
            before = start - 1
            if seekable:
                stream.seek(before)
            else:
                _skip(stream, before)
            self.offset = before + _to_line_end(stream)
        while end is None or self.offset < end:
            line = stream.readline(min(self.most + 2, LARGEST_INTEGER))
            if not line:
                return
            at, length = self.offset, len(line)
            if length > self.most + 1 and not line.endswith(b"\n"):
                length += _to_line_end(stream)
            self.offset += length
            text = line.rstrip(b"\r\n")
            if len(text) > self.most:
                whole = Range(path, at, at + length)
                message = f"{path}: a line has {length} bytes, more than "
                message += f"--max_line_bytes={self.most}"
                yield Arrival(b"", fault=Fault("line_too_long", message, whole))
            elif text.removeprefix(codecs.BOM_UTF8).strip():
                number = 0 if start else self.lines + 1
                source = f"{path}, line {number}" if number else f"{path}, byte {at}"
                name = ""
                if number == 1 and _ONE_OBJECT.search(path):
                    source, name = path, self._name
                yield from self.each(text, source, number, name)
            self.lines += 1

    def values(self, stream: Any, encoding: str) -> Iterator[Arrival] | None:
        """Returns the elements of a JSON array, or objects over several lines, as lines.

        Returns None if the file is not JSON after all, with the stream back at its start.
        """
        found = elements(_pieces(stream, encoding), self.most)
        try:
            first = next(found, None)
        except (ValueError, EOFError):
            stream.seek(0)
            return None
        return iter(()) if first is None else self._elements(first, found)

    def _elements(self, first: Element, others: Iterator[Element]) -> Iterator[Arrival]:
        path, self.unit = self.part.path, "elements"
        try:
            second, problem = next(others, None), None
        except (ValueError, EOFError) as error:
            second, problem = None, error
        alone = second is None and problem is None
        for one in itertools.chain([first], [second] if second else [], others):
            self.lines += 1
            source = path if alone else f"{path}, element {self.lines}"
            if one.is_deep:
                fault = Fault("too_deep", f"{source} is nested too deeply", self.part)
                yield Arrival(b"", fault=fault)
            elif one.length > self.most:
                message = f"{source} has {one.length} characters, more than --max_line_bytes="
                fault = Fault("line_too_long", f"{message}{self.most}", self.part)
                yield Arrival(b"", fault=fault)
            else:
                name = self._name if alone else ""
                yield from self.each(as_line(one.value), source, self.lines, name)
        if problem is not None:
            raise problem

    def broken(self, error: Exception) -> Arrival:
        path = self.part.path
        if isinstance(error, EOFError):
            return self.fault(TRUNCATED, f"{path} ends too early, as after a broken download")
        if isinstance(error, _DAMAGE) or (self.compression and isinstance(error, OSError)):
            return self.fault(CORRUPT, f"{path} is damaged: {one_line(error)}")
        if isinstance(error, json.JSONDecodeError):
            return self.fault(CORRUPT, f"{path} is not JSON: {error.msg}")
        said = getattr(error, "strerror", None) or one_line(error)
        return self.fault(UNREADABLE, f"{path} cannot be read: {said}")

    def fault(self, reason: str, message: str) -> Arrival:
        if self.lines:
            message += f"; {self.lines} {self.unit} of it were read"
        rest = Range(self.part.path, max(self.offset, self.part.start), self.part.end)
        return Arrival(b"", fault=Fault(reason, message, rest))


def _pieces(stream: Any, encoding: str = "") -> Iterator[str]:
    """Yields the text of a stream, a block at a time."""
    blocks = iter(functools.partial(stream.read, BLOCK), b"")
    return codecs.iterdecode(blocks, encoding or "utf-8-sig", "replace" if encoding else WINDOWS)


def _open_member(archive: zipfile.ZipFile, folder: str, name: str) -> Any:
    path = f"{folder}/{name}" if folder else name
    return archive.open(path) if path in archive.namelist() else None


def _raw(path: str) -> Any:
    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


_MAGIC = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bzip2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|(?P<xz>\xfd7zXZ\0)"
)


def _compression(head: bytes) -> str:
    found = _MAGIC.match(head)
    return str(found.lastgroup) if found else ""


def _decompressed(file: Any, compression: str) -> Any:
    if not compression:
        return file
    opened: Any = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[compression]
    raw = opened(fileobj=file) if compression == "gzip" else opened(file)
    return io.BufferedReader(_Available(raw), BLOCK)


class _Available(io.RawIOBase):
    """Returns the bytes that were decompressed before a fault; the files' own `read` loses them."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._file.read1(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _encoding(head: bytes) -> str:
    """Returns UTF-16 or UTF-32, recognised by their mark or by zeros between ASCII; else ""."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    start = head[:200]
    if len(start) >= 8 and start[0::2].isascii() and not any(start[1::2]):
        return "utf-16-le"
    if len(start) >= 8 and start[1::2].isascii() and not any(start[0::2]):
        return "utf-16-be"
    return ""


def _decoded(head: bytes, encoding: str) -> bytes:
    return head.decode(encoding, "ignore").encode() if encoding else head


LINES, JSON = "lines", "json"
_HINTS = {
    "zstd": "compressed with zstd; unpack it with `zstd -d`",
    "7z": "a 7z archive; unpack it",
    "sqlite": "a SQLite database; write its rows as JSON, one per line",
    "pdf": "a PDF",
    "html": "a page in HTML or XML; JSON is needed, one object per line",
    "binary": "not text; JSON is needed, one object per line",
}
READ_WHOLE = ("csv", "parquet", "whatsapp", "convokit")
_BEGINNINGS = (
    (b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"7z\xbc\xaf", "7z"),
    (b"PAR1", "parquet"), (b"SQLite format 3", "sqlite"), (b"%PDF", "pdf"),
)  # fmt: skip


_TABLE = re.compile(rf"\.[ct]sv{COMPRESSED}$", re.IGNORECASE)


def kind_of(head: bytes, path: str = "") -> str:
    """Returns `LINES`, `JSON` (an array, or objects over several lines), or another kind of file.

    The kind is recognised by the beginning of the file; tables with few columns also by the name.
    """
    for magic, name in _BEGINNINGS:
        if head.startswith(magic):
            return name
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    if not lines:
        return LINES
    is_named_table = _TABLE.search(path) and not lines[0].lstrip().startswith((b"{", b"["))
    if is_named_table and head[:1000].count(0) <= 3 and _is_table(head, sure=True):
        return "csv"  # also if a cell of several lines holds an object
    objects = (found for found in map(_object, lines[:100]) if found is not None)
    if (first_object := next(objects, None)) is not None:
        return "convokit" if convokit.fits(first_object) else LINES
    if head[:1000].count(0) > 3:
        return "binary"
    if whatsapp.fits(b"\n".join(lines[:20]).decode("utf-8", "replace")):
        return "whatsapp"
    first = lines[0].strip()
    second = lines[1].strip() if len(lines) > 1 else b""
    if first.startswith(b"["):
        with contextlib.suppress(ValueError, EOFError):
            text = head.decode("utf-8-sig", "replace")
            if convokit.fits(next(elements(iter([text]), len(text))).value):
                return "convokit"
        return JSON
    if first.startswith(b"{"):
        return JSON if second and second[:1] in b'"}' else LINES
    if re.match(rb"<(!doctype|html|\?xml)", first, re.IGNORECASE):
        return "html"
    if _is_table(head, sure=bool(_TABLE.search(path))):
        return "csv"
    return LINES


def _is_table(head: bytes, sure: bool) -> bool:
    """Returns whether a file begins like a CSV table; `sure` means that its name says so."""
    text = head.decode("latin-1").lstrip("\ufeff\r\n ")
    first = text.splitlines()[0]
    mark = max(tables.DELIMITERS, key=first.count)
    if sure:
        return mark in first
    with contextlib.suppress(csv.Error):
        rows = [*itertools.islice(csv.reader(io.StringIO(text, ""), delimiter=mark), 2)]
        return len(rows) == 2 and len(rows[0]) == len(rows[1]) > 2
    return False


def _object(line: bytes) -> dict[str, Any] | None:
    """Returns the object that a line contains; None if it is not one."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line) if line.lstrip().startswith(b"{") else None
        return found if isinstance(found, dict) else None
    return None


def _skip(stream: Any, count: int) -> None:
    while count and (block := stream.read(min(count, BLOCK))):
        count -= len(block)


def _to_line_end(stream: Any) -> int:
    """Skips the rest of a line and returns its number of bytes."""
    skipped = 0
    while block := stream.readline(BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


class _Recoded(io.RawIOBase):
    """Reads a stream in another encoding as UTF-8; replaces what cannot be decoded."""

    def __init__(self, stream: IO[bytes], encoding: str):
        self._stream, self._left = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = self._stream.read(_HEAD)
            self._left = self._decoder.decode(block, not block).encode("utf-8", "replace")
            if not block:
                break
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
