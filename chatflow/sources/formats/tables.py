"""Reads tables of messages in CSV and Parquet: one row per message, in any order.

Rows wait in a SQLite file on disk until the table is read. Then they leave it chat by chat, so that
the longest chat bounds the memory.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import IO, Any, NamedTuple

from chatflow.errors import UsageError
from chatflow.sources.formats.common import WINDOWS, Ours, as_line, pairs_of, without_none
from chatflow.sources.privacy import FALSE, TRUE, is_private, may_mark, tells_privacy

FIELDS = {
    "chat": "chat_id conversation_id conversation ticket_id ticket session_id thread_id case_id "
    "dialogue_id dialog_id contact_id chat chatid interaction_id",
    "text": "text body message content utterance comment plain_body message_text msg message_body",
    "who": "role author_role sender_role author_type sender_type inbound direction speaker_role "
    "speaker participant_role sender_kind user_type",
    "user": "user_id author_id sender_id author sender from name username from_name user",
    "at": "created_at sent_at timestamp time date datetime created created_time sent",
    "id": "message_id comment_id utterance_id tweet_id msg_id event_id id",
    "reply": "in_response_to_tweet_id reply_to in_reply_to parent_id",
}
"""The usual column names for each field, the surest first."""

REQUIRED = ("chat", "text")
PRIVATE = "private"
"""Another field for `--columns`: the column that marks notes that are only for staff."""

DELIMITERS = ",;\t|"

LONGEST_CELL = 16 << 20
_LONGEST_ATTRIBUTE = 200
_MOST_SEEN = 100_000
"""The most chats to keep in memory in order to store the attributes of each only once."""


class Row(NamedTuple):
    """A row; `number` counts from 1 without the header, `error` says what is wrong with it."""

    number: int
    cells: Mapping[str, Any]
    error: str = ""


class Columns(NamedTuple):
    """The name of the table's column for each of our `FIELDS`, if it has one."""

    names: Mapping[str, str]

    def __str__(self) -> str:
        return ",".join(f"{ours}={theirs}" for ours, theirs in self.names.items())


def columns_of(header: Sequence[str], given: Mapping[str, str]) -> Columns:
    """Returns the columns of our fields: those given, and those with unambiguous names.

    Raises `UsageError` if a given column is missing, or if it is not clear which column holds the
    chat's id or the text.
    """
    listed = ", ".join(header)
    for ours, theirs in given.items():
        if theirs not in header:
            raise UsageError(
                f"--columns: there is no column {theirs!r} for {ours}; there are {listed}"
            )
    found = dict(given)
    for ours, known in FIELDS.items():
        near = [name for name in header if _plain(name) in known.split()]
        near = [name for name in near if name not in found.values()]
        if ours in found or not near:
            continue
        if len(near) > 1 and ours in REQUIRED:
            raise UsageError(
                f"several columns may be the {ours}: {', '.join(near)}; say which, e.g. "
                f"--columns={ours}={near[0]}"
            )
        found[ours] = min(near, key=lambda name: known.split().index(_plain(name)))
    if "chat" not in found and {"reply", "id"} <= found.keys():
        needed = ["text"]
    else:
        needed = [*REQUIRED]
        found.pop("reply", None)
    if missing := [ours for ours in needed if ours not in found]:
        example = ",".join(f"{ours}=COLUMN" for ours in missing)
        raise UsageError(
            f"it is not clear which column is the {' and the '.join(missing)}: there are {listed}; "
            f"say which, e.g. --columns={example}"
        )
    return Columns({ours: found[ours] for ours in (*FIELDS, PRIVATE) if ours in found})


