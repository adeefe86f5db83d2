"""Audit log: who came in, what they read and took out, and what was refused."""

from __future__ import annotations

import collections
import json
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request

from chatflow.console.rates import Rate
from chatflow.database.connections import Database
from chatflow.database.tables import audit
from chatflow.errors import UsageError, one_line
from chatflow.records import now

ACTIONS = {
    "signed_in": "signed in",
    "sign_in_failed": "failed to sign in",
    "signed_out": "signed out",
    "session_ended": "ended a session",
    "refused": "was refused",
    "read": "read a chat",
    "revealed": "saw the values of placeholders",
    "exported": "exported labelled chats",
}

PENDING = 10_000
"""Entries that wait for the database at once; the oldest are dropped, from the table alone."""

PAGE = 100
"""Entries per page."""

_LONGEST = 300

_log = logging.getLogger(__name__)


class Audit:
    """Notes entries as lines of a file at once, and as rows of a table soon after.

    So nobody has to wait for the database, and a flood of refusals does not write to it one by
    one. Of one address, at most 60 refusals and 60 failed sign-ins a minute are noted.
    """

    def __init__(self, database: Database, path: str = ""):
        """Raises `UsageError` if the file cannot be written."""
        self._database = database
        self._pending: collections.deque[dict[str, Any]] = collections.deque(maxlen=PENDING)
        self._rates = {"refused": Rate(60), "sign_in_failed": Rate(60)}
        self._lock = threading.Lock()
        self._file = None
        if path:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                said = error.strerror
                raise UsageError(f"--audit_log={path}: cannot be written: {said}") from None

    def note(self, request: Request, action: str, what: str = "", who: str = "") -> None:
        """Notes what the request's person, or `who`, did; `what` must not contain a secret."""
        address, person = request.scope["address"], request.scope.get("person")
        if (rate := self._rates.get(action)) is not None:
            if (over := rate.count(address)) > 1:
                return
            what = "more from this address is not noted for a minute" if over else what
        entry: dict[str, Any] = {
            "at": now(),
            "who": _text(who or (person.name if person else "")),
            "action": action,
            "address": _text(address),
            "what": _text(what),
        }
        self._pending.append(entry)
        if self._file is not None:
            line = json.dumps(entry | {"at": entry["at"].isoformat()}) + "\n"
            try:
                os.write(self._file, line.encode())
            except OSError as error:
                _log.error("the audit log was not written: %s", one_line(error))

    def store(self) -> None:
        """Writes the entries that wait to the table."""
        with self._lock:
            found = [self._pending.popleft() for _ in range(len(self._pending))]
            if not found:
                return
            try:
                with self._database.write() as connection:
                    connection.execute(sa.insert(audit), found)
            except sa.exc.DataError:
                self._store_each(found)
            except sa.exc.SQLAlchemyError as error:
                _log.warning("audit entries wait for the database: %s", one_line(error))
                self._pending.extendleft(reversed(found))

    def _store_each(self, found: Sequence[dict[str, Any]]) -> None:
        """Writes entries one by one, so that one which the database refuses stops no other."""
        for entry in found:
            try:
                with self._database.write() as connection:
                    connection.execute(sa.insert(audit), [entry])
            except sa.exc.DataError as error:
                _log.error("an audit entry is not in the table: %s", one_line(error))
            except sa.exc.SQLAlchemyError:
                self._pending.append(entry)

    def listed(self, who: str = "", action: str = "", page: int = 0) -> list[dict[str, Any]]:
        """Returns a page of entries and one more, the newest first."""
        self.store()
        query = sa.select(audit).order_by(audit.c.audit_id.desc())
        query = query.where(audit.c.who == who) if who else query
        query = query.where(audit.c.action == action) if action in ACTIONS else query
        with self._database.read() as connection:
            found = connection.execute(query.limit(PAGE + 1).offset(PAGE * page)).mappings()
            return [dict(row) for row in found]

    def close(self) -> None:
        self.store()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _text(value: str) -> str:
    """Returns what a database can hold: short, and without NUL characters."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}")[:_LONGEST]
