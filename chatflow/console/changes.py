"""Sends events to open pages when something has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatflow.console import inbox
from chatflow.database.connections import Database
from chatflow.errors import one_line

LOOK_SECONDS = 0.5
"""Seconds between two checks of the database for changes."""

CHECK_SECONDS = 15.0
"""Seconds between two checks whether the person of a stream is still signed in."""

OF_SESSION, STREAMS = 30, 300
"""Streams at once, of a session and of all."""

_log = logging.getLogger(__name__)


class Changes:
    """Tells open pages that something has changed."""

    def __init__(self, database: Database, is_signed_in: Callable[[Request], bool]):
        self._database, self._is_signed_in = database, is_signed_in
        self._waiting: dict[asyncio.Queue[bool], str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_at = 0.0
        self._ended = False

    async def look(self) -> None:
        """Polls the database until cancelled, but only while a page is connected."""
        last, self._loop = "", asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._waiting:
                continue
            try:
                found = await run_in_threadpool(self._state)
            except sa.exc.SQLAlchemyError as error:
                _log.warning("the database could not be checked for changes: %s", one_line(error))
                continue
            if found != last:
                last = found
                self._tell()

    def _tell(self) -> None:
        self._told_at = time.time()
        self._wake(True)

    def _wake(self, changed: bool) -> None:
        for queue in self._waiting:
            if queue.qsize() < 2:
                queue.put_nowait(changed)

    def check_people(self) -> None:
        """Ends the streams of those who are not signed in any more; for all threads."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._wake, False)

    def end(self) -> None:
        """Ends all streams, because the server waits for its responses before it stops."""
        self._ended = True
        self._tell()

    def _state(self) -> str:
        with self._database.read() as connection:
            return inbox.state(connection)

    async def stream(self, request: Request) -> Response:
        """Returns a stream of events; if the page missed a change, the first comes at once."""
        since = re.fullmatch(r"\d+(\.\d+)?", request.query_params.get("since", ""), re.ASCII)
        missed = since is not None and self._told_at > float(since[0])
        session = request.scope["session"]
        of_session = sum(each == session for each in self._waiting.values())
        if of_session >= OF_SESSION or len(self._waiting) >= STREAMS:
            said = "Too many pages wait for changes.\n"
            return PlainTextResponse(said, 503, {"Retry-After": "15"})
        queue: asyncio.Queue[bool] = asyncio.Queue()
        self._waiting[queue] = session
        if missed:
            queue.put_nowait(True)

        async def events() -> AsyncIterator[str]:
            checked = time.monotonic()
            yield "retry: 2000\n\n"
            while not self._ended:
                changed = None  # neither changed nor to be checked
                with contextlib.suppress(TimeoutError):
                    changed = await asyncio.wait_for(queue.get(), CHECK_SECONDS)
                if not changed or time.monotonic() - checked > CHECK_SECONDS:
                    if not await run_in_threadpool(self._is_signed_in, request):
                        return
                    checked = time.monotonic()
                # A comment, so that proxies keep the connection open.
                yield "event: change\ndata:\n\n" if changed else ":\n\n"

        return _Stream(events(), lambda: self._waiting.pop(queue, None))


class _Stream(StreamingResponse):
    """A stream of events that calls `ended` at its end, also if it never began."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], object]):
        super().__init__(events, media_type="text/event-stream")
        self._stream_ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream_ended()
