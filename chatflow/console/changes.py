"""Sends events to open pages when something has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chatflow.console import inbox
from chatflow.database.connections import Database
from chatflow.errors import one_line

LOOK_SECONDS = 0.5
"""Seconds between two checks of the database for changes."""

_log = logging.getLogger(__name__)


class Changes:
    """Tells open pages that something has changed."""

    def __init__(self, database: Database):
        self._database = database
        self._waiting: set[asyncio.Queue[bool]] = set()
        self._told_at = 0.0
        self._ended = False

    async def look(self) -> None:
        """Polls the database until cancelled, but only while a page is connected."""
        last = ""
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
        for queue in self._waiting:
            if queue.empty():
                queue.put_nowait(True)

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

        async def events() -> AsyncIterator[str]:
            queue: asyncio.Queue[bool] = asyncio.Queue()
            self._waiting.add(queue)
            if missed:
                queue.put_nowait(True)
            try:
                yield "retry: 2000\n\n"
                while not self._ended:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(queue.get(), 15)
                        yield "event: change\ndata:\n\n"
                        continue
                    yield ":\n\n"  # so that proxies keep the connection open
            finally:
                self._waiting.discard(queue)

        return StreamingResponse(events(), media_type="text/event-stream")
