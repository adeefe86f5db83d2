"""Connects to SQLite or PostgreSQL: `Database` has transactions and upgrades the schema."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.migration
import alembic.script
import sqlalchemy as sa

from chatflow.errors import UsageError, one_line
from chatflow.records import now
from chatflow.secrets import read_secret

BUSY_SECONDS = 30
"""How long SQLite waits for another writer."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_MIGRATION_LOCK = 0x63686174666C6F77  # "chatflow": a number that other programs do not lock


class Database:
    """A database with connections for all threads; `uri` is for display, without the password."""

    def __init__(self, uri: str, password: str = "", connections: int = 5):
        """Creates the engine; raises the errors of `parse_uri`.

        Args:
          password: for a URI without one; PGPASSWORD and ~/.pgpass of libpq also work.
          connections: the most open connections; for a short time, twice as many.
        """
        url = parse_uri(uri)
        if password and url.get_backend_name() != "sqlite":  # SQLite has no passwords
            url = url.set(password=password)
        self.uri = url.render_as_string(hide_password=True)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = sa.create_engine(
            url,
            hide_parameters=True,  # keeps what chats say out of logs
            pool_pre_ping=not self.is_sqlite,
            pool_size=connections,
            max_overflow=connections,
        )
        if self.is_sqlite:
            sa.event.listen(self._engine, "do_connect", _make_private)
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._reading = self._engine.execution_options(reads=True)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Begins a transaction that only reads."""
        with self._reading.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Begins a transaction that is stored whole or not at all; SQLite has one at a time."""
        with self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def upgrade(self) -> None:
        """Creates or migrates the tables. If several try at once, one does it and the others wait.

        Raises:
          UsageError: the database cannot be reached, or was made by a newer chatflow.
        """
        try:
            with self.read() as connection:
                if self._check_version(connection):
                    return
            with self.write() as connection:
                if not self.is_sqlite:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                if not self._check_version(connection):
                    config = _migrations()
                    config.attributes["connection"] = connection
                    alembic.command.upgrade(config, "head")
        except sa.exc.DBAPIError as error:
            said = one_line(Exception(error.orig))
            if "certificate" in said or "SSL" in said:
                said += (
                    "; certificates of databases on other machines are checked: add "
                    "?sslrootcert=FILE, or ?sslmode=require (encrypted, but not checked) to the URI"
                )
            raise UsageError(f"the database {self.uri} cannot be used: {said}") from None

    def _check_version(self, connection: sa.Connection) -> bool:
        """Returns whether the schema is of this version; raises `UsageError` if it is newer."""
        found = alembic.migration.MigrationContext.configure(connection).get_current_revision()
        known = [step.revision for step in _steps()]
        if found is not None and found not in known:
            raise UsageError(
                f"the database {self.uri} was made by a newer chatflow (schema {found}, this one "
                f"knows {known[0]}); install that version"
            )
        return bool(found == known[0])


def clock(connection: sa.Connection) -> datetime:
    """Returns the time of the database's clock, which all machines that use it share."""
    if connection.dialect.name == "sqlite":  # a file on this machine
        return now()
    moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment.astimezone(UTC)


@functools.cache
def opened(uri: str, password: str = "") -> Database:
    """Returns the database that all threads of this process share, with up-to-date tables."""
    database = Database(uri, password)
    database.upgrade()
    return database


def password_at(place: str) -> str:
    """Returns the password at `place` (see `secrets.PLACES`); "" if `place` is empty.

    Raises:
      UsageError: there is no password at `place`.
    """
    return read_secret(place, "--database_password").strip() if place else ""


def parse_uri(uri: str) -> sa.URL:
    """Parses a database's URI; raises `UsageError` if it cannot be used."""
    known = "write sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
    try:
        url = sa.make_url(uri)
    except (sa.exc.ArgumentError, ValueError):
        said = re.sub(r":[^:/@][^@]*@", ":***@", uri)
        raise UsageError(f"{said!r} is not a database; {known}") from None
    shown = url.render_as_string(hide_password=True)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise UsageError(f"{shown} is a database that chatflow does not write to; {known}")
    if secret := sorted(name for name in url.query if "password" in name):
        raise UsageError(
            f"{url.host or url.database}: ?{secret[0]}= would be shown to others; "
            "say with --database_password where the password is"
        )
    if url.drivername == "postgresql+psycopg" and not _is_near(url):
        # libpq's own default, prefer, falls back to clear text.
        mode = {"sslmode": os.environ.get("PGSSLMODE", "verify-full")}
        if mode["sslmode"] == "verify-full" and not os.environ.get("PGSSLROOTCERT"):
            mode["sslrootcert"] = "system"
        if "sslmode" not in url.query:
            url = url.update_query_dict({**mode, **url.query})
    if not url.database or url.database == ":memory:":
        raise UsageError(f"{shown} names no {'file' if 'sqlite' in shown else 'database'}; {known}")
    if url.drivername == "sqlite" and not (folder := Path(url.database).parent).is_dir():
        raise UsageError(f"{shown}: there is no folder {folder}; create it first")
    return url


def _is_near(url: sa.URL) -> bool:
    """Returns whether a database server is on this machine: on loopback, or a Unix socket."""
    hosts = url.query.get("host", url.host or "")
    names = [hosts] if isinstance(hosts, str) else hosts
    return all(not name or name.startswith("/") or name in LOOPBACK for name in names)


def check_there(uri: str) -> None:
    """Raises `UsageError` if a URI cannot be used, or its SQLite file does not exist."""
    url = parse_uri(uri)
    if url.drivername == "sqlite" and not Path(url.database or "").exists():
        raise UsageError(f"{url.database}: there is no such file")


def private(path: str | Path) -> Path:
    """Creates a file that only this user may read, if there is none; returns its path.

    Does not raise errors: those of opening the file say what is wrong.
    """
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return Path(path)


def _make_private(_: Any, __: Any, arguments: Any, ___: Any) -> None:
    private(arguments[0])  # SQLite's other files have the mode of this one


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions
    connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite itself does not wait while another connection changes the mode of a new file.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and then writes would fail if another wrote in between.
    reads = connection.get_execution_options().get("reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _migrations() -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", "chatflow.database:migrations")
    return config


@functools.cache
def _steps() -> tuple[Any, ...]:
    """Returns the schema's versions, newest first."""
    return tuple(alembic.script.ScriptDirectory.from_config(_migrations()).walk_revisions())
