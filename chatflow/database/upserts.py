"""Writes records as rows, one per id; newer records supersede older ones."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from enum import IntEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from chatflow.database import tables
from chatflow.records import (
    FAILED,
    Analysis,
    Chat,
    DeadLetter,
    Draft,
    RawChat,
    Record,
    now,
    record_id,
)

NAME, VALUE = 200, 300
"""The most characters of an attribute's name and value; PostgreSQL limits index entries."""


def upsert(connection: sa.Connection, records: Sequence[Record]) -> None:
    """Writes records of any kind in the connection's transaction."""
    by_kind: dict[type[Record], dict[str, Record]] = {}
    for record in records:
        of_kind = by_kind.setdefault(type(record), {})
        key = key_of(record)
        if not (isinstance(record, Chat) and _is_newer(of_kind.get(key), record)):
            of_kind[key] = record
    # All transactions lock customers, then chats, in the order of their ids, to avoid deadlocks.
    _lock_customers(connection, records)
    for kind, write in _WRITE.items():
        if found := by_kind.get(kind):
            write(connection, [found[key] for key in sorted(found)])


def key_of(record: Record) -> str:
    if isinstance(record, Chat):
        return record.chat_id
    if isinstance(record, RawChat):
        return f"{record.chat_id} {record.revision}"
    return record_id(record)


def _is_newer(known: Record | None, chat: Chat) -> bool:
    return isinstance(known, Chat) and known.revision > chat.revision


def _write_chats(connection: sa.Connection, found: Sequence[Chat]) -> None:
    rows = [
        {
            "chat_id": chat.chat_id,
            "revision": chat.revision,
            "user_id": chat.user_id,
            "messages": [m.model_dump(mode="json", exclude_none=True) for m in chat.messages],
            "attributes": chat.attributes,
            "search_text": search_text(chat),
            "last_message_at": max((m.sent_at for m in chat.messages if m.sent_at), default=None),
            "stored_at": now(),
        }
        for chat in found
    ]
    chats, attributes = tables.chats, tables.chat_attributes
    _upsert_rows(connection, chats, rows, lambda new: new.revision >= chats.c.revision)
    ids = [chat.chat_id for chat in found]
    kept = dict(
        connection.execute(
            sa.select(chats.c.chat_id, chats.c.revision).where(chats.c.chat_id.in_(ids))
        ).all()
    )
    newest = [chat for chat in found if kept.get(chat.chat_id) == chat.revision]
    of_newest = attributes.c.chat_id.in_([chat.chat_id for chat in newest])
    connection.execute(sa.delete(attributes).where(of_newest))
    _upsert_rows(
        connection,
        attributes,
        [
            {"chat_id": chat.chat_id, "name": name[:NAME], "value": value[:VALUE]}
            for chat in newest
            for name, value in sorted(chat.attributes.items())
        ],
    )


def _note_waits(connection: sa.Connection, chat_ids: Iterable[str]) -> None:
    """Notes since when customers wait whose drafts wait for review: since they last wrote.

    Chats come before their drafts. Of one that does not, the draft's own time counts.
    """
    drafts, chats = tables.drafts, tables.chats
    of_these = drafts.c.chat_id.in_(sorted(set(chat_ids))), drafts.c.status == tables.WAITING
    joined = drafts.join(chats, chats.c.chat_id == drafts.c.chat_id)
    query = sa.select(drafts.c.draft_id, drafts.c.user_id, chats.c.messages).select_from(joined)
    found = []
    for row in connection.execute(query.where(*of_these)):
        of_user = [message for message in row.messages if message["user_id"] == row.user_id]
        if times := [message["sent_at"] for message in of_user if message.get("sent_at")]:
            found.append({"key": row.draft_id, "since": max(map(datetime.fromisoformat, times))})
    if found:
        this = sa.update(drafts).where(drafts.c.draft_id == sa.bindparam("key"))
        connection.execute(this.values(waits_since=sa.bindparam("since")), found)


def _write_raw(connection: sa.Connection, found: Sequence[RawChat]) -> None:
    rows = [
        {
            **record.model_dump(include={"chat_id", "revision", "placeholders"}),
            "chat": record.chat.model_dump(mode="json", exclude_none=True),
            "stored_at": now(),
        }
        for record in found
    ]
    table = tables.raw_chats
    _upsert_rows(connection, table, rows)
    newer = table.alias("newer")
    is_old = sa.exists().where(
        newer.c.chat_id == table.c.chat_id, newer.c.revision > table.c.revision
    )
    of_these = table.c.chat_id.in_(sorted({record.chat_id for record in found}))
    # Each revision holds the ones before it.
    connection.execute(sa.update(table).where(of_these, is_old).values(chat=None))


def search_text(chat: Chat) -> str:
    """Returns the text to search: ids and messages, case-folded."""
    return "\n".join(
        [chat.chat_id, *dict.fromkeys(m.user_id for m in chat.messages)]
        + [m.text for m in chat.messages]
    ).casefold()


def _write_analyses(connection: sa.Connection, found: Sequence[Analysis]) -> None:
    _upsert_rows(connection, tables.analyses, [values_of(record) for record in found])
    supersede(connection, [record.chat_id for record in found])


