"""Calls vLLM's server on this machine, once for each part of a request."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import aiohttp

from chatflow.models.remote.clients import Reply, Turn
from chatflow.models.remote.faults import Fault, Kind, MalformedReplyError
from chatflow.models.remote.openai import (
    OpenAIClient,
    completion,
    paid_for,
    reply_of,
    schema_fields,
)
from chatflow.models.requests import Part
from chatflow.network import session
from chatflow.options import RemoteSettings

if TYPE_CHECKING:
    from chatflow.models.vllm.server import VllmServer

TOP = 20
"""The number of likeliest first tokens to find the choices in; vLLM's default maximum."""


class VllmClient(OpenAIClient):
    """A client of a server on this machine, which it restarts if the server has ended.

    With `instruct` it asks for chat completions, else for completions. For a part with choices, the
    reply's text is a JSON list of their log-probabilities.
    """

    def __init__(self, name: str, server: VllmServer, settings: RemoteSettings, instruct: bool):
        super().__init__(name, settings)
        self.instruct = instruct
        self._server = server
        self._start: asyncio.Future[None] | None = None

    async def prepare(self) -> None:
        """Waits for the server; concurrent callers share one start and its outcome."""
        if self._server.runs and (self._start is None or self._start.done()):
            return
        if self._start is None or self._start.done():
            self._start = asyncio.ensure_future(asyncio.to_thread(self._server.start_again))
        await asyncio.shield(self._start)

    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        path = "chat/completions" if self.instruct else "completions"
        reply = await self.post(self.address(path), self._body(turns, part))
        return _scores_of(reply, part) if part.choices else reply_of(reply)

    def address(self, path: str) -> str:
        return f"{self._server.address}/v1/{path}"

    async def new_session(self) -> aiohttp.ClientSession:
        return await session(verified=False, trust_env=False)  # on this machine

    def _body(self, turns: Sequence[Turn], part: Part) -> dict[str, Any]:
        if part.choices:  # nothing is generated
            part = dataclasses.replace(part, max_tokens=1, stop=(), schema=None)
        if self.instruct:
            content = completion(turns, part, self.settings.response_format)
        else:
            prompt = "\n\n".join(turn.text for turn in turns)
            schema = schema_fields(part.schema, self.settings.response_format)
            limits = {"max_tokens": part.max_tokens, "temperature": 0}
            content = {"prompt": prompt, **limits, **schema}
        content["model"] = self.name
        if part.stop:
            content["stop"] = list(part.stop)
        if part.choices and self.instruct:
            content |= {"logprobs": True, "top_logprobs": TOP}
        elif part.choices:
            content["logprobs"] = TOP
        return content

    async def check(self) -> str:
        await self.prepare()
        return f"{self.name} exists"


def _scores_of(content: Any, part: Part) -> Reply | Fault:
    """Returns the log-probability of each choice's first token, as a reply with JSON text.

    A token that begins several choices does not distinguish them, and is ignored.
    """
    try:
        usage, found = content.get("usage") or {}, content["choices"][0]["logprobs"]
        paid = paid_for(usage)
        if "content" in found:
            tops = {top["token"]: top["logprob"] for top in found["content"][0]["top_logprobs"]}
        else:
            tops = dict(found["top_logprobs"][0])
        least = min(tops.values())  # an upper bound for a choice that is not among them
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        said = f"no log-probabilities in the reply: {error!r}"
        raise MalformedReplyError("bad_reply", said, json.dumps(content)[:2000]) from None
    by_choice: dict[str, list[float]] = {choice: [] for choice in part.choices}
    for token, score in tops.items():
        begun = [choice for choice in by_choice if _begins(choice, token)]
        if len(begun) == 1:
            by_choice[begun[0]].append(score)
    if not any(by_choice.values()):
        choices = list(part.choices)
        said = f"none of the {TOP} likeliest tokens begins just one of {choices}: {list(tops)}"
        return Fault(Kind.FATAL, "no_choice", said, 0.0, None, *paid)
    return Reply(json.dumps([max(scores, default=least) for scores in by_choice.values()]), *paid)


def _begins(choice: str, token: str) -> bool:
    # Tokenizers differ in how they return a word's leading space.
    return bool(token.strip()) and choice.strip().startswith(token.strip())
