"""Who is asking: people, their roles, and how they sign in."""

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
"""Names by which only this machine calls itself."""

ROLES = {
    "observer": "sees lists and figures",
    "agent": "also decides on drafts",
    "lead": "also exports labelled chats",
}
"""What people may do; each may do what those before it may."""

SESSION = timedelta(hours=12)
"""How long somebody is signed in."""


class Person(NamedTuple):
    """Somebody who uses the console.

    Attributes:
      reads_texts: else, what chats and drafts say is not shown.
    """

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
    """Who may use the console, and how they say who they are.

    Without `users` and `identity_header` there is no sign-in: whoever reaches the console is
    `local`. That is for one machine alone.

    Attributes:
      local: the person where there is no sign-in.
      users: by name, from the file `--users`: role, and the SHA-256 of a token.
      identity_header: of a reverse proxy, which says who is signed in there.
      proxies: networks from which that header is believed.
      redacted: roles that see no texts.
    """

    local: str
    users: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    identity_header: str = ""
    proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()
    redacted: frozenset[str] = frozenset()

    @property
    def sign_in(self) -> bool:
        """Whether people have to say who they are."""
        return bool(self.users or self.identity_header)

    @property
    def by_token(self) -> bool:
        return self.sign_in and not self.identity_header

    def person(self, name: str) -> Person | None:
        """Somebody by their name; None for one who may not use the console."""
        if self.users:
            user = self.users.get(name)
            return self._person(name, user["role"]) if user else None
        return self._person(name, "agent" if self.identity_header else "lead")

    def _person(self, name: str, role: str) -> Person:
        return Person(name, role, role not in self.redacted)

    def of_token(self, token: str) -> Person | None:
        """Whoever has a token."""
        hashed, found = digest_of(token), None
        for name, user in self.users.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(user.get("token_sha256", ""), hashed):
                found = self.person(name)
        return found

    def is_proxy(self, address: str) -> bool:
        try:
            return any(ipaddress.ip_address(address) in network for network in self.proxies)
        except ValueError:
            return False


def digest_of(secret: str) -> str:
    """A secret as it is kept. Tokens are random, so that a plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_users(path: str) -> dict[str, dict[str, str]]:
    """The file `--users`: a TOML table for each person.

        [ada]
        role = "lead"            # observer, agent or lead
        token_sha256 = "9f86…"   # not needed behind a proxy

    Raises:
      UsageError: it cannot be read, or says something else.
    """
    try:
        found: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--users={path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--users={path}: is not TOML: {error}") from None
    if not found:
        raise UsageError(f"--users={path}: names nobody; --new_token=NAME:ROLE prints an entry")
    for name, user in found.items():
        place = f"--users={path}: {name}"
        if not isinstance(user, dict) or user.get("role") not in ROLES:
            raise UsageError(f"{place}: needs a role: {', '.join(ROLES)}")
        if unknown := sorted(set(user) - {"role", "token_sha256"}):
            raise UsageError(f"{place}: {unknown[0]} is not known; known are role, token_sha256")
        hashed = user.get("token_sha256", "")
        if not isinstance(hashed, str) or not re.fullmatch(r"(?:[0-9a-f]{64})?", hashed):
            raise UsageError(f"{place}: token_sha256 is no SHA-256 in hexadecimal digits")
    return found


def new_token(name: str, role: str) -> tuple[str, str]:
    """A token, and the entry of the file `--users` for it.

    Raises:
      UsageError: there is no such role.
    """
    if role not in ROLES or not name:
        raise UsageError(
            f"--new_token={name}:{role}: it is NAME:ROLE; roles are {', '.join(ROLES)}"
        )
    token = secrets.token_urlsafe(32)
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{_toml(name)}"'
    return token, f'[{key}]\nrole = "{role}"\ntoken_sha256 = "{digest_of(token)}"\n'


def _toml(text: str) -> str:
    return "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text)


class Sessions:
    """Who is signed in, by a cookie; kept in the database, so that all consoles know it.

    A session ends with the token by which it began: it is known by a hash of both.
    """

    def __init__(self, database: Database, people: People):
        self._database, self._people = database, people

    def begin(self, person: Person) -> str:
        """Signs somebody in; gives the cookie's value."""
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
        """By which hash the session would be known, if it were each one's."""
        users = self._people.users.items()
        return {name: digest_of(value + user.get("token_sha256", "")) for name, user in users}


def csrf_of(session: str) -> str:
    """What forms of a session hold, which another site cannot know."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


def redacted(text: str | None) -> str | None:
    """A text, if there is one, of the same shape of which nothing can be read."""
    return None if text is None else re.sub(r"\S+", "•••", text)
