"""Classifies the errors of all clients, services and kinds of endpoints."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import NamedTuple

import aiohttp
import google.auth.exceptions
import grpc
from google.api_core import exceptions as api_core

from chatflow.errors import ElementError, ModelError, UsageError
from chatflow.network import retry_after


class Kind(enum.Enum):
    """What to do about a fault."""

    BUSY = "call again, and less often: refused for load or for a quota"
    PASSING = "call again"
    MALFORMED = "call again, but seldom: there was an answer, and it was paid for"
    FATAL = "calling again would not help"


class Fault(NamedTuple):
    """Why a call failed.

    Attributes:
      reason: a short code for counting, e.g. `http_429`.
      wait: the least seconds before a retry that the service asks for.
      answer, prompt_tokens, answer_tokens, cached_tokens: what the service said and charged
        nevertheless.
    """

    kind: Kind
    reason: str
    error: str
    wait: float = 0.0
    answer: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0


class HttpError(Exception):
    """A service answered with a status other than 200."""

    def __init__(self, status: int, body: str, headers: Mapping[str, str]):
        super().__init__(f"{status}: {body[:500]}")
        self.status, self.headers = status, headers
        try:
            self.details = json.loads(body)
        except ValueError:
            self.details = None


class MalformedReplyError(ModelError):
    """A service's reply does not match its documentation."""


# Other statuses are PASSING from 500 on, and FATAL below.
BY_STATUS: Mapping[int, Kind] = {
    408: Kind.PASSING,  # request timeout
    409: Kind.PASSING,  # gRPC's ABORTED
    425: Kind.PASSING,  # too early
    429: Kind.BUSY,  # too many requests, gRPC's RESOURCE_EXHAUSTED
    499: Kind.PASSING,  # gRPC's CANCELLED, by the service
    501: Kind.FATAL,  # not implemented
    503: Kind.BUSY,  # overloaded, gRPC's UNAVAILABLE
    529: Kind.BUSY,  # overloaded
}

# The first match counts. Statuses are checked first.
BY_TYPE: tuple[tuple[type[Exception], Kind, str], ...] = (
    (MalformedReplyError, Kind.MALFORMED, ""),
    (ElementError, Kind.FATAL, ""),
    (TimeoutError, Kind.PASSING, "timeout"),
    (aiohttp.ClientPayloadError, Kind.MALFORMED, "cut_body"),
    (aiohttp.ClientConnectorCertificateError, Kind.FATAL, "certificate"),
    (aiohttp.InvalidURL, Kind.FATAL, "bad_address"),
    (aiohttp.ClientError, Kind.PASSING, "connection"),
    (google.auth.exceptions.TransportError, Kind.PASSING, "credentials"),
    (google.auth.exceptions.GoogleAuthError, Kind.FATAL, "credentials"),
    (UsageError, Kind.FATAL, "usage"),
    (FileNotFoundError, Kind.FATAL, "credentials"),  # as the next three: of a key file
    (IsADirectoryError, Kind.FATAL, "credentials"),
    (NotADirectoryError, Kind.FATAL, "credentials"),
    (PermissionError, Kind.FATAL, "credentials"),
    (OSError, Kind.PASSING, "connection"),
    # Raised for bad JSON and UTF-8, and by pydantic in google-genai.
    (ValueError, Kind.MALFORMED, "malformed"),
)


def classify(error: Exception) -> Fault:
    """Returns what an error of google-genai, google-auth, aiohttp or a Google API means."""
    if isinstance(error, grpc.RpcError):
        error = api_core.from_grpc_error(error)
    text = f"{type(error).__name__}: {error}"[:1000]
    status = status_of(error)
    if status is not None:
        kind = BY_STATUS.get(status, Kind.PASSING if status >= 500 else Kind.FATAL)
        return Fault(kind, f"http_{status}", text, retry_after(error))
    for types, kind, reason in BY_TYPE:
        if isinstance(error, types):
            if getattr(error, "retryable", False) and kind is Kind.FATAL:  # of google-auth
                kind = Kind.PASSING
            if isinstance(error, ElementError):
                return Fault(kind, error.reason, text, answer=error.answer)
            return Fault(kind, reason, text)
    return Fault(Kind.FATAL, f"client_{type(error).__name__}", text)


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status of an error; for gRPC, Google's equivalent of its code."""
    if isinstance(error, aiohttp.ClientResponseError):
        return None  # aiohttp's own, for a reply that is not HTTP
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and value >= 400:
            return int(value)
    return None
