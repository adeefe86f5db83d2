"""Defines the tables; `migrations/` has the steps that create them.

A record's fields are columns of the same names. The columns after them in `drafts`, and the tables
`history`, `outbox`, `sessions`, `audit` and `keys`, belong to the console. `answers` has answers
of models, so that nothing is asked twice, and `spending` the cost of each run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB


class UtcTime(sa.TypeDecorator[datetime]):
    """A moment in time. SQLite has no time zones, so UTC is written and read."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _required(name: str, kind: Any = sa.Text, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **options)


def _optional(name: str, kind: Any = sa.Text) -> sa.Column[Any]:
    return sa.Column(name, kind)


def _key(name: str, kind: Any = sa.Text) -> sa.Column[Any]:
    return sa.Column(name, kind, primary_key=True)


JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

WAITING, APPROVED, DISMISSED, SUPERSEDED = "waiting", "approved", "dismissed", "superseded"
"""States of a draft. It is superseded if its customer has a newer analysis or draft."""

metadata = sa.MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s"})

chats = sa.Table(
    "chats",
    metadata,
    _key("chat_id"),
    _required("revision", sa.BigInteger),
    _optional("user_id"),
    _required("messages", JSON),
    _required("attributes", JSON),
    _required("search_text"),  # lower case, for the console's search
    _optional("last_message_at", UtcTime),
    _required("stored_at", UtcTime),
)

raw_chats = sa.Table(  # for --keep_raw, maybe in a separate database
    "raw_chats",
    metadata,
    _key("chat_id"),
    _key("revision", sa.BigInteger),  # each revision numbers its placeholders from 1
    _optional("chat", JSON),  # of the newest revision alone
    _required("placeholders", JSON),
    _required("stored_at", UtcTime),
)

chat_attributes = sa.Table(
    "chat_attributes",
    metadata,
    _key("chat_id"),
    _key("name"),
    _required("value"),
    sa.Index(None, "name", "value"),
)

customers = sa.Table(
    "customers",
    metadata,
    _key("chat_id"),
    _key("user_id"),
    _required("revision", sa.BigInteger),  # the newest among their analyses and drafts
)

analyses = sa.Table(
    "analyses",
    metadata,
    _key("analysis_id"),
    _required("chat_id"),
    _required("user_id"),
    _required("revision", sa.BigInteger),
    _required("sentiment", sa.SmallInteger),
    _required("summary"),
    _required("summary_source"),
    _optional("quotations", JSON),
    _optional("fields", JSON),
    _optional("language"),
    _optional("unproven_language", sa.Boolean),
    _optional("tone_scores", JSON),
    _optional("confidence", sa.Double),
    _required("dropped_messages", sa.Integer),
    _required("cut_messages", sa.Integer),
    _optional("first", JSON),
    _optional("redacted", JSON),
    _required("repairs", JSON),
    _required("model"),
    _required("prompt_version"),
    _required("analysed_at", UtcTime),
    sa.Index(None, "chat_id", "user_id", "revision"),
    sa.Index(None, "analysed_at"),
)

drafts = sa.Table(
    "drafts",
    metadata,
    _key("draft_id"),
    _required("analysis_id"),
    _required("chat_id"),
    _required("user_id"),
    _required("revision", sa.BigInteger),
    _optional("text"),
    _optional("flag"),
    _optional("grievances", JSON),
    _optional("evidence", JSON),
    _optional("confidence", sa.Double),
    _required("repairs", JSON),
    _required("model"),
    _required("prompt_version"),
    _required("drafted_at", UtcTime),
    # People's decision.
    _required("status", server_default=WAITING),
    _required("version", sa.Integer, server_default="0"),  # increases with each change
    _optional("edited_text"),
    _optional("decided_by"),
    _optional("decided_at", UtcTime),
    _optional("reason"),
    _optional("comment"),
    _optional("edit_distance", sa.Double),  # of the approved text, from 0 to 1
    _optional("seen", JSON),  # the chat at the time of the decision
    _required("changed_at", UtcTime),
    _optional("waits_since", UtcTime),  # the customer's last message, if its time is known
    sa.Index(None, "status", "drafted_at"),
    sa.Index(None, "status", "changed_at"),
    sa.Index(None, "chat_id", "user_id"),
    sa.Index(None, "decided_at"),
)

dead_letters = sa.Table(
    "dead_letters",
    metadata,
    _key("dead_letter_id"),
    _required("stage"),
    _required("reason"),
    _required("error"),
    _required("payload"),
    _required("payload_encoding"),
    _optional("attributes", JSON),
    _optional("chat_id"),
    _optional("answer"),
    _required("failed_at", UtcTime),
    _optional("part", sa.BigInteger),
    _optional("parts", sa.BigInteger),
    _optional("whole_id"),
    sa.Index(None, "failed_at"),
)

history = sa.Table(
    "history",
    metadata,
    sa.Column("history_id", sa.Integer, primary_key=True, autoincrement=True),
    _required("draft_id"),
    _required("at", UtcTime),
    _required("who"),
    _required("action"),
    _optional("text"),
    _optional("reason"),
    _optional("comment"),
    sa.Index(None, "draft_id"),
    sa.Index(None, "at"),
)

outbox = sa.Table(
    "outbox",
    metadata,
    _key("draft_id"),  # a draft has at most one reply
    _required("reply", JSON),
    _optional("placeholders", JSON),  # of its text, to be filled in when it is sent
    _required("publish_after", UtcTime),  # until then, the approval can be undone
    _optional("leased_by"),
    _optional("leased_until", UtcTime),
    _optional("published_at", UtcTime),
    _required("attempts", sa.Integer, server_default="0"),
    _optional("error"),
    sa.Index(None, "published_at", "publish_after"),
)

sessions = sa.Table(
    "sessions",
    metadata,
    _key("session_hash"),
    _required("who"),
    _required("method"),  # how the person signed in: token, code or openid
    _required("credential"),  # the token's hash, so that the session ends when it changes
    _required("address"),
    _required("began_at", UtcTime),
    _required("seen_at", UtcTime),
    _required("expires_at", UtcTime),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("audit_id", sa.Integer, primary_key=True, autoincrement=True),
    _required("at", UtcTime),
    _required("who"),
    _required("action"),
    _required("address"),
    _required("what"),
    sa.Index(None, "at"),
)

keys = sa.Table(
    "keys",
    metadata,
    _key("name"),
    _required("value"),
)

answers = sa.Table(
    "answers",
    metadata,
    _key("question_id"),
    _required("chat_id"),
    _required("model"),
    _required("answer"),
    _required("answered_at", UtcTime),
    sa.Index(None, "answered_at"),
)

spending = sa.Table(
    "spending",
    metadata,
    _key("run"),
    _required("usd", sa.Double),
)
