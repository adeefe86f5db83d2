"""Knows who is signed in, by cookie; uses the database, which all consoles share."""

from __future__ import annotations

import logging
import secrets
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from chatflow.console.people import People, Person, digest_of
from chatflow.database.connections import Database
from chatflow.database.tables import sessions
from chatflow.errors import one_line
from chatflow.records import now

_log = logging.getLogger(__name__)

LONGEST = timedelta(hours=12)
"""How long a person stays signed in at most."""

IDLE = timedelta(minutes=30)
"""How long a person stays signed in without opening a page."""

NEW = timedelta(minutes=15)
"""How long after signing in a person may end sessions, as nobody may with an open page alone."""

SEEN = timedelta(minutes=1)
"""How exactly the last visit of a person is stored."""

METHODS = {"token": "token", "code": "printed address", "openid": "OpenID"}
"""How people sign in."""


class Sessions:
    """Begins, finds and ends sessions.

    A session's key is a hash of its cookie. It ends when the person loses access or has another
    token, after `idle` without a visit, and after `LONGEST`.
    """

    def __init__(self, database: Database, people: People, idle: timedelta = IDLE):
        self._database, self._people, self._idle = database, people, idle

    def begin(self, person: Person, method: str, address: str) -> str:
        """Signs a person in; returns the cookie's value."""
        value, moment = secrets.token_urlsafe(32), now()
        with self._database.write() as connection:
            connection.execute(sa.delete(sessions).where(sa.not_(self._fresh())))
            connection.execute(
                sa.insert(sessions).values(
                    session_hash=digest_of(value),
                    who=person.name,
                    method=method,
                    credential=self._credential(person.name, method),
                    address=address,
                    began_at=moment,
                    seen_at=moment,
                    expires_at=moment + LONGEST,
                )
            )
        return value

    def who(self, value: str, visits: bool = False) -> Person | None:
        """Returns who has a session; `visits` means that they do something, and are not idle."""
        key = sessions.c.session_hash == digest_of(value)
        with self._database.read() as connection:
            found = connection.execute(sa.select(sessions).where(key, self._fresh())).one_or_none()
        if found is None or found.credential != self._credential(found.who, found.method):
            return None
        if visits and found.seen_at < now() - SEEN:
            try:
                with self._database.write() as connection:
                    connection.execute(sa.update(sessions).where(key).values(seen_at=now()))
            except sa.exc.DBAPIError as error:  # the next visit tries it again
                _log.warning("a visit was not noted: %s", one_line(error))
        return self._people.person(found.who)

    def is_new(self, value: str) -> bool:
        """Returns whether the person signed in during the last `NEW`."""
        key = sessions.c.session_hash == digest_of(value)
        query = sa.select(sessions.c.session_hash).where(key, sessions.c.began_at > now() - NEW)
        with self._database.read() as connection:
            return connection.execute(query).one_or_none() is not None

    def end(self, value: str) -> None:
        self.end_keys([digest_of(value)])

    def end_keys(self, keys: list[str], who: str = "") -> int:
        """Ends sessions by their keys, only those of a person if `who` is given."""
        these = [sessions.c.session_hash.in_(keys)] + ([sessions.c.who == who] if who else [])
        with self._database.write() as connection:
            return connection.execute(sa.delete(sessions).where(*these)).rowcount

    def listed(self, who: str = "") -> list[dict[str, Any]]:
        """Returns the sessions of a person, or of all, the newest visit first."""
        query = sa.select(sessions).where(self._fresh()).order_by(sessions.c.seen_at.desc())
        with self._database.read() as connection:
            rows = connection.execute(query.where(sessions.c.who == who) if who else query)
            return [
                dict(row)
                for row in rows.mappings()
                if row["credential"] == self._credential(row["who"], row["method"])
            ]

    def _credential(self, name: str, method: str) -> str:
        return "" if method == "openid" else self._people.credential(name)

    def _fresh(self) -> sa.ColumnElement[bool]:
        moment = now()
        return sa.and_(sessions.c.expires_at > moment, sessions.c.seen_at > moment - self._idle)
