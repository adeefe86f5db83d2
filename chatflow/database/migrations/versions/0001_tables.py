"""Creates the first tables."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "chats",
        sa.Column("chat_id", sa.Text, primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.Text),
        sa.Column("messages", JSON, nullable=False),
        sa.Column("attributes", JSON, nullable=False),
        sa.Column("search_text", sa.Text, nullable=False),
        sa.Column("last_message_at", TIME),
        sa.Column("stored_at", TIME, nullable=False),
    )
    op.create_table(
        "chat_attributes",
        sa.Column("chat_id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    index("chat_attributes", "name", "value")
    op.create_table(
        "customers",
        sa.Column("chat_id", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "analyses",
        sa.Column("analysis_id", sa.Text, primary_key=True),
        sa.Column("chat_id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("sentiment", sa.SmallInteger, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("summary_source", sa.Text, nullable=False),
        sa.Column("tone_scores", JSON),
        sa.Column("confidence", sa.Double),
        sa.Column("dropped_messages", sa.Integer, nullable=False),
        sa.Column("cut_messages", sa.Integer, nullable=False),
        sa.Column("repairs", JSON, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("prompt_version", sa.Text, nullable=False),
        sa.Column("analysed_at", TIME, nullable=False),
    )
    index("analyses", "chat_id", "user_id", "revision")
    index("analyses", "analysed_at")
    op.create_table(
        "drafts",
        sa.Column("draft_id", sa.Text, primary_key=True),
        sa.Column("analysis_id", sa.Text, nullable=False),
        sa.Column("chat_id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("flag", sa.Text),
        sa.Column("repairs", JSON, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("prompt_version", sa.Text, nullable=False),
        sa.Column("drafted_at", TIME, nullable=False),
        sa.Column("status", sa.Text, nullable=False, server_default="waiting"),
        sa.Column("version", sa.Integer, nullable=False, server_default="0"),
        sa.Column("edited_text", sa.Text),
        sa.Column("decided_by", sa.Text),
        sa.Column("decided_at", TIME),
        sa.Column("reason", sa.Text),
        sa.Column("comment", sa.Text),
        sa.Column("edit_distance", sa.Double),
        sa.Column("seen", JSON),
        sa.Column("changed_at", TIME, nullable=False),
    )
    index("drafts", "status", "drafted_at")
    index("drafts", "status", "changed_at")
    index("drafts", "chat_id", "user_id")
    index("drafts", "decided_at")
    op.create_table(
        "dead_letters",
        sa.Column("dead_letter_id", sa.Text, primary_key=True),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("payload_encoding", sa.Text, nullable=False),
        sa.Column("attributes", JSON),
        sa.Column("chat_id", sa.Text),
        sa.Column("answer", sa.Text),
        sa.Column("failed_at", TIME, nullable=False),
    )
    index("dead_letters", "failed_at")
    op.create_table(
        "history",
        sa.Column("history_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("draft_id", sa.Text, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("comment", sa.Text),
    )
    index("history", "draft_id")
    index("history", "at")
    op.create_table(
        "outbox",
        sa.Column("draft_id", sa.Text, primary_key=True),
        sa.Column("reply", JSON, nullable=False),
        sa.Column("publish_after", TIME, nullable=False),
        sa.Column("leased_by", sa.Text),
        sa.Column("leased_until", TIME),
        sa.Column("published_at", TIME),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("error", sa.Text),
    )
    index("outbox", "published_at", "publish_after")
    op.create_table(
        "sessions",
        sa.Column("session_hash", sa.Text, primary_key=True),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
    )


def index(table: str, *columns: str) -> None:
    op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))
