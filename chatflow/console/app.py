"""The web application: pages, decisions, and word of what is new."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import jinja2
import sqlalchemy as sa
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import chatflow
from chatflow.console import dashboard, decisions, inbox
from chatflow.console.decisions import DecisionError
from chatflow.console.labels import labelled
from chatflow.console.outbox import Publisher, Replies
from chatflow.console.people import (
    SESSION,
    People,
    Person,
    Sessions,
    csrf_of,
    redacted,
)
from chatflow.database.connect import Database
from chatflow.errors import one_line
from chatflow.records import LARGEST_INTEGER, now

COOKIE = "chatflow_session"

LOOK_SECONDS = 0.5
"""Between two looks whether something in the database has changed."""

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

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Console:
    """What the pages are made from.

    Attributes:
      replies: where approved replies go; None: they wait for another console.
      undo_seconds: how long an approval can be undone.
      hosts: names by which the console may be called; others are refused, so that no page of
        another site can reach it by a name of its own (DNS rebinding).
    """

    database: Database
    people: People
    replies: Replies | None = None
    undo_seconds: float = 10.0
    hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1")

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.database)
        self.changes = Changes(self.database)
        source = jinja2.PackageLoader("chatflow.console", "templates")
        self._pages = jinja2.Environment(
            loader=source,
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._pages.filters["percent"] = lambda x: "–" if x is None else f"{100 * x:.0f} %"
        self._pages.filters["duration"] = duration
        self._pages.filters["iso"] = lambda moment: moment.isoformat(timespec="seconds")
        self._pages.filters["utc"] = lambda moment: moment.strftime("%Y-%m-%d %H:%M UTC")
        self._attributes: tuple[float, list[str]] = (0.0, [])

    def page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        person: Person | None = request.scope.get("person")
        shown = (lambda text: text) if person and person.reads_texts else _redacted
        text = self._pages.get_template(f"{name}.html.jinja").render(
            person=person,
            people=self.people,
            csrf=csrf_of(request.scope["session"]),
            shown=shown,
            path=request.url.path,
            version=chatflow.__version__,
            moment=now(),
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
                Route("/", self._get(show_inbox)),
                Route("/drafts/{draft_id}", self._get(show_draft)),
                self._post("/drafts/{draft_id}/approve", approve),
                self._post("/drafts/{draft_id}/dismiss", dismiss),
                self._post("/drafts/{draft_id}/save", save),
                self._post("/drafts/{draft_id}/undo", undo),
                Route("/history", self._get(show_history)),
                Route("/dashboard", self._get(show_dashboard)),
                Route("/labelled.jsonl", self._get(export)),
                Route("/changes", self.changes.stream),
                Route("/sign-in", self._get(show_sign_in)),
                self._post("/sign-in", sign_in),
                self._post("/sign-out", sign_out),
                Route("/healthz", self._get(health)),
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
                raise HTTPException(403, "This form is too old. Please reload the page.")
            return await run_in_threadpool(endpoint, self, request, form)

        return Route(path, respond, methods=["POST"])

    async def _error(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            _log.error("%s failed: %s", request.url.path, one_line(error), exc_info=error)
            error = HTTPException(500, "Something went wrong; the console's log says what.")
        return self.page(request, "error", error.status_code, error=error)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        publisher = Publisher(self.database, self.replies) if self.replies else None
        if publisher:
            publisher.start()
        looking = asyncio.create_task(self.changes.look())
        try:
            yield
        finally:
            looking.cancel()
            if publisher:
                await run_in_threadpool(publisher.stop)


def _redacted(text: str | None) -> str | None:
    return None if text is None else redacted(text)


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"  # asks whether it is still the same
        return response


class Guard:
    """Lets nobody in who may not, and has each answer say what browsers may do with it."""

    def __init__(self, app: ASGIApp, console: Console):
        self.app, self.console = app, console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        session = request.cookies.get(COOKIE) or secrets.token_urlsafe(32)
        scope["session"] = session
        secure = self._is_secure(request)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if request.cookies.get(COOKIE) is None and "set-cookie" not in headers:
                    headers.append("Set-Cookie", cookie(session, secure))
            await send(message)

        scope["secure"] = secure
        refusal = self._refusal(request) or await run_in_threadpool(self._sign_in, request)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _is_secure(self, request: Request) -> bool:
        forwarded = request.headers.get("x-forwarded-proto") == "https"
        return request.scope["scheme"] == "https" or (forwarded and self._by_proxy(request))

    def _by_proxy(self, request: Request) -> bool:
        return request.client is not None and self.console.people.is_proxy(request.client.host)

    def _refusal(self, request: Request) -> Response | None:
        """What is refused whoever asks."""
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}")
            origin = urlsplit(request.headers.get("origin", f"//{host.netloc}"))
        except ValueError:
            return PlainTextResponse("This is no address.\n", 400)
        if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
            return PlainTextResponse("No database has NUL characters.\n", 400)
        if "*" not in self.console.hosts and host.hostname not in self.console.hosts:
            return PlainTextResponse(
                f"This console is not called {host.hostname}; --allowed_hosts names it.\n", 400
            )
        if request.method not in ("GET", "HEAD"):
            foreign = origin.netloc != host.netloc
            if foreign or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return PlainTextResponse("This was sent by a page of another site.\n", 403)
        return None

    def _sign_in(self, request: Request) -> Response | None:
        """Finds out who asks; an answer instead, where they have to sign in first."""
        people, path = self.console.people, request.url.path
        person: Person | None
        if not people.sign_in:
            person = people.person(people.local)
        elif people.identity_header:
            # From elsewhere, anybody could say anything.
            name = request.headers.get(people.identity_header, "")
            person = people.person(name) if name and self._by_proxy(request) else None
        else:
            bearer = request.headers.get("authorization", "")
            if bearer.startswith("Bearer "):
                person = people.of_token(bearer.removeprefix("Bearer "))
            else:
                who = self.console.sessions.who(request.scope["session"])
                person = people.person(who) if who else None
        request.scope["person"] = person
        if person or path.startswith("/static/") or path in ("/sign-in", "/healthz"):
            return None
        if people.identity_header:
            return PlainTextResponse("The proxy does not say who you are, or it is unknown.\n", 403)
        if "text/html" in request.headers.get("accept", "") and request.method == "GET":
            return RedirectResponse("/sign-in", 303)
        return PlainTextResponse("Please sign in.\n", 401)


def cookie(value: str, secure: bool, age: int | None = None) -> str:
    parts = [f"{COOKIE}={value}", "Path=/", "HttpOnly", "SameSite=Lax"]
    parts += ["Secure"] if secure else []
    return "; ".join(parts + ([] if age is None else [f"Max-Age={age}"]))


class Changes:
    """Tells open pages that something is new, as server-sent events."""

    def __init__(self, database: Database):
        self._database = database
        self._waiting: set[asyncio.Queue[bool]] = set()
        self._ended = False

    async def look(self) -> None:
        """Looks for changes for as long as somebody wants to know of them."""
        last = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._waiting:
                continue
            try:
                found = await run_in_threadpool(self._state)
            except sa.exc.SQLAlchemyError as error:
                _log.warning("the database was not asked for changes: %s", one_line(error))
                continue
            if found != last:
                last = found
                self._tell()

    def _tell(self) -> None:
        for queue in self._waiting:
            if queue.empty():
                queue.put_nowait(True)

    def end(self) -> None:
        """Ends all streams, for a server that waits for its answers to end."""
        self._ended = True
        self._tell()

    def _state(self) -> str:
        with self._database.read() as connection:
            return inbox.state(connection)

    async def stream(self, request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            queue: asyncio.Queue[bool] = asyncio.Queue()
            self._waiting.add(queue)
            try:
                yield "retry: 2000\n\n"
                while not self._ended:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(queue.get(), 15)
                        yield "event: change\ndata:\n\n"
                        continue
                    yield ":\n\n"  # so that proxies keep the connection
            finally:
                self._waiting.discard(queue)

        return StreamingResponse(events(), media_type="text/event-stream")


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


# The pages.


def show_inbox(console: Console, request: Request) -> Response:
    wanted = inbox.Filter.of(request.query_params)
    person: Person = request.scope["person"]
    with console.database.read() as connection:
        found, more = inbox.listed(connection, wanted, person.reads_texts)
        return console.page(
            request,
            "inbox",
            wanted=wanted,
            drafts=found,
            more=more,
            waiting=inbox.waiting(connection),
            known_attributes=console.known_attributes(connection),
            decided=_decided(connection, request),
            inbox=inbox,
        )


def show_draft(
    console: Console, request: Request, status: int = 200, problem: str = "", typed: str = ""
) -> Response:
    wanted = inbox.Filter.of(request.query_params)
    draft_id = request.path_params["draft_id"]
    with console.database.read() as connection:
        found = inbox.opened(connection, draft_id)
        if found is None:
            raise HTTPException(404, "There is no such draft.")
        texts = request.scope["person"].reads_texts
        before, after = inbox.neighbours(connection, wanted, draft_id, texts)
        return console.page(
            request,
            "draft",
            status,
            wanted=wanted,
            **found,
            seen_chat=decisions.mark_of(found["chat"]),
            before=before,
            after=after,
            problem=problem,
            typed=typed,
            reasons=decisions.REASONS,
            characters=decisions.CHARACTERS,
            undo_seconds=console.undo_seconds,
            decided=_decided(connection, request),
        )


def _decided(connection: sa.Connection, request: Request) -> dict[str, Any] | None:
    """What was decided just now, so that it can be undone."""
    draft_id = request.query_params.get("decided", "")
    found = inbox.opened(connection, draft_id) if draft_id else None
    return found if found and found["draft"]["status"] in ("approved", "dismissed") else None


def approve(console: Console, request: Request, form: FormData) -> Response:
    return _decide(
        console,
        request,
        form,
        lambda connection, draft: decisions.approve(
            connection, *draft, _text(form, "text"), request.scope["person"].name,
            console.undo_seconds,
        ),
    )  # fmt: skip


def dismiss(console: Console, request: Request, form: FormData) -> Response:
    return _decide(
        console,
        request,
        form,
        lambda connection, draft: decisions.dismiss(
            connection, *draft, _text(form, "reason"), _text(form, "comment"),
            request.scope["person"].name,
        ),
    )  # fmt: skip


def save(console: Console, request: Request, form: FormData) -> Response:
    return _decide(
        console,
        request,
        form,
        lambda connection, draft: decisions.save(
            connection, draft[0], draft[1], _text(form, "text"), request.scope["person"].name
        ),
        stay=True,
    )


def undo(console: Console, request: Request, form: FormData) -> Response:
    return _decide(
        console,
        request,
        form,
        lambda connection, draft: decisions.undo(
            connection, draft[0], draft[1], request.scope["person"].name
        ),
        stay=True,
    )


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _number(form: FormData, name: str) -> int:
    """
    Raises:
      ValueError: it is none that a database has.
    """
    number = int(_text(form, name))
    if not 0 <= number <= LARGEST_INTEGER:
        raise ValueError(name)
    return number


def _decide(
    console: Console,
    request: Request,
    form: FormData,
    act: Callable[[sa.Connection, tuple[str, int, str]], None],
    stay: bool = False,
) -> Response:
    """Does what the form says, and goes on to the next draft; or says why it was not done."""
    person: Person = request.scope["person"]
    if not person.decides:
        raise HTTPException(403, f"Your role, {person.role}, may not decide on drafts.")
    draft_id = request.path_params["draft_id"]
    try:
        version = _number(form, "version")
    except ValueError:
        raise HTTPException(400, "This form is not complete.") from None
    wanted = inbox.Filter.of(request.query_params)
    try:
        with console.database.write() as connection:
            act(connection, (draft_id, version, _text(form, "seen_chat")))
    except DecisionError as error:
        # Nothing that was typed is lost.
        return show_draft(console, request, 409, str(error), _text(form, "text"))
    if stay:
        return RedirectResponse(f"/drafts/{draft_id}{wanted.query()}", 303)
    with console.database.read() as connection:
        _, after = inbox.neighbours(connection, wanted, draft_id, person.reads_texts)
    place = f"/drafts/{after}" if after else "/"
    query = wanted.query()
    return RedirectResponse(f"{place}{query}{'&' if query else '?'}decided={draft_id}", 303)


def show_history(console: Console, request: Request) -> Response:
    page = inbox.Filter.of(request.query_params).page
    who = request.query_params.get("who", "")[:200]
    with console.database.read() as connection:
        found = inbox.events(connection, who=who, page=page)
    return console.page(
        request, "history", events=found[: inbox.PAGE], more=len(found) > inbox.PAGE, page=page,
        who=who, reasons=decisions.REASONS,
    )  # fmt: skip


def show_dashboard(console: Console, request: Request) -> Response:
    period = request.query_params.get("period", "")
    period = period if period in dashboard.PERIODS else "day"
    attribute = request.query_params.get("attribute", "")
    with console.database.read() as connection:
        found = dashboard.figures(connection, period, attribute, now())
    return console.page(
        request, "dashboard", period=period, periods=dashboard.PERIODS, figures=found
    )


def export(console: Console, request: Request) -> Response:
    person: Person = request.scope["person"]
    if not person.exports:
        raise HTTPException(403, f"Your role, {person.role}, may not export chats.")

    def lines() -> Iterator[str]:
        with console.database.read() as connection:
            for line in labelled(connection):
                yield line + "\n"

    return StreamingResponse(
        lines(),
        media_type="application/jsonl",
        headers={"Content-Disposition": 'attachment; filename="labelled.jsonl"'},
    )


def show_sign_in(
    console: Console, request: Request, status: int = 200, problem: str = ""
) -> Response:
    if request.scope["person"]:
        return RedirectResponse("/", 303)
    return console.page(request, "sign_in", status, problem=problem)


def sign_in(console: Console, request: Request, form: FormData) -> Response:
    person = console.people.of_token(_text(form, "token").strip())
    if person is None:
        return show_sign_in(console, request, 403, "Nobody has this token.")
    response = RedirectResponse("/", 303)
    value = console.sessions.begin(person)
    age = int(SESSION.total_seconds())
    response.headers["Set-Cookie"] = cookie(value, request.scope["secure"], age)
    return response


def sign_out(console: Console, request: Request, _: FormData) -> Response:
    console.sessions.end(request.scope["session"])
    response = RedirectResponse("/sign-in", 303)
    response.headers["Set-Cookie"] = cookie("", request.scope["secure"], 0)
    return response


def health(console: Console, _: Request) -> Response:
    """Whether the database answers; for those who watch over the console."""
    with console.database.read() as connection:
        connection.execute(sa.select(1))
    return PlainTextResponse("ok\n")