def _write_drafts(connection: sa.Connection, found: Sequence[Draft]) -> None:
    rows = [{**values_of(record), "changed_at": now()} for record in found]
    known = tables.drafts.c
    waits = known.status == tables.WAITING

    def set_to(new: Any) -> dict[str, Any]:
        # A new text changes the version: people who have the old text open must look again.
        rewritten = sa.case((known.text.is_distinct_from(new.text), 1), else_=0)
        fields = {name: new[name] for name in rows[0] if name != "draft_id"}
        # A customer without a draft has waited since the first failure.
        since = sa.case((known.flag == FAILED, known.drafted_at), else_=new.drafted_at)
        return {**fields, "version": known.version + rewritten, "drafted_at": since}

    _upsert_rows(connection, tables.drafts, rows, lambda _: waits, set_to)
    supersede(connection, [record.chat_id for record in found])
    _note_waits(connection, [record.chat_id for record in found])


def _write_dead_letters(connection: sa.Connection, found: Sequence[DeadLetter]) -> None:
    rows = []
    for letter in found:
        key = record_id(letter)
        if "\0" in letter.payload:  # PostgreSQL cannot store NUL, which replay needs
            payload = base64.b64encode(letter.payload_bytes()).decode()
            letter = letter.model_copy(update={"payload": payload, "payload_encoding": "base64"})
        rows.append({"dead_letter_id": key, **values_of(letter)})
    _upsert_rows(connection, tables.dead_letters, rows)


_WRITE: dict[Any, Callable[[Any, Any], None]] = {
    Chat: _write_chats,
    RawChat: _write_raw,
    Analysis: _write_analyses,
    Draft: _write_drafts,
    DeadLetter: _write_dead_letters,
}


def _lock_customers(connection: sa.Connection, found: Iterable[Record]) -> None:
    """Writes the newest revision of the customers of analyses and drafts, which locks these rows.

    Other transactions wait for these rows. So each transaction sees what the one before it wrote,
    and their order does not change which drafts are superseded.
    """
    newest: dict[tuple[str, str], int] = {}
    for record in found:
        if isinstance(record, (Analysis, Draft)):
            key = record.chat_id, record.user_id
            newest[key] = max(newest.get(key, 0), record.revision)
    rows = [
        {"chat_id": chat_id, "user_id": user_id, "revision": newest[chat_id, user_id]}
        for chat_id, user_id in sorted(newest)
    ]
    known = tables.customers.c.revision
    _upsert_rows(
        connection,
        tables.customers,
        rows,
        set_to=lambda new: {"revision": sa.case((new.revision > known, new.revision), else_=known)},
    )


def supersede(connection: sa.Connection, chat_ids: Iterable[str]) -> None:
    """Removes drafts from the inbox if something newer exists.

    That is an analysis or draft of a newer revision. At the same revision (by another model or
    prompt), it is a draft that people have decided on or that was written later; for a failed
    draft, it is any draft that did not fail.
    """
    drafts, customers = tables.drafts, tables.customers
    other = drafts.alias("other")
    failed, other_failed = (t.c.flag.is_not_distinct_from(FAILED) for t in (drafts, other))
    is_later = sa.or_(
        other.c.drafted_at > drafts.c.drafted_at,
        sa.and_(other.c.drafted_at == drafts.c.drafted_at, other.c.draft_id > drafts.c.draft_id),
    )
    is_better = sa.case(
        (sa.and_(failed, sa.not_(other_failed)), True),
        (sa.and_(other_failed, sa.not_(failed)), False),
        else_=is_later,
    )
    is_newer = sa.exists().where(
        customers.c.chat_id == drafts.c.chat_id,
        customers.c.user_id == drafts.c.user_id,
        customers.c.revision > drafts.c.revision,
    )
    has_other = sa.exists().where(
        other.c.chat_id == drafts.c.chat_id,
        other.c.user_id == drafts.c.user_id,
        other.c.revision == drafts.c.revision,
        other.c.draft_id != drafts.c.draft_id,
        sa.or_(
            other.c.status.in_((tables.APPROVED, tables.DISMISSED)),
            sa.and_(other.c.status == tables.WAITING, is_better),
        ),
    )
    connection.execute(
        sa.update(drafts)
        .where(
            drafts.c.status == tables.WAITING,
            drafts.c.chat_id.in_(sorted(set(chat_ids))),
            sa.or_(is_newer, has_other),
        )
        .values(status=tables.SUPERSEDED, version=drafts.c.version + 1, changed_at=now())
    )


def _upsert_rows(
    connection: sa.Connection,
    table: sa.Table,
    rows: Sequence[dict[str, Any]],
    where: Callable[[Any], Any] | None = None,
    set_to: Callable[[Any], dict[str, Any]] | None = None,
) -> None:
    """Inserts rows, or updates those whose key exists and for which `where(new row)` is true.

    An update sets the columns of `set_to(new row)`; by default, all columns.
    """
    if not rows:
        return
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    insert = dialect.insert(table)
    keys = [column.name for column in table.primary_key]
    new = insert.excluded
    values = set_to(new) if set_to else {name: new[name] for name in rows[0] if name not in keys}
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=keys, set_=values, where=where(new) if where else None
        ),
        [{name: _clean(value) for name, value in row.items()} for row in rows],
    )


def values_of(record: Record) -> dict[str, Any]:
    """Returns a record's fields as columns."""
    values = record.model_dump()
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _clean(value: Any) -> Any:
    """Replaces what databases cannot store: NUL characters, and infinities in JSON."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {_clean(key): _clean(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(part) for part in value]
    if isinstance(value, IntEnum):
        return int(value)
    if isinstance(value, float) and value - value != 0:
        return None
    return value
