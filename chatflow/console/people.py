"""Knows the people who may use the console, their roles, and how they sign in."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from chatflow.errors import UsageError
from chatflow.records import now

OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Host names that a machine uses only for itself."""

ROLES = {
    "observer": "sees lists and figures",
    "agent": "also decides on drafts",
    "lead": "also exports labelled chats, and sees the audit log and who is signed in",
}
"""Roles and what they may do; each role may also do what the roles before it may."""

PROXY_SECRET_HEADER = "X-Chatflow-Proxy-Secret"

TOKEN = timedelta(days=90)
"""How long a new token is good, unless somebody changes its entry."""

_log = logging.getLogger(__name__)


class Person(NamedTuple):
    """A user of the console.

    Without `reads_texts`, texts of chats and drafts are hidden; without `reads_ids`, also ids and
    attributes.
    """

    name: str
    role: str
    reads_texts: bool = True
    reads_ids: bool = True

    @property
    def decides(self) -> bool:
        return self.role in ("agent", "lead") and self.reads_texts

    @property
    def exports(self) -> bool:
        return self.role == "lead" and self.reads_texts

    @property
    def leads(self) -> bool:
        return self.role == "lead"


_NAME = re.compile(r"[\w.@+:\\/|=~'!#$%&*?^`{}-]{1,254}")
"""A name that a proxy or an identity provider may say: without blanks, commas, quotation marks and
controls; it has the other characters of e-mail addresses, and of providers' own names."""


def plain_address(text: str) -> str:
    """Returns an address as one text: without port and brackets, and IPv4 within IPv6 as IPv4.

    >>> plain_address("[2001:db8::1]:443"), plain_address("203.0.113.9:5123")
    ('2001:db8::1', '203.0.113.9')
    >>> plain_address("::ffff:10.0.0.2"), plain_address("unknown")
    ('10.0.0.2', 'unknown')
    """
    bare = re.fullmatch(r"\[(.*)\](?::\d+)?|([\d.]+):\d+", text)
    host = (bare[1] or bare[2]) if bare else text
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return text
    return str(getattr(found, "ipv4_mapped", None) or found)


def _same_case(name: str) -> str:
    """Returns an ASCII name in lower case; other letters have look-alikes that fold to ASCII's."""
    return name.lower() if name.isascii() else name


