"""UpsertRecords: records to a database, each once; what is newer supersedes."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import apache_beam as beam

from chatflow.dead_letters import dead_letter
from chatflow.errors import ElementError, UsageError, one_line
from chatflow.records import Analysis, Chat, DeadLetter, Draft, Record, now, record_id
from chatflow.secrets import read_secret
from chatflow.services import wait_to_try_again

if TYPE_CHECKING:
    import sqlalchemy as sa

DATABASE = re.compile(r"(?:sqlite|postgresql(?:\+psycopg)?):.*")
"""`sqlite:///FILE` (four slashes before an absolute path), `postgresql+psycopg://USER@HOST/NAME`."""

ROWS = 500
"""The most records of a transaction."""

UPSERT_SECONDS = 600.0
"""How long records are tried to be written before their bundle fails, and the runner goes on."""

FIRST_PAUSE = 0.5
"""Seconds before the second try; then twice as long each time."""


_log = logging.getLogger(__name__)


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class UpsertRecords(beam.PTransform):
    """Records to rows of the tables in `chatflow.database.tables`, upserted by their ids.

    So a bundle that the runner does again, a replay or a backfill has each row once, however
    many workers write at the same time. Of a chat the newest revision is kept. A draft that
    waits for review is superseded when there is a newer analysis of its customer, or a newer
    draft; what people did with a draft is never written over.

    Gives dead letters: of records that the database will not take, whatever the try.

    Attributes:
      uri: see `DATABASE`.
      password: where the password is, for a URI without one; see `secrets.PLACES`.
    """

    uri: str = dataclasses.field(repr=False)  # it may hold a password
    password: str = dataclasses.field(default="", repr=False)

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter]:
        return (
            records
            | "Batch" >> beam.BatchElements(ROWS, ROWS)
            | "Upsert"
            >> beam.ParDo(_UpsertDoFn(self.uri, self.password)).with_output_types(DeadLetter)
        )


class _UpsertDoFn(beam.DoFn):
    def __init__(self, uri: str, password: str = ""):
        self.uri, self.password = uri, password

    def setup(self) -> None:
        from chatflow.database.connect import opened

        self.database = opened(self.uri, password_at(self.password))

    def process(self, records: Sequence[Record]) -> Iterable[DeadLetter]:
        """Writes records; those that are refused on their own are dead letters.

        Raises:
          DBAPIError: the database cannot be reached, or lets nobody write.
        """
        import sqlalchemy as sa

        give_up, pause = time.monotonic() + UPSERT_SECONDS, FIRST_PAUSE
        while True:
            try:
                with self.database.write() as connection:
                    upsert(connection, records)
                return
            except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
                refused = error
            if _is_of_a_record(refused):
                break
            pause = wait_to_try_again(refused, f"writing to {self.database.uri}", pause, give_up)
        if len(records) > 1:
            half = len(records) // 2
            yield from self.process(records[:half])
            yield from self.process(records[half:])
        elif isinstance(records[0], DeadLetter):
            raise refused  # there is no other place for it
        else:
            said = one_line(Exception(getattr(refused, "orig", refused)))
            yield dead_letter("write", records[0], ElementError("sql_refused", said))


def _is_of_a_record(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether it is the record's own mistake, and not one of the database or of its settings."""
    import sqlalchemy as sa

    code = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
    # 54: an id too long for an index. https://www.postgresql.org/docs/current/errcodes-appendix.html
    return isinstance(error, (sa.exc.DataError, sa.exc.IntegrityError)) or code.startswith("54")


def upsert(connection: sa.Connection, records: Sequence[Record]) -> None:
    """Writes records of any kind in a transaction."""
    by_kind: dict[type[Record], dict[str, Record]] = {}
    for record in records:
        of_kind = by_kind.setdefault(type(record), {})
        key = record.chat_id if isinstance(record, Chat) else record_id(record)
        if not (isinstance(record, Chat) and _is_newer(of_kind.get(key), record)):
            of_kind[key] = record
    # All transactions lock customers, and then chats, in the order of their ids: none waits for
    # one that waits for it.
    _lock_customers(connection, records)
    for kind, write in _WRITE.items():
        if found := by_kind.get(kind):
            write(connection, [found[key] for key in sorted(found)])


def _is_newer(known: Record | None, chat: Chat) -> bool:
    return isinstance(known, Chat) and known.revision > chat.revision


def _write_chats(connection: sa.Connection, found: Sequence[Chat]) -> None:
    import sqlalchemy as sa

    from chatflow.database import tables

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
            {"chat_id": chat.chat_id, "name": name, "value": value}
            for chat in newest
            for name, value in sorted(chat.attributes.items())
        ],
    )


def search_text(chat: Chat) -> str:
    """What people search in: ids and messages, in lower case of all scripts."""
    return "\n".join(
        [chat.chat_id, *dict.fromkeys(m.user_id for m in chat.messages)]
        + [m.text for m in chat.messages]
    ).casefold()


