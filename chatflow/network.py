"""Provides event-loop threads, sessions, TLS and retries to clients of services."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a run that only reads and writes files needs neither
    import aiohttp
    import tenacity

_log = logging.getLogger(__name__)

T = TypeVar("T")

NO_LIMITS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
"""Options of a gRPC channel that takes messages of any size; its default is 4 MB."""

PUBSUB_HOST = "PUBSUB_EMULATOR_HOST"
"""The variable with the address of a Pub/Sub emulator (HOST:PORT)."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try, doubled with each further try; and their maximum."""


class LoopThread:
    """Runs coroutines on an event loop in a daemon thread."""

    def __init__(self, name: str):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and returns its result; called from other threads."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self, last: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Ends the thread after a last coroutine; waits up to two seconds for it."""

        async def end() -> None:
            try:
                await last()
            finally:
                self.loop.call_later(0.1, self.loop.stop)  # google-genai also closes when deleted

        ending = asyncio.run_coroutine_threadsafe(end(), self.loop)
        if threading.current_thread() is not self._thread:  # a finalizer runs in any thread
            with contextlib.suppress(TimeoutError):
                ending.result(timeout=2)


async def session(
    verified: bool = True, cookies: bool = True, **options: Any
) -> aiohttp.ClientSession:
    """Returns a session without limits: callers bound the time and the number of calls."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=trusted() if verified else False),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=None if cookies else aiohttp.DummyCookieJar(),
        **{"trust_env": True, **options},  # proxies
    )


def pubsub_client(kind: str, **options: Any) -> Any:
    """Returns Google's `SubscriberClient` or `PublisherClient`, for messages of any size.

    Google's clients have no limit with the service, but gRPC's own (4 MB) with the emulator, where
    a larger message would block its subscription.
    """
    import google.cloud.pubsub_v1 as pubsub_v1

    made = getattr(pubsub_v1, kind)
    if host := os.environ.get(PUBSUB_HOST):
        import grpc

        channel = grpc.insecure_channel(host, options=NO_LIMITS)
        options["transport"] = made.get_transport_class("grpc")(host=host, channel=channel)
    return made(**options)


def pause(tries: int, wait: float = 0.0) -> float:
    """Returns the seconds before another try, with full jitter, after this number of failed tries.

    `wait` is the time that the service asked for (see `retry_after`); the pause comes on top.
    """
    return wait + random.uniform(0, min(FIRST_PAUSE * 2.0 ** (tries - 1), LONGEST_PAUSE))


def retry_after(error: Any) -> float:
    """Returns the seconds to wait that an error's Retry-After or google.rpc.RetryInfo asks for."""
    headers = getattr(error, "headers", None)
    if headers is None:
        headers = getattr(getattr(error, "response", None), "headers", None)
    asked = [_seconds_of_header((headers or {}).get("Retry-After", ""))]
    for info in _details(getattr(error, "details", None)):
        delay = info.get("retryDelay") if isinstance(info, dict) else None
        if delay is not None:
            asked.append(_number(str(delay).removesuffix("s")))
        elif hasattr(info, "retry_delay"):
            asked.append(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return max(asked)


def _details(details: Any) -> Iterator[Any]:
    """Yields the details of a Google API's error: parsed JSON or gRPC messages."""
    if isinstance(details, dict):
        details = details.get("error", details)
        details = details.get("details") if isinstance(details, dict) else None
    if isinstance(details, Iterable) and not isinstance(details, (str, bytes)):
        yield from details


def _seconds_of_header(value: str) -> float:
    try:
        at = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return _number(value)
    return max(0.0, at.timestamp() - time.time())


def _number(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


def trusted() -> ssl.SSLContext:
    """Returns a TLS context that trusts the same certificates as google-genai."""
    import certifi

    return ssl.create_default_context(
        cafile=os.environ.get("SSL_CERT_FILE", certifi.where()),
        capath=os.environ.get("SSL_CERT_DIR"),
    )


def attempts(
    what: str,
    seconds: float,
    retry: Callable[[tenacity.RetryCallState], bool] | None = None,
    first: int = logging.WARNING,
) -> tenacity.Retrying:
    """Returns attempts for a loop: `for attempt in attempts(…): with attempt: …`.

    Errors that do not match `retry` are raised at once; without it, all match. When the time is up,
    the last error is raised. `first` is the log level of the first fault.
    """
    import tenacity

    def log(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        level = first if state.attempt_number == 1 else logging.WARNING
        _log.log(level, "%s failed, trying again: %s", what, state.outcome.exception())

    return tenacity.Retrying(
        retry=retry or tenacity.retry_if_exception_type(),
        wait=tenacity.wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
        stop=tenacity.stop_before_delay(seconds),
        before_sleep=log,
        reraise=True,
    )