@functools.lru_cache(maxsize=1000)
def _plain(name: str) -> str:
    """Returns a column's name as in `FIELDS`: "Ticket ID" and "ticketId" become ticket_id."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip().lstrip("\ufeff"))
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


def given_columns(flag: str) -> dict[str, str]:
    """Reads `--columns`; raises `UsageError`."""
    return dict(pairs_of("--columns", flag, "FIELD=COLUMN", (*FIELDS, PRIVATE)))


def csv_rows(stream: IO[bytes]) -> tuple[list[str], Iterator[Row]]:
    """Returns the header of a CSV table and its rows; the header shows the delimiter."""
    csv.field_size_limit(LONGEST_CELL)
    text = io.TextIOWrapper(stream, "utf-8-sig", WINDOWS, newline="")
    first = text.readline()
    while first and (not first.strip() or first.startswith("sep=")):  # Excel's line about it
        first = text.readline()
    delimiter = max(DELIMITERS, key=first.count)
    taken: list[str] = []  # the lines of the row that is being read

    def lines() -> Iterator[str]:
        for line in itertools.chain([first], text):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]

    def rows() -> Iterator[Row]:
        width = len(header)
        number = 0
        while True:
            taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as wrong:  # a cell that is too long; the reader begins anew
                number += 1
                yield Row(number, {"line": "".join(taken)[:1000]}, str(wrong))
                continue
            if not cells:
                continue
            number += 1
            while len(cells) > width and not cells[-1]:  # the row ends with a delimiter
                cells.pop()
            row: dict[str, Any] = dict(zip(header, cells, strict=False))
            error = ""
            if len(cells) != width:
                error = f"{len(cells)} cells under {width} columns"
                row |= {f"cell {at}": cells[at - 1] for at in range(width + 1, len(cells) + 1)}
            row.pop("", None)  # an index column without a name
            if len(taken) > 1 and _is_open(taken, delimiter):
                error = "a quotation mark has no end, so this row holds all lines after it"
            yield Row(number, row, error)

    return [name for name in header if name], rows()


def _is_open(lines: Sequence[str], delimiter: str) -> bool:
    """Returns whether the lines of a row end within quotation marks, as only the last one can."""
    if "".join(lines).count('"') % 2 == 0:
        return False
    try:
        return not [*csv.reader(lines, delimiter=delimiter, strict=True)]
    except csv.Error as error:
        return "unexpected end" in str(error)


def parquet_rows(file: Any) -> tuple[list[str], Iterator[Row]]:
    """Returns the column names of a Parquet table and its rows; raises pyarrow's errors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.PythonFile(file, mode="r"))

    def rows() -> Iterator[Row]:
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            # Python has no nanoseconds.
            kinds = [pa.timestamp("us", f.type.tz) if pa.types.is_timestamp(f.type) else f.type
                     for f in batch.schema]  # fmt: skip
            shown = pa.schema(list(zip(batch.schema.names, kinds, strict=True)))
            for cells in pa.Table.from_batches([batch]).cast(shown, safe=False).to_pylist():
                number += 1
                yield Row(number, cells)

    return table.schema_arrow.names, rows()


def chats_in(
    header: Sequence[str], rows: Iterable[Row], columns: Columns
) -> Iterator[tuple[int, Ours | bytes]]:
    """Yields the chats of a table as lines, each with the number of its first row.

    A row without a chat's id, or with too many or too few cells, is yielded unchanged, at once, so
    that it becomes a dead letter.
    """
    table = _Table(columns, header)
    fault: Exception | None = None
    with grouping() as groups:
        try:
            for number, cells, error in rows:
                key = _id(cells, table.chat)
                if key is None or error:
                    said = error or f"there is no {table.chat}"
                    yield number, {"chat_id": None, "row": _as_json(cells), "error": said}
                    continue
                parent = _id(cells, table.reply)
                groups.add(number, str(key), table.message(cells), table.others(cells),
                           str(parent or ""))  # fmt: skip
        except Exception as error:  # the rows before it are still yielded
            fault = error
        yield from groups.lines()
    if fault is not None:
        raise fault


class _Table:
    """Knows which column holds which field."""

    def __init__(self, columns: Columns, header: Sequence[str]):
        names = columns.names
        self.chat, self.reply = names.get("chat") or names["id"], names.get("reply")
        self.text, self.who, self.user = names["text"], names.get("who"), names.get("user")
        self.at, self.id, self.private = names.get("at"), names.get("id"), names.get(PRIVATE)
        self._inbound = _plain(self.who or "") == "inbound"
        self._marks = [name for name in header if may_mark(name) and name != self.who]
        taken = {*names.values()}
        self._others = [name for name in header if name not in taken and not tells_privacy(name)]

    def message(self, cells: Mapping[str, Any]) -> Ours:
        role = _cell(cells, self.who)
        if self._inbound and role is not None:
            word = str(role).strip().casefold()
            role = "customer" if word in TRUE else "agent" if word in FALSE else role
        user = _id(cells, self.user)
        if self.who is None and self.user is None:
            role = "customer"  # a table of customers' texts without their authors
        found = {
            "message_id": _id(cells, self.id),
            "user_id": user if user is not None else role,
            "role": role,
            "text": _cell(cells, self.text) or "",
            "sent_at": _time(_cell(cells, self.at)),
        }
        marks = {name: cells.get(name) for name in self._marks}
        if self.private is not None:
            mark = cells.get(self.private)
            marks |= {"private": mark, "visibility": mark}
        found["private"] = True if marks and is_private(marks) else None
        return without_none(**found)

    def others(self, cells: Mapping[str, Any]) -> dict[str, str]:
        """Returns the other cells as attributes of the chat."""
        found = {}
        for name in self._others:
            value = _cell(cells, name) if isinstance(cells.get(name), bytes) else cells.get(name)
            if value is not None and not isinstance(value, (list, dict)):
                text = value if isinstance(value, str) else str(value)
                if 0 < len(text) <= _LONGEST_ATTRIBUTE:
                    found[name] = text
        return found


def _id(cells: Mapping[str, Any], name: str | None) -> Any:
    """Returns an id; 3.0, which is a whole number in a column with gaps, becomes 3."""
    value = _cell(cells, name)
    if isinstance(value, str) and value.endswith(".0") and value[:-2].isdecimal():
        return value[:-2]
    return value


def _cell(cells: Mapping[str, Any], name: str | None) -> Any:
    value = cells.get(name) if name is not None else None
    if isinstance(value, bytes):  # a text of Parquet whose type does not say so
        value = value.decode("utf-8", WINDOWS)
    if isinstance(value, str):
        return value or None
    if isinstance(value, float) and value.is_integer():  # from a column with gaps
        value = int(value)
    return None if value != value else value  # NaN