@dataclasses.dataclass(frozen=True)
class People:
    """Who may use the console, and how they identify themselves.

    Without `users`, `identity_header` and `openid`, everybody who has the `code` is `local`, a
    lead; without a code, everybody who reaches the console. Use that only on a single machine.

    Attributes:
      users: name to role and SHA-256 of a token, from the file `--users`.
      identity_header: header of a reverse proxy that names the person signed in there.
      proxies: networks of reverse proxies; only their headers are trusted.
      redacted: roles that see no texts.
      masks_ids: whether these roles see no ids and attributes either.
      code: what `local` signs in with; it is in the printed address.
      openid: whether an OpenID provider may sign people in.
      default_role: role of people whom the proxy or provider knows and `users` does not; "": none.
      proxy_secret: what the proxy must send in `PROXY_SECRET_HEADER`; "": nothing.
    """

    local: str
    users: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    identity_header: str = ""
    proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()
    redacted: frozenset[str] = frozenset()
    masks_ids: bool = False
    code: str = ""
    openid: bool = False
    default_role: str = ""
    proxy_secret: str = ""

    @property
    def others(self) -> bool:
        """Returns whether other people than `local` may use the console."""
        return bool(self.users or self.identity_header or self.openid)

    @property
    def sign_in(self) -> bool:
        """Returns whether people must sign in."""
        return bool(self.others or self.code)

    @property
    def has_sessions(self) -> bool:
        return self.sign_in and not self.identity_header

    @property
    def by_token(self) -> bool:
        """Returns whether somebody may sign in with a token, or the code."""
        has_token = any(user.get("token_sha256") for user in self.users.values())
        return self.has_sessions and (bool(self.code) or has_token)

    def person(self, name: str) -> Person | None:
        """Returns a person by name, in whatever case; None if they may not use the console."""
        if not self.others:
            return self._person(self.local, "lead") if name == self.local else None
        if not _NAME.fullmatch(name) and name not in self.users:
            return None
        for known, user in self.users.items():
            if _same_case(known) == _same_case(name):
                return self._person(known, user["role"])
        by_others = self.identity_header or self.openid
        return self._person(_same_case(name), self.default_role) if by_others else None

    def _person(self, name: str, role: str) -> Person | None:
        if not role:
            return None
        reads = role not in self.redacted
        return Person(name, role, reads, reads or not self.masks_ids)

    def of_token(self, token: str) -> Person | None:
        """Returns the person who has a token, or None."""
        hashed, found = digest_of(token), None
        if not self.others:
            right = self.code and hmac.compare_digest(digest_of(self.code), hashed)
            return self.person(self.local) if right else None
        for name, user in self.users.items():  # compares all, so that timing reveals nothing
            if hmac.compare_digest(_token_of(user), hashed):
                found = self.person(name)
        return found

    def credential(self, name: str) -> str:
        """Returns a hash of what a person signs in with; it changes when the token does."""
        return digest_of(_token_of(self.users.get(name, {})) if self.others else self.code)

    def is_proxy(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(plain_address(address))
            return any(found in network for network in self.proxies)
        except ValueError:
            return False


def _token_of(user: Mapping[str, Any]) -> str:
    """Returns the hash of a user's token; "" if there is none, or it has expired."""
    expires = user.get("expires")
    return "" if expires and expires < now().date() else user.get("token_sha256", "")


def digest_of(secret: str) -> str:
    """Returns the stored form of a secret. Tokens are random, so a plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_users(path: str) -> dict[str, dict[str, Any]]:
    """Reads the file `--users`, a TOML table per person; raises `UsageError` if it is invalid.

    [ada]
    role = "lead"            # observer, agent or lead
    token_sha256 = "9f86…"   # not needed behind a proxy
    expires = 2027-03-01     # the last day of the token
    """
    try:
        found: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--users={path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--users={path}: is not TOML: {error}") from None
    if not found:
        raise UsageError(f"--users={path}: is empty; --new_token=NAME:ROLE prints an entry")
    folded = [name.casefold() for name in found]
    if twice := sorted({name for name in folded if folded.count(name) > 1}):
        raise UsageError(f"--users={path}: {twice[0]} is there twice, in different case")
    for name, user in found.items():
        place = f"--users={path}: {name}"
        if not isinstance(user, dict) or user.get("role") not in ROLES:
            raise UsageError(f"{place}: needs a role: {', '.join(ROLES)}")
        if unknown := sorted(set(user) - {"role", "token_sha256", "expires"}):
            raise UsageError(
                f"{place}: {unknown[0]} is not known; use role, token_sha256 and expires"
            )
        if type(user.get("expires", date.max)) is not date:
            raise UsageError(f"{place}: expires is not a date such as 2027-03-01")
        hashed = user.get("token_sha256", "")
        if not isinstance(hashed, str) or not re.fullmatch(r"(?:[0-9a-f]{64})?", hashed):
            raise UsageError(f"{place}: token_sha256 is not a SHA-256 in hexadecimal digits")
    return found


class UsersFile(Mapping[str, Mapping[str, Any]]):
    """The users of a file, which is read again when it has changed.

    While it is not valid, the users are those that it had before.
    """

    def __init__(self, path: str):
        """Raises `UsageError` if the file is invalid."""
        self._path = path
        self._state = self._state_of_file()
        self._users = read_users(path)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self._current()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def _state_of_file(self) -> tuple[int, ...]:
        try:
            found = Path(self._path).stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _current(self) -> dict[str, dict[str, Any]]:
        state = self._state_of_file()
        if state != self._state:
            self._state = state
            try:
                self._users = read_users(self._path)
            except UsageError as error:
                _log.error("%s; the users are those from before", error)
        return self._users


def new_token(name: str, role: str) -> tuple[str, str]:
    """Returns a token and its entry for `--users`; raises `UsageError` for an unknown role."""
    if role not in ROLES or not name:
        raise UsageError(
            f"--new_token={name}:{role}: must be NAME:ROLE; roles are {', '.join(ROLES)}"
        )
    token = secrets.token_urlsafe(32)
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{_toml(name)}"'
    expires = now().date() + TOKEN
    return token, (
        f'[{key}]\nrole = "{role}"\ntoken_sha256 = "{digest_of(token)}"\nexpires = {expires}\n'
    )


def _toml(text: str) -> str:
    return "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text)


def redacted(text: str | None) -> str | None:
    """Returns the text with each word replaced by dots; None stays None."""
    return None if text is None else re.sub(r"\S+", "•••", text)
