"""Stores what was chosen for a chat, and what composed texts quote."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    for table, columns in {
        "analyses": (
            sa.Column("quotations", JSON),
            sa.Column("fields", JSON),
            sa.Column("language", sa.Text),
            sa.Column("unproven_language", sa.Boolean),
        ),
        "drafts": (
            sa.Column("grievances", JSON),
            sa.Column("evidence", JSON),
            sa.Column("confidence", sa.Double),
        ),
    }.items():
        for column in columns:
            op.add_column(table, column)
