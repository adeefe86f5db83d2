"""Turns people's decisions into labelled chats for `chatflow evaluate` and `tune`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydantic_core
import sqlalchemy as sa

from chatflow.database import tables
from chatflow.database.tables import drafts

_SENTIMENTS = {"not_angry_neutral": 0, "not_angry_happy": 1}


def labelled(connection: sa.Connection) -> Iterator[str]:
    """Yields lines of JSON: chats as they were when a person decided, with their `sentiment`.

    An approved draft labels its customer as angry. A draft dismissed because the customer is not
    angry labels them with the chosen tone. Other decisions say nothing about the tone and are left
    out. Only the newest decision per chat and user counts. Each line has `source` ("console"), and
    `reply` (the approved text) and `draft` (the model's text), if they exist.
    """
    of_tone = drafts.c.reason.in_(list(_SENTIMENTS))
    query = (
        sa.select(drafts)
        .where(
            drafts.c.seen.is_not(None),
            sa.or_(
                drafts.c.status == tables.APPROVED,
                sa.and_(drafts.c.status == tables.DISMISSED, of_tone),
            ),
        )
        .order_by(drafts.c.chat_id, drafts.c.user_id, drafts.c.decided_at.desc())
        .execution_options(yield_per=100)
    )
    last = None
    for row in connection.execute(query).mappings():
        key = row["chat_id"], row["user_id"]
        if key == last:
            continue
        last = key
        value: dict[str, Any] = {**row["seen"], "user_id": row["user_id"], "source": "console"}
        value["sentiment"] = _SENTIMENTS.get(row["reason"], -1)
        if row["status"] == tables.APPROVED:
            value["reply"] = row["edited_text"] or row["text"]
        if row["text"]:
            value["draft"] = row["text"]
        yield pydantic_core.to_json(value).decode()