def _write_analyses(connection: sa.Connection, found: Sequence[Analysis]) -> None:
    from chatflow.database import tables

    _upsert_rows(connection, tables.analyses, [_values(record) for record in found])
    supersede(connection, [record.chat_id for record in found])


def _write_drafts(connection: sa.Connection, found: Sequence[Draft]) -> None:
    import sqlalchemy as sa

    from chatflow.database import tables

    rows = [{**_values(record), "changed_at": now()} for record in found]
    known = tables.drafts.c
    waits = known.status == tables.WAITING

    def set_to(new: Any) -> dict[str, Any]:
        # Whoever has the page of another text open is to look again.
        rewritten = sa.case((known.text.is_distinct_from(new.text), 1), else_=0)
        fields = {name: new[name] for name in rows[0] if name != "draft_id"}
        return {**fields, "version": known.version + rewritten}

    _upsert_rows(connection, tables.drafts, rows, lambda _: waits, set_to)
    supersede(connection, [record.chat_id for record in found])


def _write_dead_letters(connection: sa.Connection, found: Sequence[DeadLetter]) -> None:
    from chatflow.database import tables

    rows = []
    for letter in found:
        key = record_id(letter)
        if "\0" in letter.payload:  # PostgreSQL has no such character, and it is to be replayed
            payload = base64.b64encode(letter.payload_bytes()).decode()
            letter = letter.model_copy(update={"payload": payload, "payload_encoding": "base64"})
        rows.append({"dead_letter_id": key, **_values(letter)})
    _upsert_rows(connection, tables.dead_letters, rows)


_WRITE: dict[Any, Callable[[Any, Any], None]] = {
    Chat: _write_chats,
    Analysis: _write_analyses,
    Draft: _write_drafts,
    DeadLetter: _write_dead_letters,
}


def _lock_customers(connection: sa.Connection, found: Iterable[Record]) -> None:
    """Notes the newest revision of each customer of analyses and drafts.

    Until the transaction ends, no other one looks at these customers' drafts: each sees what
    the one before it wrote, and what is superseded does not depend on who was first.
    """
    import sqlalchemy as sa

    from chatflow.database import tables

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
    """Takes drafts out of the inbox for which there is something newer.

    That is an analysis or draft of a newer revision; at the same revision (by another model or
    prompt) a draft that people have decided on, or one that was written later.
    """
    import sqlalchemy as sa

    from chatflow.database import tables

    drafts, customers = tables.drafts, tables.customers
    other = drafts.alias("other")
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
            sa.and_(
                other.c.status == tables.WAITING,
                sa.or_(
                    other.c.drafted_at > drafts.c.drafted_at,
                    sa.and_(
                        other.c.drafted_at == drafts.c.drafted_at,
                        other.c.draft_id > drafts.c.draft_id,
                    ),
                ),
            ),
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
    """Inserts rows; where there is one of the same key, its columns are replaced.

    Args:
      where: given the new row, when it is replaced.
      set_to: given the new row, what it is replaced by; default: all that the row has.
    """
    from sqlalchemy.dialects import postgresql, sqlite

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


def _values(record: Record) -> dict[str, Any]:
    """The columns that are a record's fields."""
    values = record.model_dump()
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _clean(value: Any) -> Any:
    """A value without what databases do not have: NUL characters, and infinities in JSON."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {_clean(key): _clean(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_clean(part) for part in value]
    if isinstance(value, IntEnum):
        return int(value)
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def without_passwords(text: str) -> str:
    """A text with databases, less their passwords."""
    return _PASSWORD.sub(r"\1:***@", text)


_PASSWORD = re.compile(r"(postgresql(?:\+psycopg)?://[^:@/,\s]*):(?:[^/,\s]*@|[^@?,\s]*@)")


def check_uri(uri: str, flag: str) -> None:
    """Makes sure that a URI names a database.

    Raises:
      UsageError: see `connect.parse_uri`; with the flag.
    """
    from chatflow.database.connect import parse_uri

    try:
        parse_uri(uri)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def check_databases(
    destinations: Iterable[str], password: str, local: bool = True, share_files: bool = True
) -> None:
    """Makes the tables where they are missing, before anything runs.

    Args:
      password: where it is, if anywhere.
      local: the pipeline runs here; else its workers may reach what is out of reach from here,
        and make the tables when they start.
      share_files: workers see files of this machine.

    Raises:
      UsageError: a database cannot be used, or not by workers elsewhere.
    """
    from chatflow.database.connect import Database

    for uri in sorted({uri for uri in destinations if DATABASE.match(uri)}):
        if uri.startswith("sqlite:") and not share_files:
            raise UsageError(f"{uri} is a file of this machine, where no worker comes to")
        try:
            database = Database(uri, password_at(password))
            with contextlib.closing(database):
                database.upgrade()
        except UsageError as error:
            if local:
                raise
            _log.warning("not checked: %s", error)


def password_at(place: str) -> str:
    """A database's password; empty where no place is named.

    Raises:
      UsageError: there is none there.
    """
    return read_secret(place, "--database_password").strip() if place else ""
