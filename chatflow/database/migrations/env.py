"""Runs the steps of `versions/` in the transaction that `Database.upgrade` began."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
