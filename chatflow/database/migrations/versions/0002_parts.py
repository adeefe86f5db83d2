"""Lets dead letters be parts of a larger one."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for column in (
        sa.Column("part", sa.BigInteger),
        sa.Column("parts", sa.BigInteger),
        sa.Column("whole_id", sa.Text),
    ):
        op.add_column("dead_letters", column)
