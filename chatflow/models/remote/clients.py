"""What a client of a service does: one call; what is said in it, and what comes back."""

from __future__ import annotations

import abc
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

from chatflow.models.remote.faults import Fault, HttpError, Kind, MalformedReplyError
from chatflow.models.requests import Part


class Turn(NamedTuple):
    """What was said: by `user` or `model`."""

    role: str
    text: str


class Reply(NamedTuple):
    """A model's answer to one call; fields as of `Answer`."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finish_reason: str = "stop"


def checked(reply: Reply, blocked: str = "") -> Reply | Fault:
    """The reply, or why it is none.

    Args:
      blocked: the service's word for why it kept the answer back.
    """
    paid = (reply.prompt_tokens, reply.answer_tokens)
    if blocked:
        said = f"the service blocked it: {blocked}"
        return Fault(Kind.FATAL, "blocked", said, 0.0, reply.text or None, *paid)
    if not reply.text.strip():
        # At the limit a second call ends the same way.
        kind = Kind.FATAL if reply.finish_reason == "length" else Kind.MALFORMED
        said = f"the service gave no text; finish reason {reply.finish_reason}"
        return Fault(kind, "no_answer", said, 0.0, None, *paid)
    return reply


class Client(abc.ABC):
    """Speaks to one service. All methods are called on one event loop."""

    async def prepare(self) -> None:  # noqa: B027 (not all have something to prepare)
        """What the first call needs; done before each, at no cost when it was done."""

    @abc.abstractmethod
    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        """One call, never tried again; may raise whatever `faults.classify` knows."""

    @abc.abstractmethod
    async def check(self) -> str:
        """Asks whether the model is there, without paying for an answer; says what was found.

        Raises:
          UsageError: it is there, but cannot answer.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Ends all connections."""


async def post(
    http: aiohttp.ClientSession,
    url: str,
    content: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Sends JSON, and gives the JSON of the reply.

    Raises:
      HttpError: the status is not 200.
      MalformedReplyError: the reply is no JSON.
      aiohttp.ClientError: there is no reply.
    """
    data = json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    async with http.post(url, data=data, headers=headers) as response:
        if response.status != 200:
            text = ""
            with contextlib.suppress(aiohttp.ClientError):
                text = await response.text(errors="replace")
            raise HttpError(response.status, text, response.headers)
        text = await response.text(errors="replace")
    try:
        return json.loads(text)
    except ValueError as error:
        said = f"the reply is no JSON: {error}"
        raise MalformedReplyError("malformed", said, text[:2000]) from None
