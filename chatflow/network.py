"""What clients of services have in common: trust, and how long a service asks to wait."""

from __future__ import annotations

import email.utils
import logging
import os
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Any

import tenacity

_log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try; then twice as long each time."""


def wait_of(error: Any) -> float:
    """Seconds to wait, as an error or an answer asks: by Retry-After or google.rpc.RetryInfo."""
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
    """The details of a Google API's error: JSON as it came, or messages of gRPC."""
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
    """Whose certificates are taken: as google-genai does it."""
    import certifi

    return ssl.create_default_context(
        cafile=os.environ.get("SSL_CERT_FILE", certifi.where()),
        capath=os.environ.get("SSL_CERT_DIR"),
    )


def attempts(
    what: str,
    seconds: float,
    retry: tenacity.retry_base = tenacity.retry_if_exception_type(),
    first: int = logging.WARNING,
) -> tenacity.Retrying:
    """Returns attempts at something: `for attempt in attempts(…): with attempt: …`.

    After the last one, when the time is over, the error itself is raised.

    Args:
      retry: which errors pass; all others are raised at once.
      first: the level that the first fault is logged with.
    """

    def log(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        level = first if state.attempt_number == 1 else logging.WARNING
        _log.log(level, "%s failed, trying again: %s", what, state.outcome.exception())

    return tenacity.Retrying(
        retry=retry,
        wait=tenacity.wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
        stop=tenacity.stop_before_delay(seconds),
        before_sleep=log,
        reraise=True,
    )
