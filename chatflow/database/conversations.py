"""Reads each customer of each chat with their newest analysis and draft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from chatflow.database import tables
from chatflow.database.tables import analyses, chat_attributes, chats, customers, drafts, outbox
from chatflow.records import Analysis, Chat

ROWS = 100
"""Conversations to keep in memory at once; each may be long."""


class Conversation(NamedTuple):
    """A customer of a chat.

    Attributes:
      user_id: None if the chat has no analysis.
      chat: None if the database has only its analysis or draft.
      analysis: the newest one.
      draft: columns of the newest draft that is not superseded, with people's decision; empty if
        there is no such draft.
      replied_at: when the reply was published.
    """

    chat_id: str
    user_id: str | None
    chat: Chat | None
    analysis: Analysis | None
    draft: Mapping[str, Any]
    replied_at: datetime | None


def conversations(
    connection: sa.Connection,
    since: datetime | None = None,
    until: datetime | None = None,
    sentiments: Sequence[int] = (),
) -> Iterator[Conversation]:
    """Yields the customers of all chats, sorted by chat; keeps only a few in memory at once.

    Args:
      since: only chats whose last message was sent at this time or later. If no time is known, the
        time of the analysis counts.
      until: only chats whose last message was sent before this time.
      sentiments: only customers whose newest analysis has one of these.
    """
    without = ~sa.exists().where(customers.c.chat_id == chats.c.chat_id)
    nobody = sa.select(chats.c.chat_id, sa.null().label("user_id")).where(without)
    of_all = sa.union_all(sa.select(customers.c.chat_id, customers.c.user_id), nobody).subquery()

    def newest(table: sa.Table, key: str, at: str, *where: Any) -> Any:
        """Returns the id of a customer's newest row."""
        other = table.alias()
        return (
            sa.select(other.c[key])
            .where(other.c.chat_id == of_all.c.chat_id, other.c.user_id == of_all.c.user_id)
            .where(*(condition(other) for condition in where))
            .order_by(other.c.revision.desc(), other.c[at].desc(), other.c[key].desc())
            .limit(1)
            .correlate(of_all)
            .scalar_subquery()
        )

    analysis_id = newest(analyses, "analysis_id", "analysed_at")
    draft_id = newest(
        drafts, "draft_id", "drafted_at", lambda other: other.c.status != tables.SUPERSEDED
    )
    moment = sa.func.coalesce(chats.c.last_message_at, analyses.c.analysed_at, chats.c.stored_at)
    query = (
        sa.select(of_all, chats, analyses, drafts, outbox.c.published_at)
        .select_from(of_all)
        .outerjoin(chats, chats.c.chat_id == of_all.c.chat_id)
        .outerjoin(analyses, analyses.c.analysis_id == analysis_id)
        .outerjoin(drafts, drafts.c.draft_id == draft_id)
        .outerjoin(outbox, outbox.c.draft_id == drafts.c.draft_id)
        .order_by(of_all.c.chat_id, of_all.c.user_id)
        .set_label_style(sa.LABEL_STYLE_TABLENAME_PLUS_COL)
    )
    if since is not None:
        query = query.where(moment >= since)
    if until is not None:
        query = query.where(moment < until)
    if sentiments:
        query = query.where(analyses.c.sentiment.in_(list(sentiments)))
    streamed = connection.execution_options(stream_results=True, yield_per=ROWS)
    for found in streamed.execute(query).mappings():
        chat = {name: found[chats.c[name]] for name in Chat.model_fields if name in chats.c}
        analysis = {name: found[analyses.c[name]] for name in Analysis.model_fields}
        draft = {column.name: found[column] for column in drafts.c}
        yield Conversation(
            found[of_all.c.chat_id],
            found[of_all.c.user_id],
            Chat.model_validate(chat) if chat["chat_id"] else None,
            Analysis.model_validate({k: v for k, v in analysis.items() if v is not None})
            if analysis["analysis_id"]
            else None,
            draft if draft["draft_id"] else {},
            found[outbox.c.published_at],
        )


def snapshot(connection: sa.Connection) -> None:
    """Makes a transaction read the state of a single moment; call it before the first read."""
    if connection.dialect.name == "postgresql":  # SQLite always does that
        connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))


def field_names(connection: sa.Connection) -> list[str]:
    """Returns the names of all fields of analyses, sorted."""
    query = sa.select(analyses.c.fields).where(analyses.c.fields.is_not(None))
    streamed = connection.execution_options(stream_results=True, yield_per=1000)
    return sorted({name for (fields,) in streamed.execute(query) for name in fields})


def attribute_names(connection: sa.Connection, most: int) -> list[str]:
    """Returns the `most` frequent names of chats' attributes, sorted by name."""
    name = chat_attributes.c.name
    query = sa.select(name).group_by(name).order_by(sa.func.count().desc(), name).limit(most)
    return sorted(connection.execute(query).scalars())
