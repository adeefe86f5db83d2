"""Stores original chats, and the positions of placeholders for personal data."""

import sqlalchemy as sa
from alembic import op

from chatflow.database.tables import JSON

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "raw_chats",
        sa.Column("chat_id", sa.Text, primary_key=True),
        sa.Column("revision", sa.BigInteger, primary_key=True),
        sa.Column("chat", JSON),
        sa.Column("placeholders", JSON, nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.add_column("outbox", sa.Column("placeholders", JSON))
    op.add_column("analyses", sa.Column("redacted", JSON))