def _time(value: Any) -> Any:
    """Returns a time in a form that `sources.chats.time` reads."""
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, str) and value[:1].isalpha():
        with contextlib.suppress(ValueError):  # Twitter's "Tue Oct 31 22:08:27 +0000 2017"
            return datetime.strptime(value, "%a %b %d %H:%M:%S %z %Y").isoformat()
    return value


def _as_json(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as JSON can hold it."""
    known = (str, int, bool, type(None))
    return {key: v if isinstance(v, known) else str(v) for key, v in cells.items() if key}


def whole_text(text: str) -> str:
    """Returns a text that can be encoded: half a pair of surrogates becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class Groups:
    """Collects messages and yields them chat by chat, in the order of their first messages."""

    def __init__(self, path: str):
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;"
            "CREATE TABLE rows (n INTEGER, chat TEXT, parent TEXT, message BLOB, others BLOB);"
            "CREATE TABLE notes (kind TEXT, id TEXT, note BLOB, PRIMARY KEY (kind, id));"
        )
        self._waiting: list[tuple[int, str, str, bytes, bytes | None]] = []
        self._seen: set[str] = set()
        self._threads = False

    def add(
        self, number: int, chat: str, message: Ours, others: Mapping[str, str], parent: str = ""
    ) -> None:
        """Adds a message; with a `parent`, it belongs to the chat of that message.

        `others` are attributes of the chat; only those of its first message are used.
        """
        self._threads |= bool(parent)
        chat, parent = whole_text(chat), whole_text(parent)
        known = chat in self._seen
        self._waiting.append(
            (number, chat, parent, as_line(message), None if known else as_line(others))
        )
        if not known:
            self._seen.add(chat)
        if len(self._waiting) >= 1000:
            self._flush()

    def note(self, kind: str, key: str, note: Mapping[str, str]) -> None:
        """Stores what else is known, e.g. about a speaker; `noted` returns it."""
        if note:
            values = (kind, whole_text(key), as_line(note))
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", values)

    def noted(self, kind: str, key: str) -> dict[str, str]:
        query = "SELECT note FROM notes WHERE kind = ? AND id = ?"
        found = self._db.execute(query, (kind, whole_text(key))).fetchone()
        return json.loads(found[0]) if found else {}

    def _flush(self) -> None:
        self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", self._waiting)
        self._waiting.clear()
        if len(self._seen) > _MOST_SEEN:
            self._seen.clear()

    def chats(self) -> Iterator[tuple[int, Ours]]:
        """Yields each chat with the number of its first message."""
        for first, key, messages, others in self._grouped():
            read = [json.loads(message) for message in messages]
            yield first, {"chat_id": key, "messages": read, "attributes": json.loads(others)}

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields each chat as a line of JSON with the number of its first message."""
        for first, key, messages, others in self._grouped():
            listed = b", ".join(messages)
            yield (
                first,
                (
                    b'{"chat_id": %s, "messages": [%s], "attributes": %s}'
                    % (as_line(key), listed, others)
                ),
            )

    def _grouped(self) -> Iterator[tuple[int, str, list[bytes], bytes]]:
        self._flush()
        if self._threads:
            self._to_roots()
        self._db.execute("CREATE INDEX of_chat ON rows (chat, n)")
        firsts = "SELECT min(n), chat FROM rows GROUP BY chat ORDER BY 1"
        of_chat = "SELECT message, others FROM rows WHERE chat = ? ORDER BY n"
        for first, chat in self._db.execute(firsts):  # only ids, because sorting messages is slow
            rows = self._db.execute(of_chat, (chat,)).fetchall()
            yield first, chat, [message for message, _ in rows], rows[0][1]

    def _to_roots(self) -> None:
        """Gives each message the id of the first message of its thread.

        Each round doubles the distance between a message and the id that it has, so that few rounds
        are enough.
        """
        self._db.executescript(
            "CREATE TABLE links AS SELECT chat AS id, parent AS up FROM rows;"
            "CREATE INDEX by_id ON links (id);"
            "DELETE FROM links WHERE up = '' OR up NOT IN (SELECT chat FROM rows);"
        )
        for _ in range(40):  # more than any thread needs; a cycle stays as it is
            moved = self._db.execute(
                "UPDATE links SET up = (SELECT l.up FROM links l WHERE l.id = links.up) "
                "WHERE up IN (SELECT id FROM links) AND up != id"
            ).rowcount
            if not moved:
                break
        self._db.execute(
            "UPDATE rows SET chat = coalesce((SELECT up FROM links WHERE id = rows.chat), chat)"
        )

    def close(self) -> None:
        self._db.close()


@contextlib.contextmanager
def grouping() -> Iterator[Groups]:
    """Yields `Groups` on disk, and removes them afterwards."""
    with tempfile.TemporaryDirectory(prefix="chatflow-rows-") as folder:
        groups = Groups(f"{folder}/rows.db")
        try:
            yield groups
        finally:
            groups.close()
