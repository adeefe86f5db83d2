"""Knows the people who may use the console, their roles, and how they sign in."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from chatflow.database.connections import Database
from chatflow.database.tables import sessions
from chatflow.errors import UsageError
from chatflow.records import now

OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Host names that a machine uses only for itself."""

ROLES = {
    "observer": "sees lists and figures",
    "agent": "also decides on drafts",
    "lead": "also exports labelled chats",
}
"""Roles and what they may do; each role may also do what the roles before it may."""

SESSION = timedelta(hours=12)
"""How long a person stays signed in."""


class Person(NamedTuple):
    """A user of the console; without `reads_texts`, texts of chats and drafts are hidden."""

    name: str
    role: str
    reads_texts: bool = True

    @property
    def decides(self) -> bool:
        return self.role in ("agent", "lead") and self.reads_texts

    @property
    def exports(self) -> bool:
        return self.role == "lead" and self.reads_texts


@dataclasses.dataclass(frozen=True)
class People:
    """Who may use the console, and how they identify themselves.

    Without `users` and `identity_header` there is no sign-in: everybody who reaches the console is
    `local`. Use that only on a single machine.

    Attributes:
      users: name to role and SHA-256 of a token, from the file `--users`.
      identity_header: header of a reverse proxy that names the person signed in there.
      proxies: networks from which this header is trusted.
      redacted: roles that see no texts.
    """

    local: str
    users: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    identity_header: str = ""
    proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()
    redacted: frozenset[str] = frozenset()

    @property
    def sign_in(self) -> bool:
        """Returns whether people must sign in."""
        return bool(self.users or self.identity_header)

    @property
    def by_token(self) -> bool:
        return self.sign_in and not self.identity_header

    def person(self, name: str) -> Person | None:
        """Returns a person by name; None if they may not use the console."""
        if self.users:
            user = self.users.get(name)
            return self._person(name, user["role"]) if user else None
        return self._person(name, "agent" if self.identity_header else "lead")

    def _person(self, name: str, role: str) -> Person:
        return Person(name, role, role not in self.redacted)

    def of_token(self, token: str) -> Person | None:
        """Returns the person who has a token, or None."""
        hashed, found = digest_of(token), None
        for name, user in self.users.items():  # compares all, so that timing reveals nothing
            if hmac.compare_digest(user.get("token_sha256", ""), hashed):
                found = self.person(name)
        return found

    def is_proxy(self, address: str) -> bool:
        try:
            return any(ipaddress.ip_address(address) in network for network in self.proxies)
        except ValueError:
            return False


def digest_of(secret: str) -> str:
    """Returns the stored form of a secret. Tokens are random, so a plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_users(path: str) -> dict[str, dict[str, str]]:
    """Reads the file `--users`, a TOML table per person; raises `UsageError` if it is invalid.

    [ada]
    role = "lead"            # observer, agent or lead
    token_sha256 = "9f86…"   # not needed behind a proxy
    """
    try:
        found: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--users={path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--users={path}: is not TOML: {error}") from None
    if not found:
        raise UsageError(f"--users={path}: is empty; --new_token=NAME:ROLE prints an entry")
    for name, user in found.items():
        place = f"--users={path}: {name}"
        if not isinstance(user, dict) or user.get("role") not in ROLES:
            raise UsageError(f"{place}: needs a role: {', '.join(ROLES)}")
        if unknown := sorted(set(user) - {"role", "token_sha256"}):
            raise UsageError(f"{place}: {unknown[0]} is not known; use role and token_sha256")
        hashed = user.get("token_sha256", "")
        if not isinstance(hashed, str) or not re.fullmatch(r"(?:[0-9a-f]{64})?", hashed):
            raise UsageError(f"{place}: token_sha256 is not a SHA-256 in hexadecimal digits")
    return found


def new_token(name: str, role: str) -> tuple[str, str]:
    """Returns a token and its entry for `--users`; raises `UsageError` for an unknown role."""
    if role not in ROLES or not name:
        raise UsageError(
            f"--new_token={name}:{role}: must be NAME:ROLE; roles are {', '.join(ROLES)}"
        )
    token = secrets.token_urlsafe(32)
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{_toml(name)}"'
    return token, f'[{key}]\nrole = "{role}"\ntoken_sha256 = "{digest_of(token)}"\n'


def _toml(text: str) -> str:
    return "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text)


class Sessions:
    """Knows who is signed in, by cookie; uses the database, which all consoles share.

    A session's key is a hash of its cookie and the person's token, so the session ends when the
    token changes.
    """

    def __init__(self, database: Database, people: People):
        self._database, self._people = database, people

    def begin(self, person: Person) -> str:
        """Signs a person in; returns the cookie's value."""
        value = secrets.token_urlsafe(32)
        key = self._keys(value)[person.name]
        with self._database.write() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.expires_at < now()))
            connection.execute(
                sa.insert(sessions).values(
                    session_hash=key, who=person.name, expires_at=now() + SESSION
                )
            )
        return value

    def who(self, value: str) -> str | None:
        keys = self._keys(value).values()
        query = sa.select(sessions.c.who).where(
            sessions.c.session_hash.in_(keys), sessions.c.expires_at > now()
        )
        with self._database.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    def end(self, value: str) -> None:
        keys = self._keys(value).values()
        with self._database.write() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.session_hash.in_(keys)))

    def _keys(self, value: str) -> dict[str, str]:
        """Returns, for each user, the key that a session with this cookie would have."""
        users = self._people.users.items()
        return {name: digest_of(value + user.get("token_sha256", "")) for name, user in users}


def csrf_of(session: str) -> str:
    """Returns the token in a session's forms, which another site cannot know."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


def redacted(text: str | None) -> str | None:
    """Returns the text with each word replaced by dots; None stays None."""
    return None if text is None else re.sub(r"\S+", "•••", text)
