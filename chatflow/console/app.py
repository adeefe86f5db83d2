"""Console: the web application, put together, and its server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any

import jinja2
import sqlalchemy as sa
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from chatflow.console import inbox, pages
from chatflow.console.changes import Changes
from chatflow.console.guard import HEADERS, Guard, page_of
from chatflow.console.outbox import Publisher, Replies
from chatflow.console.people import OWN_HOSTS, People, Person, Sessions, csrf_of, redacted
from chatflow.console.retention import forget
from chatflow.database.connections import Database
from chatflow.errors import one_line
from chatflow.records import now

FORGET_SECONDS = 3600.0
"""Between two looks for chats that are no longer to be kept."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Console:
    """What the pages are made from.

    Attributes:
      replies: where approved replies go; None: they wait for another console.
      undo_seconds: how long an approval can be undone.
      keep: how long chats are kept to which nothing happens; None: for ever.
      hosts: names by which the console may be called; others are refused, so that no page of
        another site can reach it by a name of its own (DNS rebinding).
    """

    database: Database
    people: People
    replies: Replies | None = None
    undo_seconds: float = 10.0
    keep: timedelta | None = None
    hosts: Sequence[str] = OWN_HOSTS

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.database, self.people)
        self.changes = Changes(self.database)
        source = jinja2.PackageLoader("chatflow.console", "templates")
        self._templates = jinja2.Environment(
            loader=source,
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["percent"] = lambda x: "–" if x is None else f"{100 * x:.0f} %"
        self._templates.filters["duration"] = duration
        self._templates.filters["iso"] = lambda moment: moment.isoformat(timespec="seconds")
        self._templates.filters["utc"] = lambda moment: moment.strftime("%Y-%m-%d %H:%M UTC")
        self._attributes: tuple[float, list[str]] = (0.0, [])

    def page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        person: Person | None = request.scope.get("person")
        shown = (lambda text: text) if person and person.reads_texts else redacted
        text = self._templates.get_template(f"{name}.html.jinja").render(
            person=person,
            people=self.people,
            csrf=csrf_of(request.scope["session"]),
            shown=shown,
            path=request.url.path,
            moment=now(),
            asked=request.scope["asked"],
            publishes=self.replies is not None,
            **values,
        )
        return HTMLResponse(text, status, HEADERS)  # also where `Guard` does not see it

    def known_attributes(self, connection: sa.Connection) -> list[str]:
        """As of half a minute ago at most: it takes a look at all chats."""
        asked, known = self._attributes
        if time.monotonic() - asked > 30 or not known:
            known = inbox.known_attributes(connection)
            self._attributes = time.monotonic(), known
        return known

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._get(pages.show_inbox)),
                Route("/drafts/{draft_id}", self._get(pages.show_draft)),
                *(
                    self._post(f"/drafts/{{draft_id}}/{name}", pages.decide)
                    for name in pages.ACTIONS
                ),
                Route("/history", self._get(pages.show_history)),
                Route("/dashboard", self._get(pages.show_dashboard)),
                Route("/labelled.jsonl", self._get(pages.export)),
                Route("/changes", self.changes.stream),
                Route("/sign-in", self._get(pages.show_sign_in)),
                self._post("/sign-in", pages.sign_in),
                self._post("/sign-out", pages.sign_out),
                Route("/healthz", self._get(pages.health)),
                Mount("/static", _Static(packages=[("chatflow.console", "static")])),
            ],
            middleware=[Middleware(Guard, console=self)],
            exception_handlers={HTTPException: self._error, 500: self._error},
            lifespan=self._lifespan,
        )

    def _get(self, endpoint: Callable[..., Response]) -> Callable[..., Any]:
        def respond(request: Request) -> Response:
            return endpoint(self, request)

        return respond

    def _post(self, path: str, endpoint: Callable[..., Response]) -> Route:
        """A route that changes something: only for forms of this console's own pages."""

        async def respond(request: Request) -> Response:
            form = await request.form(max_files=0, max_fields=20, max_part_size=200_000)
            sent = str(form.get("csrf", ""))
            if not hmac.compare_digest(sent.encode(), csrf_of(request.scope["session"]).encode()):
                raise HTTPException(403, "This form is older than your session. Please go back.")
            return await run_in_threadpool(endpoint, self, request, form)

        return Route(path, respond, methods=["POST"])

    async def _error(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            _log.error("%s failed: %s", request.url.path, one_line(error), exc_info=error)
            error = HTTPException(500, "Something went wrong; the console's log says what.")
        back = page_of(request) if request.method == "POST" else "/"
        return self.page(request, "error", error.status_code, error=error, back=back)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        publisher = Publisher(self.database, self.replies) if self.replies else None
        if publisher:
            publisher.start()
        tasks = [asyncio.create_task(self.changes.look())]
        if self.keep:
            tasks.append(asyncio.create_task(self._forget(self.keep)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            if publisher:
                await run_in_threadpool(publisher.stop)

    async def _forget(self, keep: timedelta) -> None:
        """Deletes what is older, now and every hour."""
        while True:
            deleted = 0
            try:
                while count := await run_in_threadpool(forget, self.database, now() - keep):
                    deleted += count
            except sa.exc.SQLAlchemyError as error:
                _log.warning("old chats were not deleted, trying again: %s", one_line(error))
            if deleted:
                _log.info("deleted %d chats, unchanged for %s", deleted, keep)
            await asyncio.sleep(FORGET_SECONDS)


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"  # asks whether it is still the same
        return response


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 8 s, 3 min, 2.5 h, 4 days."""
    if seconds is None:
        return "–"
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= size:
            amount = seconds / {"days": 86_400, "h": 3600, "min": 60}[unit]
            return (
                f"{amount:.0f} {unit}" if amount >= 10 or unit == "min" else f"{amount:.1f} {unit}"
            )
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


class Server(uvicorn.Server):
    """Serves a console on a socket that listens already; `run` it, and set `should_exit`."""

    def __init__(self, console: Console, listener: socket.socket):
        config = uvicorn.Config(
            console.app(),
            log_level="warning",
            access_log=False,  # addresses hold what people search for
            proxy_headers=False,  # `Guard` looks at them, and only from proxies that it trusts
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._console, self._listener = console, listener

    def serve_forever(self) -> None:
        self.run(sockets=[self._listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._console.changes.end()
        await super().shutdown(sockets)
