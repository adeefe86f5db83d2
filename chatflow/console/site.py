"""Console: holds the parts that pages need, and renders pages."""

from __future__ import annotations

import base64
import dataclasses
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import jinja2
import pydantic_core
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from chatflow.console import inbox
from chatflow.console.audit import Audit
from chatflow.console.changes import Changes
from chatflow.console.controls import controls_in, visible
from chatflow.console.outbox import Replies
from chatflow.console.people import OWN_HOSTS, People, Person, redacted
from chatflow.console.rates import Rate
from chatflow.console.sessions import IDLE, Sessions
from chatflow.database.connections import Database
from chatflow.database.keys import console_key, signed
from chatflow.database.raw import Hidden, Key, values_of
from chatflow.errors import one_line
from chatflow.records import now
from chatflow.redaction.placeholders import fill

if TYPE_CHECKING:
    from chatflow.console.openid import Provider

_log = logging.getLogger(__name__)

FAILURES = 10
"""Wrong tokens that an address may try in a minute."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass
class Console:
    """The parts and settings that the pages need.

    Attributes:
      replies: where approved replies go; if None, another console has to send them.
      raw: the database of `--keep_raw`, with the values of placeholders; default: the same one.
      keep: how long unchanged chats are kept; None means forever.
      hosts: names under which the console accepts requests; refusing others prevents DNS rebinding.
      idle: how long a person stays signed in without opening a page.
      openid: signs people in, besides tokens.
      audit_log: a file of JSON lines for the entries of the audit log; "": the database alone.
    """

    database: Database
    people: People
    replies: Replies | None = None
    raw: Database | None = None
    undo_seconds: float = 10.0
    keep: timedelta | None = None
    hosts: Sequence[str] = OWN_HOSTS
    idle: timedelta = IDLE
    audit_log: str = ""
    openid: Provider | None = None

    def __post_init__(self) -> None:
        self.raw = self.raw or self.database
        self.sessions = Sessions(self.database, self.people, self.idle)
        self.changes = Changes(self.database, self.is_signed_in)
        self.audit = Audit(self.database, self.audit_log)
        self.failures = Rate(FAILURES)
        self.met = Rate(1, self.idle.total_seconds())
        with self.database.read() as connection:
            self.key = console_key(connection)
        self._seal = AESGCM(bytes.fromhex(signed(self.key, "addresses")))
        source = jinja2.PackageLoader("chatflow.console", "templates")
        self._templates = jinja2.Environment(
            loader=source,
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["percent"] = lambda x: "–" if x is None else f"{100 * x:.0f}%"
        self._templates.filters["duration"] = duration
        self._templates.filters["iso"] = lambda moment: moment.isoformat(timespec="seconds")
        self._templates.filters["visible"] = visible
        self._templates.filters["controls"] = controls_in
        self._templates.filters["utc"] = lambda moment: moment.strftime("%Y-%m-%d %H:%M UTC")
        self._attributes: tuple[float, list[str]] = (0.0, [])

    def page(
        self,
        request: Request,
        name: str,
        status: int = 200,
        hidden: Mapping[Key, Mapping[str, str]] = {},
        **values: Any,
    ) -> Response:
        """Returns a page; `hidden` has the values of placeholders (see `hidden_in`)."""
        person: Person | None = request.scope.get("person")

        def shown(text: str | None, of: Mapping[str, Any]) -> str | None:
            """Returns a text of a draft, chat or event as this person may see it."""
            return visible(editable(text, of))

        def editable(text: str | None, of: Mapping[str, Any]) -> str | None:
            """Returns the same, with characters that nobody sees."""
            if text is None or not (person and person.reads_texts):
                return redacted(text)
            return filled(text, of)

        def filled(text: str, of: Mapping[str, Any]) -> str:
            return fill(text, hidden.get((of["chat_id"], of["revision"]), {}))

        def known(name: str) -> str:
            """Returns an id or attribute as this person may see it, the same one always alike."""
            if person is None or person.reads_ids:
                return visible(name) or ""
            return f"•{signed(self.key, 'id', name)[:6]}"

        text = self._templates.get_template(f"{name}.html.jinja").render(
            person=person,
            people=self.people,
            csrf=self.csrf_of(request),
            key_of_browser=signed(self.key, "browser", person.name) if person else "",
            shown=shown,
            editable=editable,
            filled=filled,
            known=known,
            path=request.scope["path"],
            moment=now(),
            asked=request.scope["asked"],
            publishes=self.replies is not None,
            **values,
        )
        return HTMLResponse(text, status, HEADERS)  # `Guard` does not see all responses

    def csrf_of(self, request: Request) -> str:
        """Returns the token in a person's forms, which another site or person cannot know."""
        person = request.scope["person"]
        return signed(self.key, "csrf", request.scope["session"], person.name if person else "")

    def sealed(self, values: Mapping[str, str]) -> str:
        """Returns values for an address, so that only this console can read them; "" for none."""
        text = pydantic_core.to_json({name: value for name, value in values.items() if value})
        if text == b"{}":
            return ""
        nonce = secrets.token_bytes(12)
        return base64.urlsafe_b64encode(nonce + self._seal.encrypt(nonce, text, None)).decode()

    def unsealed(self, text: str) -> dict[str, str]:
        """Returns the values of `sealed`, with the text itself; none if it is from elsewhere."""
        try:
            data = base64.urlsafe_b64decode(text)
            found: dict[str, str] = pydantic_core.from_json(
                self._seal.decrypt(data[:12], data[12:], None)
            )
        except (ValueError, InvalidTag):
            return {}
        return {**found, "sealed": text}

    def is_signed_in(self, request: Request) -> bool:
        """Returns whether the person who sent a request may still use the console."""
        if self.people.has_sessions and "authorization" not in request.headers:
            return self.sessions.who(request.scope["session"]) is not None
        return self.people.person(request.scope["person"].name) is not None

    def hidden_in(self, request: Request, *found: Mapping[str, Any] | None) -> Hidden:
        """Returns the values of placeholders in drafts and chats, if the person may see them."""
        if not request.scope["person"].decides:
            return {}
        assert self.raw is not None  # set at the start
        keys = [(one["chat_id"], one["revision"]) for one in found if one]
        try:
            hidden = values_of(self.raw, keys)
        except sa.exc.SQLAlchemyError as error:
            _log.warning("placeholders are not filled in: %s", one_line(error))
            return {}
        if hidden and is_visit(request):
            chats = sorted({key[0] for key in hidden})
            self.audit.note(request, "revealed", f"{len(chats)} chats: {', '.join(chats)}")
        return hidden

    def known_attributes(self, connection: sa.Connection) -> list[str]:
        """Returns attributes, cached for up to 30 seconds because the query reads all chats."""
        asked, known = self._attributes
        if time.monotonic() - asked > 30 or not known:
            known = inbox.known_attributes(connection)
            self._attributes = time.monotonic(), known
        return known


def is_visit(request: Request) -> bool:
    """Returns whether a person asked for a page, and not a page that refreshes itself."""
    return request.headers.get("sec-fetch-dest") != "empty"


def duration(seconds: float | None) -> str:
    """Returns a duration for people: 8 s, 3 min, 2.5 h, 4 days."""
    if seconds is None:
        return "–"
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= size:
            amount = seconds / {"days": 86_400, "h": 3600, "min": 60}[unit]
            return (
                f"{amount:.0f} {unit}" if amount >= 10 or unit == "min" else f"{amount:.1f} {unit}"
            )
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
