"""The base class of clients: one call, its turns and its reply."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import google.auth
import google.auth.transport.requests

from chatflow.errors import UsageError
from chatflow.models.remote.faults import Fault, HttpError, Kind, MalformedReplyError
from chatflow.models.requests import Part

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)

LEVELS = {"minimal": 512, "low": 1024, "medium": 4096, "high": 8192}
"""Additional tokens of an answer for the thinking before it, by level of `--thinking`."""


def level_tokens(setting: str) -> int:
    """Returns the tokens that a level of `--thinking` adds; raises `UsageError` for other words."""
    if setting not in LEVELS:
        raise UsageError(
            f"--thinking={setting}: must be auto, none, a number of tokens, or one of "
            f"{', '.join(LEVELS)}"
        )
    return LEVELS[setting]


class Turn(NamedTuple):
    """A message of a conversation; its role is `user` or `model`."""

    role: str
    text: str


class Reply(NamedTuple):
    """A model's answer to one call; the fields are those of `Answer`."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = "stop"


def messages_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Returns turns as OpenAI's and Anthropic's protocols have them."""
    return [
        {"role": "assistant" if turn.role == "model" else turn.role, "content": turn.text}
        for turn in turns
    ]


def raw(content: Any) -> str:
    """Returns the beginning of a reply, for an error."""
    return json.dumps(content, default=str)[:2000]


def checked(reply: Reply, blocked: str = "") -> Reply | Fault:
    """Returns the reply, or a fault if it is empty or `blocked` (the service's own word)."""
    paid = (reply.prompt_tokens, reply.answer_tokens, reply.cached_tokens)
    if blocked:
        said = f"the service blocked the answer: {blocked}"
        return Fault(Kind.FATAL, "blocked", said, 0.0, reply.text or None, *paid)
    if not reply.text.strip():
        # At the limit, a second call would end in the same way.
        kind = Kind.FATAL if reply.finish_reason == "length" else Kind.MALFORMED
        said = f"the service returned no text; finish reason {reply.finish_reason}"
        return Fault(kind, "no_answer", said, 0.0, None, *paid)
    return reply


class Client(abc.ABC):
    """A client of one service. All methods are called on one event loop."""

    async def prepare(self) -> None:  # noqa: B027 (not all have something to prepare)
        """Prepares the first call; called before each call, at no cost once it is done."""

    @abc.abstractmethod
    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        """Makes one call without retries; may raise any error that `faults.classify` knows."""

    @abc.abstractmethod
    async def check(self) -> str:
        """Returns a message if the model exists (free); raises `UsageError` if it cannot answer."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Closes all connections."""


async def post(
    http: aiohttp.ClientSession,
    url: str,
    content: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Sends JSON and returns the JSON of the reply.

    Raises `HttpError` for a status other than 200, `MalformedReplyError` if the reply is not JSON,
    and `aiohttp.ClientError` if there is none.
    """
    data = json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    async with http.post(url, data=data, headers=headers) as response:
        return await _json_of(response)


async def get(http: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> Any:
    """Returns the JSON at an address; raises errors as `post` does."""
    async with http.get(url, headers=headers) as response:
        return await _json_of(response)


async def _json_of(response: aiohttp.ClientResponse) -> Any:
    if response.status != 200:
        text = ""
        with contextlib.suppress(aiohttp.ClientError):
            text = await response.text(errors="replace")
        raise HttpError(response.status, text, response.headers)
    text = await response.text(errors="replace")
    try:
        return json.loads(text)
    except ValueError as error:
        said = f"the reply is not JSON: {error}"
        raise MalformedReplyError("malformed", said, text[:2000]) from None


class GoogleToken:
    """An access token from the machine's own credentials, renewed before it expires."""

    def __init__(self, none: bool):
        self._credentials: Any = None
        self._none = none
        self._lock = threading.Lock()

    async def header(self) -> dict[str, str]:
        if self._none:
            return {}
        if self._credentials is None or not self._credentials.valid:
            await asyncio.to_thread(self._renew)
        headers: dict[str, str] = {}
        self._credentials.apply(headers)
        return headers

    def _renew(self) -> None:
        with self._lock:
            if self._credentials is None:
                self._credentials, _ = google.auth.default(scopes=SCOPES)
            if not self._credentials.valid:
                request = google.auth.transport.requests.Request()
                self._credentials.refresh(request)
