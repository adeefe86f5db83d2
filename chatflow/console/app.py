"""Defines the web application and its server: routes requests to pages."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from chatflow.console import pages
from chatflow.console.guard import Guard, page_of
from chatflow.console.outbox import Publisher
from chatflow.console.people import csrf_of
from chatflow.console.retention import forget
from chatflow.console.site import Console
from chatflow.database.raw import forget_raw
from chatflow.errors import one_line
from chatflow.records import now

FORGET_SECONDS = 3600.0
"""Seconds between two deletions of old chats."""

_log = logging.getLogger(__name__)


def app(console: Console) -> Starlette:

    def get(path: str, endpoint: Callable[..., Response]) -> Route:
        return Route(path, lambda request: endpoint(console, request))

    def post(path: str, endpoint: Callable[..., Response]) -> Route:
        """Returns a route that accepts only forms of this console's own pages."""

        async def respond(request: Request) -> Response:
            form = await request.form(max_files=0, max_fields=20, max_part_size=200_000)
            sent = str(form.get("csrf", ""))
            if not hmac.compare_digest(sent.encode(), csrf_of(request.scope["session"]).encode()):
                raise HTTPException(403, "This page expired. Reload it and try again.")
            return await run_in_threadpool(endpoint, console, request, form)

        return Route(path, respond, methods=["POST"])

    async def show_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            _log.error("%s failed: %s", request.url.path, one_line(error), exc_info=error)
            error = HTTPException(500, "Something went wrong; see the console's log.")
        back = page_of(request) if request.method == "POST" else "/"
        return console.page(request, "error", error.status_code, error=error, back=back)

    return Starlette(
        routes=[
            get("/", pages.show_inbox),
            get("/drafts/{draft_id}", pages.show_draft),
            *(post(f"/drafts/{{draft_id}}/{name}", pages.decide) for name in pages.ACTIONS),
            get("/history", pages.show_history),
            get("/dashboard", pages.show_dashboard),
            get("/labelled.jsonl", pages.export),
            Route("/changes", console.changes.stream),
            get("/sign-in", pages.show_sign_in),
            post("/sign-in", pages.sign_in),
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
    tasks = [asyncio.create_task(console.changes.look())]
    if console.keep:
        tasks.append(asyncio.create_task(_forget(console, console.keep)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        if publisher:
            await run_in_threadpool(publisher.stop)


async def _forget(console: Console, keep: timedelta) -> None:
    """Deletes chats that were unchanged for `keep`, now and then once every hour."""
    while True:
        deleted = 0
        try:
            database, raw = console.database, console.raw or console.database
            while count := await run_in_threadpool(forget, database, now() - keep):
                deleted += count
            await run_in_threadpool(forget_raw, raw, database, now() - keep)
        except sa.exc.SQLAlchemyError as error:
            _log.warning("old chats were not deleted, trying again: %s", one_line(error))
        if deleted:
            _log.info("deleted %d chats, unchanged for %s", deleted, keep)
        await asyncio.sleep(FORGET_SECONDS)


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"  # browsers check for a newer one
        return response


class Server(uvicorn.Server):
    """Serves a console on a socket that already listens; set `should_exit` to stop it."""

    def __init__(self, console: Console, listener: socket.socket):
        config = uvicorn.Config(
            app(console),
            log_level="warning",
            access_log=False,  # URLs contain search terms
            proxy_headers=False,  # `Guard` reads them, from trusted proxies only
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
