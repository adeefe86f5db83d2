"""`chatflow export`: writes a database's conversations as a table, or as CX Insights JSON."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from chatflow.errors import UsageError
from chatflow.options import Parser

if TYPE_CHECKING:
    from chatflow.database.conversations import Conversation
    from chatflow.records import Chat

DESCRIPTION = """
Writes the conversations of a database (chatflow run --database=…): one row for each customer of
each chat, with the newest analysis, draft, decision and reply. The ending of the file's name sets
the format: .csv (for spreadsheets), .parquet or .jsonl. With --format=cx_insights, a folder gets
one JSON file per chat, with its messages, which Google's CX Insights can import.

  chatflow export sqlite:///chatflow.db conversations.csv --since 2026-03-01 --sentiment angry
"""

PASSES_FLAGS_ON = False

CX_INSIGHTS = "cx_insights"

TONES = {"angry": -1, "neutral": 0, "happy": 1}

MOST_ATTRIBUTES = 50
"""How many attributes of chats have their own columns: the most frequent ones."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "database", metavar="DATABASE", help="sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="the file to write, local or gs://: NAME.csv, NAME.parquet or NAME.jsonl; a folder "
        "for cx_insights",
    )
    parser.add_argument(
        "--format",
        choices=("auto", CX_INSIGHTS),
        default="auto",
        help="auto: by the ending of PATH (default: %(default)s)",
    )
    parser.add_argument(
        "--since",
        type=_time,
        help="only chats whose last message was sent then or later, e.g. 2026-03-01 (UTC)",
    )
    parser.add_argument(
        "--until", type=_time, help="only chats whose last message was sent before then"
    )
    parser.add_argument(
        "--sentiment",
        type=_tones,
        default=[],
        help="only customers with this tone: angry, neutral, happy; separate several with commas",
    )
    parser.add_argument(
        "--database_password",
        default="",
        help="where its password is: env:NAME, file:PATH or projects/P/secrets/S/versions/V",
    )
    parser.add_argument("--summary", choices=("table", "json"), default="table")


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"must be a date or a time, e.g. 2026-03-01 or 2026-03-01T10:00:00Z; found {text!r}"
        ) from None


