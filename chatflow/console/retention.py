"""Retention: deletes chats that have been unchanged for a long time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chatflow.database import tables
from chatflow.database.connections import Database
from chatflow.database.tables import (
    analyses,
    answers,
    audit,
    chat_attributes,
    chats,
    customers,
    dead_letters,
    drafts,
    history,
    outbox,
    raw_chats,
)

MOST = 500
"""Maximum number of chats deleted in one transaction."""


def forget(database: Database, before: datetime) -> int:
    """Deletes chats unchanged since `before`, and other entries from before then.

    Those are dead letters, stored answers and the audit log.

    A chat's analyses, drafts and replies, and people's actions on them, are deleted with it. A chat
    is kept while a draft waits for review or a reply waits to be published. Returns how many chats
    were deleted: at most `MOST`, and 0 when none are left.
    """
    with database.read() as connection:
        ids = connection.execute(_old(before).limit(MOST)).scalars().all()
    with database.write() as connection:
        waits = sa.exists().where(
            drafts.c.chat_id == dead_letters.c.chat_id, drafts.c.status == tables.WAITING
        )
        letters = dead_letters.c.failed_at < before, sa.not_(waits)
        connection.execute(sa.delete(dead_letters).where(*letters))
        connection.execute(sa.delete(answers).where(answers.c.answered_at < before))
        connection.execute(sa.delete(audit).where(audit.c.at < before))
        if not ids:
            return 0
        # Lock in the same order as `upserts`, to prevent deadlocks.
        key = customers.c.chat_id, customers.c.user_id
        of_chats = sa.select(*key).where(customers.c.chat_id.in_(ids)).order_by(*key)
        locked = connection.execute(of_chats.with_for_update()).all()
        ids = connection.execute(_old(before, ids)).scalars().all()
        these = chats.c.chat_id.in_(ids)
        count = connection.execute(
            sa.delete(chats).where(these, chats.c.stored_at < before)
        ).rowcount
        # Some may just have received a newer revision, or another customer, who is not locked.
        newer = set(connection.execute(sa.select(chats.c.chat_id).where(these)).scalars())
        gone = set(ids) - newer
        pairs = [(chat_id, user_id) for chat_id, user_id in locked if chat_id in gone]

        def theirs(table: sa.Table) -> sa.ColumnElement[bool]:
            return sa.tuple_(table.c.chat_id, table.c.user_id).in_(pairs)

        of_drafts = sa.select(drafts.c.draft_id).where(theirs(drafts))
        for table in (history, outbox):
            connection.execute(sa.delete(table).where(table.c.draft_id.in_(of_drafts)))
        for table in (drafts, analyses, customers):
            count += connection.execute(sa.delete(table).where(theirs(table))).rowcount
        of_gone = chat_attributes.c.chat_id.in_(gone)
        connection.execute(sa.delete(chat_attributes).where(of_gone))
        return len(gone) if count else 0


def forget_chats_of(database: Database, raw: Database, user_id: str) -> list[str]:
    """Deletes all chats with a user, and all about them, whatever waits; returns their ids."""
    with database.read() as connection:
        holding = chats.c.search_text.contains(user_id.casefold(), autoescape=True)
        rows = connection.execute(sa.select(chats.c.chat_id, chats.c.messages).where(holding))
        ids = {
            row.chat_id
            for row in rows
            if any(message["user_id"] == user_id for message in row.messages)
        }
        for table in (chats, customers):
            query = sa.select(table.c.chat_id).where(table.c.user_id == user_id)
            ids.update(connection.execute(query).scalars())
    found = sorted(ids)
    for at in range(0, len(found), MOST):
        these = found[at : at + MOST]
        with database.write() as connection:
            # Lock in the same order as `upserts`, to prevent deadlocks.
            key = customers.c.chat_id, customers.c.user_id
            locked = sa.select(*key).where(customers.c.chat_id.in_(these)).order_by(*key)
            connection.execute(locked.with_for_update()).all()
            of_drafts = sa.select(drafts.c.draft_id).where(drafts.c.chat_id.in_(these))
            for table in (history, outbox):
                connection.execute(sa.delete(table).where(table.c.draft_id.in_(of_drafts)))
            for table in (
                chats,
                chat_attributes,
                drafts,
                analyses,
                customers,
                answers,
                dead_letters,
            ):
                connection.execute(sa.delete(table).where(table.c.chat_id.in_(these)))
        with raw.write() as connection:
            connection.execute(sa.delete(raw_chats).where(raw_chats.c.chat_id.in_(these)))
    return found


def _old(before: datetime, ids: Sequence[str] | None = None) -> sa.Select[Any]:
    """Selects ids of chats (only among `ids`, if given) that are unchanged since a moment."""

    def ids_in(table: sa.Table) -> sa.Select[Any]:
        found = sa.select(table.c.chat_id)
        return found if ids is None else found.where(table.c.chat_id.in_(ids))

    known = sa.union(*map(ids_in, (chats, analyses, drafts))).subquery()

    def has(column: sa.Column[Any], *where: sa.ColumnElement[bool]) -> sa.Exists:
        return sa.exists().where(column == known.c.chat_id, *where)

    unpublished = sa.select(outbox.c.draft_id).where(outbox.c.published_at.is_(None))
    needed = (
        has(chats.c.chat_id, chats.c.stored_at >= before),
        has(analyses.c.chat_id, analyses.c.analysed_at >= before),
        has(drafts.c.chat_id, drafts.c.changed_at >= before),
        has(drafts.c.chat_id, drafts.c.status == tables.WAITING),
        has(drafts.c.chat_id, drafts.c.draft_id.in_(unpublished)),
    )
    return sa.select(known.c.chat_id).where(sa.not_(sa.or_(*needed)))
