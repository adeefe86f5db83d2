"""A stand-in service that receives webhooks, with faults on demand."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from . import Loopback


class Received(NamedTuple):
    """A request that was received."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.body)


class Answer(NamedTuple):
    """The answer to a request."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = MappingProxyType({})


Behaviour = Answer | str
"""An answer, or `reset`, `hang`, `drip` (single bytes without an end), `rubbish`."""


class Hook(Loopback):
    """Records the webhooks that it receives.

    Attributes:
      received: all requests, also those that were refused.
      behave: returns the answer to a request, from it and its number among those of its id.
      most: the most requests at once so far.
    """

    def __init__(self, behave: Callable[[Received, int], Behaviour] = lambda *_: Answer()):
        self.received: list[Received] = []
        self.behave = behave
        self.most = self._now = 0
        self._lock = threading.Condition()
        self._done = threading.Event()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        super().__exit__(*error)

    def __enter__(self) -> Self:
        self._done.clear()
        return super().__enter__()

    def taken(self) -> list[dict[str, Any]]:
        """Returns the records, in order of their chats, each as often as it came."""
        return sorted((r.record for r in self.received), key=lambda record: record["chat_id"])

    def wait(self, until: Callable[[list[Received]], bool], seconds: float = 60) -> bool:
        """Waits until the received requests fulfil a condition."""
        with self._lock:
            return self._lock.wait_for(lambda: until(self.received), seconds)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        got = Received(request.path, dict(request.headers), body, time.time())
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.received.append(got)
            self._lock.notify_all()
            key = got.headers.get("webhook-id")
            tries = sum(other.headers.get("webhook-id") == key for other in self.received)
        try:
            self.answer_with(request, self.behave(got, tries))
        finally:
            with self._lock:
                self._now -= 1

    def answer_with(self, request: BaseHTTPRequestHandler, how: Behaviour) -> None:
        if isinstance(how, Answer):
            request.send_response(how.status)
            for name, value in {"Content-Length": str(len(how.body)), **how.headers}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(how.body.encode())
            return
        request.close_connection = True
        if how == "hang":
            self._done.wait(60)
        elif how == "reset":
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()
        elif how == "rubbish":
            request.wfile.write(b"no HTTP\r\n\r\n")
        else:
            assert how == "drip"
            request.send_response(200)
            request.send_header("Content-Length", "1000000")
            request.end_headers()
            with contextlib.suppress(OSError):
                while not self._done.wait(0.05):
                    request.wfile.write(b" ")