def _tones(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in TONES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(TONES)}; found {word!r}")
    return [TONES[word] for word in words]


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the file or files; prints what it wrote; returns the exit code.

    Raises:
      UsageError: the database does not exist, or the output cannot be written.
    """
    from rich.console import Console

    from chatflow.database.connections import Database, check_there, password_at
    from chatflow.database.conversations import conversations, snapshot
    from chatflow.running.runner import quieten
    from chatflow.sinks.files import check_writable

    quieten(local=True)
    as_table = parsed.format == "auto"
    if as_table:
        _check_ending(parsed.path)
    check_there(parsed.database)
    database = Database(parsed.database, password_at(parsed.database_password))
    database.upgrade()
    folder = os.path.dirname(parsed.path) if as_table else parsed.path
    check_writable(folder or ".", "PATH")
    console = Console(stderr=True, highlight=False)
    with (
        contextlib.closing(database),
        database.read() as connection,
        console.status("exporting") as status,
    ):
        snapshot(connection)
        found = conversations(connection, parsed.since, parsed.until, parsed.sentiment)
        told = _told(found, status.update)
        if as_table:
            counts = write_table(parsed.path, told, *names_of(connection))
        else:
            counts = write_cx_insights(parsed.path, told)
    if parsed.summary == "json":
        print(json.dumps({**counts, "written": parsed.path}))
    else:
        said = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
        print(f"{parsed.path}: {said}", file=sys.stderr)
    return 0


def _check_ending(path: str) -> None:
    from chatflow.sinks.tables import WRITERS

    ending = os.path.splitext(path)[1]
    if ending.lower() not in WRITERS:
        raise UsageError(
            f"PATH: {path!r} must end in {', '.join(WRITERS)}, or be a folder, with "
            "--format=cx_insights"
        )


def _told(found: Iterable[Conversation], tell: Callable[[str], None]) -> Iterator[Conversation]:
    for number, conversation in enumerate(found, 1):
        if number % 1000 == 0:
            tell(f"exporting: {number:,} conversations")
        yield conversation


def names_of(connection: Any) -> tuple[list[str], list[str]]:
    """Returns the names of fields and attributes that have their own columns."""
    from chatflow.database.conversations import attribute_names, field_names

    return field_names(connection), attribute_names(connection, MOST_ATTRIBUTES)


def write_table(
    path: str, found: Iterable[Conversation], fields: Sequence[str], attributes: Sequence[str]
) -> dict[str, int]:
    """Writes a row per conversation; returns the number of rows and chats."""
    from chatflow.sinks.files import whole_file
    from chatflow.sinks.tables import writer_of

    counts = {"rows": 0, "chats": 0}
    last = None
    with whole_file(path) as file:
        writer = writer_of(path)(file, columns_of(fields, attributes))
        for conversation in found:
            writer.write(row_of(conversation, fields, attributes))
            counts["rows"] += 1
            counts["chats"] += conversation.chat_id != last
            last = conversation.chat_id
        writer.close()
    return counts


def columns_of(fields: Sequence[str], attributes: Sequence[str]) -> dict[str, str]:
    """Returns the columns of the table, in their order, with their types."""
    text, time = "STRING", "TIMESTAMP"
    return {
        "chat_id": text,
        "user_id": text,
        "first_message_at": time,
        "last_message_at": time,
        "messages": "INTEGER",
        "first_response_seconds": "FLOAT",
        **{f"attribute.{name}": text for name in attributes},
        "attributes": text,  # the others, as JSON
        "tone": text,
        "sentiment": "INTEGER",
        "confidence": "FLOAT",
        "summary": text,
        "quotations": text,
        **{f"field.{name}": text for name in fields},
        **{f"confidence.{name}": "FLOAT" for name in fields},
        "language": text,
        "draft": text,
        "draft_flag": text,
        "grievances": text,
        "draft_status": text,
        "draft_revision": "INTEGER",
        "draft_model": text,
        "decided_by": text,
        "decided_at": time,
        "reason": text,
        "comment": text,
        "reply": text,
        "replied_at": time,
        "model": text,
        "prompt_version": text,
        "revision": "INTEGER",
        "analysed_at": time,
        "analysis_id": text,
        "draft_id": text,
        "transcript": text,
    }


def row_of(found: Conversation, fields: Sequence[str], attributes: Sequence[str]) -> dict[str, Any]:
    """Returns the cells of a conversation."""
    from chatflow.database.tables import APPROVED
    from chatflow.records import Analysis
    from chatflow.sinks.tables import Layout, cell

    row: dict[str, Any] = {}
    if found.analysis is not None:
        row |= Layout(Analysis, tuple(fields)).row(found.analysis)
        row["tone"] = found.analysis.sentiment.name.lower()
    if found.chat is not None:
        row |= _of_chat(found.chat, found.user_id, attributes)
    if draft := found.draft:
        approved = draft["status"] == APPROVED
        row |= {
            "draft": draft["text"],
            "draft_flag": draft["flag"],
            "grievances": tuple(draft["grievances"] or ()),
            "draft_status": draft["status"],
            "draft_revision": draft["revision"],
            "draft_model": draft["model"],
            "reply": (draft["edited_text"] or draft["text"]) if approved else None,
            "replied_at": found.replied_at,
        }
        row |= {
            name: draft[name]
            for name in ("decided_by", "decided_at", "reason", "comment", "draft_id")
        }
    row |= {"chat_id": found.chat_id, "user_id": found.user_id}
    return {name: cell(value) for name, value in row.items()}


def _of_chat(chat: Chat, user_id: str | None, attributes: Sequence[str]) -> dict[str, Any]:
    times = [message.sent_at for message in chat.messages if message.sent_at]
    others = {name: text for name, text in chat.attributes.items() if name not in attributes}
    return {
        "first_message_at": min(times, default=None),
        "last_message_at": max(times, default=None),
        "messages": len(chat.said),
        "first_response_seconds": _first_response(chat, user_id),
        **{f"attribute.{name}": chat.attributes.get(name) for name in attributes},
        "attributes": others,
        "transcript": "\n".join(f"{m.role or m.user_id}: {m.text}" for m in chat.said),
    }


def _first_response(chat: Chat, user_id: str | None) -> float | None:
    """Returns the seconds from a customer's first message to an agent's next, if known."""
    after = itertools.dropwhile(lambda message: message.user_id != user_id, chat.said)
    first = next(after, None)
    answer = next((message for message in after if message.role == "agent"), None)
    if first is None or answer is None or not first.sent_at or not answer.sent_at:
        return None
    return (answer.sent_at - first.sent_at).total_seconds()


def write_cx_insights(folder: str, found: Iterable[Conversation]) -> dict[str, int]:
    """Writes a file per chat; returns how many, and how many chats have no known messages.

    Raises `UsageError` if the folder has such files already: they would stay among the new ones.
    """
    from apache_beam.io.filesystems import FileSystems

    from chatflow.sinks.files import files_under
    from chatflow.sources.formats.cx_insights import file_name, write

    there = (path for path in files_under(str(FileSystems.join(folder, ""))) if _is_json(path))
    if earlier := next(iter(sorted(there)), None):
        raise UsageError(f"PATH: {earlier} exists already; name an empty folder")
    counts = {"files": 0, "chats_without_words": 0}
    for _, of_chat in itertools.groupby(found, lambda conversation: conversation.chat_id):
        chat = next(of_chat).chat
        value: Mapping[str, Any] | None = write(chat) if chat is not None else None
        if chat is None or value is None:
            counts["chats_without_words"] += 1
            continue
        with FileSystems.create(FileSystems.join(folder, file_name(chat.chat_id))) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1).encode())
        counts["files"] += 1
    return counts


def _is_json(path: str) -> bool:
    return path.endswith(".json")
