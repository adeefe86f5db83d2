"""Defines the web application and its server: routes requests to pages."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from chatflow.console import pages
from chatflow.console.connections import HEAD_BYTES, Connection
from chatflow.console.guard import FormError, Guard, page_of, read_form
from chatflow.console.outbox import Publisher
from chatflow.console.retention import forget
from chatflow.console.site import Console
from chatflow.database.connections import Database, clock
from chatflow.database.raw import forget_raw
from chatflow.errors import UsageError, one_line

FORGET_SECONDS = 3600.0
"""Seconds between two deletions of old chats."""

AUDIT_SECONDS = 1.0
"""Seconds until entries of the audit log are in the database."""

_log = logging.getLogger(__name__)


def app(console: Console) -> Starlette:

    def get(path: str, endpoint: Callable[..., Response]) -> Route:
        return Route(path, lambda request: endpoint(console, request))

    def post(path: str, endpoint: Callable[..., Response]) -> Route:
        """Returns a route that accepts only forms of this console's own pages."""

        async def respond(request: Request) -> Response:
            try:
                form = await read_form(request)
            except FormError as error:
                return PlainTextResponse(f"{error}\n", error.status, {"Connection": "close"})
            except ClientDisconnect:
                return PlainTextResponse("The form did not arrive.\n", 400)
            sent = form.get("csrf", "").encode()
            if not hmac.compare_digest(sent, console.csrf_of(request).encode()):
                raise HTTPException(403, "This page expired. Reload it and try again.")
            return await run_in_threadpool(endpoint, console, request, form)

        return Route(path, respond, methods=["POST"])

    async def show_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            path = request.scope["path"]
            _log.error("%s failed: %s", path, one_line(error), exc_info=error)
            error = HTTPException(500, "Something went wrong; see the console's log.")
        back = page_of(request) if request.method == "POST" else "/"
        return console.page(request, "error", error.status_code, error=error, back=back)

    return Starlette(
        routes=[
            get("/", pages.show_inbox),
            get("/drafts/{draft_id}", pages.show_draft),
            *(post(f"/drafts/{{draft_id}}/{name}", pages.decide) for name in pages.ACTIONS),
            post("/search", pages.search),
            get("/history", pages.show_history),
            get("/dashboard", pages.show_dashboard),
            get("/labelled.jsonl", pages.export),
            get("/sessions", pages.show_sessions),
            post("/sessions", pages.end_sessions),
            get("/audit", pages.show_audit),
            Route("/changes", console.changes.stream),
            get("/sign-in", pages.show_sign_in),
            post("/sign-in", pages.sign_in),
            get("/sign-in/openid", pages.begin_openid),
            get("/sign-in/openid/back", pages.end_openid),
            post("/sign-out", pages.sign_out),
            get("/healthz", pages.health),
            Mount("/static", _Static(packages=[("chatflow.console", "static")])),
        ],
        middleware=[Middleware(Guard, console=console)],
        exception_handlers={HTTPException: show_error, 500: show_error},
        lifespan=lambda _: _running(console),
    )


@contextlib.asynccontextmanager
async def _running(console: Console) -> AsyncIterator[None]:
    """Publishes replies, looks for changes and deletes old chats while the server runs."""
    publisher = None
    if console.replies:
        publisher = Publisher(console.database, console.replies, console.raw)
        publisher.start()
    tasks = [
        asyncio.create_task(console.changes.look()),
        asyncio.create_task(_store_audit(console)),
    ]
    if console.keep:
        tasks.append(asyncio.create_task(_forget(console, console.keep)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        if publisher:
            await run_in_threadpool(publisher.stop)
        await run_in_threadpool(console.audit.close)


async def _store_audit(console: Console) -> None:
    while True:
        await asyncio.sleep(AUDIT_SECONDS)
        await run_in_threadpool(console.audit.store)


async def _forget(console: Console, keep: timedelta) -> None:
    """Deletes chats that were unchanged for `keep`, now and then once every hour."""
    while True:
        deleted = 0
        try:
            database, raw = console.database, console.raw or console.database
            before = await run_in_threadpool(_time_of, database) - keep
            while count := await run_in_threadpool(forget, database, before):
                deleted += count
            await run_in_threadpool(forget_raw, raw, database, before)
        except sa.exc.SQLAlchemyError as error:
            _log.warning("old chats were not deleted, trying again: %s", one_line(error))
        if deleted:
            _log.info("deleted %d chats, unchanged for %s", deleted, keep)
        await asyncio.sleep(FORGET_SECONDS)


def _time_of(database: Database) -> datetime:
    """Returns the time of the database's clock, because this machine's may be wrong."""
    with database.read() as connection:
        return clock(connection)


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"  # browsers check for a newer one
        if response.headers.get("Content-Type", "").endswith("+xml"):  # a 304 has none
            response.headers["Content-Type"] += "; charset=utf-8"
        return response


class Server(uvicorn.Server):
    """Serves a console on a socket that already listens; set `should_exit` to stop it.

    With files of a certificate and its key, by HTTPS.
    """

    def __init__(
        self, console: Console, listener: socket.socket, cert: str = "", key: str = ""
    ) -> None:
        """Raises `UsageError` if the certificate cannot be used."""
        config = uvicorn.Config(
            app(console),
            http=Connection,
            ws="none",
            h11_max_incomplete_event_size=HEAD_BYTES,
            ssl_certfile=cert or None,
            ssl_keyfile=key or None,
            log_level="error",  # warnings are of requests that are not HTTP
            access_log=False,  # URLs contain search terms
            proxy_headers=False,  # `Guard` reads them, from trusted proxies only
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        try:
            config.load()
        except OSError as error:  # also of ssl
            raise UsageError(f"--tls_cert={cert}, --tls_key={key}: {one_line(error)}") from None
        self._console, self._listener = console, listener

    def serve_forever(self) -> None:
        self.run(sockets=[self._listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._console.changes.end()
        await super().shutdown(sockets)
