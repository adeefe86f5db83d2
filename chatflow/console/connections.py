"""HTTP connections that end if a request is not complete in time."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 15.0
"""Seconds in which a request must be complete, from the first connection or the last response."""

STALLED_SECONDS = 30.0
"""Seconds after which a client that reads nothing of its response is cut off."""

HEAD_BYTES = 16_384
"""Maximum size of a request line with its headers."""

CONNECTIONS = 500
"""Connections at once. One more ends the one that has waited longest for its request."""

_AMBIGUOUS = re.compile(rb"(?<!\r)\n|\r\n[ \t]|\r(?!\n)")
"""Line ends that proxies and servers may read in different ways."""


class Connection(H11Protocol):
    """A connection with limits, because uvicorn waits for the rest of a request for ever."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # All connections of the server that wait, the longest first.
        self._waiting: dict[Connection, None]
        self._waiting = self.server_state.__dict__.setdefault("waiting", {})
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._head = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            oldest = next(iter(self._waiting), self)
            self._waiting.pop(oldest, None)
            oldest.transport.abort()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._waiting.pop(self, None)
        for timer in (self._late, self._stalled):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            seen = (self._head + data).lstrip(b"\r\n")
            self._head, end, _ = seen.partition(b"\r\n\r\n")
            # The last byte may be the first half of a line end.
            half = not end and self._head.endswith(b"\r")
            if _AMBIGUOUS.search(self._head[:-1] if half else self._head):
                self.send_400_response("Lines must end with CR and LF.")
                return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        self._head = b""
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        """Sets the deadline if the client has to send more, or takes it away."""
        waits = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if waits and self not in self._waiting and not self.transport.is_closing():
            self._waiting[self] = None
            self._late = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        elif not waits and self in self._waiting:
            del self._waiting[self]
            if self._late:
                self._late.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()
