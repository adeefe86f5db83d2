"""Reads what placeholders stand for from the database of `--keep_raw`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import sqlalchemy as sa

from chatflow.database.connections import Database
from chatflow.database.tables import chats, drafts, raw_chats

MOST = 500
"""Maximum number of chats in one statement."""


Key = tuple[str, int]
"""A chat's id and revision."""

Hidden = dict[Key, dict[str, str]]
"""What each placeholder stands for, by chat and revision."""


def values_of(raw: Database, keys: Iterable[Key]) -> Hidden:
    """Returns what each placeholder stands for; leaves out revisions without placeholders."""
    these = sorted(set(keys))
    key = sa.tuple_(raw_chats.c.chat_id, raw_chats.c.revision)
    query = sa.select(raw_chats.c.chat_id, raw_chats.c.revision, raw_chats.c.placeholders)
    with raw.read() as connection:
        rows = [
            row
            for at in range(0, len(these), MOST)
            for row in connection.execute(query.where(key.in_(these[at : at + MOST])))
        ]
    return {(row.chat_id, row.revision): row.placeholders for row in rows if row.placeholders}


def forget_raw(raw: Database, database: Database, before: datetime) -> int:
    """Deletes raw chats that were stored before a moment and whose chats are deleted.

    Returns how many it deleted.
    """
    last, count = "", 0
    key = raw_chats.c.chat_id
    while True:
        old = sa.select(key).where(raw_chats.c.stored_at < before, key > last).distinct()
        with raw.read() as connection:
            ids = list(connection.execute(old.order_by(key).limit(MOST)).scalars())
        if not ids:
            return count
        last = ids[-1]
        with database.read() as connection:
            known = sa.union(
                sa.select(chats.c.chat_id).where(chats.c.chat_id.in_(ids)),
                sa.select(drafts.c.chat_id).where(drafts.c.chat_id.in_(ids)),
            )
            gone = set(ids) - set(connection.execute(known).scalars())
        with raw.write() as connection:
            theirs = key.in_(sorted(gone)), raw_chats.c.stored_at < before
            count += connection.execute(sa.delete(raw_chats).where(*theirs)).rowcount
