"""What clients of services have in common: trust, and how long a service asks to wait."""

from __future__ import annotations

import email.utils
import logging
import os
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Any

_log = logging.getLogger(__name__)


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


def wait_to_try_again(
    error: Exception, what: str, pause: float, give_up: float, level: int = logging.WARNING
) -> float:
    """Waits after a fault; gives the next, longer pause.

    Args:
      pause: in seconds.
      give_up: when there are no more tries, of `time.monotonic`.

    Raises:
      Exception: the error itself, when the time is over.
    """
    if time.monotonic() + pause > give_up:
        raise error
    _log.log(level, "%s failed, trying again: %s", what, error)
    time.sleep(pause)
    return min(2 * pause, 30)
