"""Calls servers that speak OpenAI's chat completions: OpenAI, Azure, Ollama, vLLM and many more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from chatflow.errors import UsageError
from chatflow.models.remote.clients import (
    Client,
    Reply,
    Turn,
    checked,
    level_tokens,
    messages_of,
    raw,
)
from chatflow.models.remote.faults import Fault, HttpError, MalformedReplyError
from chatflow.models.remote.keyed import KeyedClient, joined
from chatflow.models.remote.kind import Remote
from chatflow.models.requests import Part
from chatflow.models.spec import ModelSpec
from chatflow.options import RemoteSettings
from chatflow.secrets import check_place

PREFIX = "openai:"
ADDRESS = "https://api.openai.com/v1"

_THINKS_ALWAYS = re.compile(r"(?:.*/)?(?:o\d|gpt-5(?!.*chat))")
"""OpenAI's thinking models. By default their thinking is longer than an answer may be."""

_THOUGHTS = re.compile(
    r"\s*(?:<think(?:ing)?>|\[THINK\]).*?(?:</think(?:ing)?>|\[/THINK\]|$)", re.DOTALL
)
_END_OF_THOUGHTS = re.compile(r".*(?:</think(?:ing)?>|\[/THINK\])", re.DOTALL)


def schema_fields(schema: Mapping[str, Any] | None, spelling: str) -> dict[str, Any]:
    """Returns the fields of a chat completion that specify the JSON schema of its answer.

    The spelling is one of `RemoteSettings.response_format`. Servers are said to ignore an unknown
    one, so answers are checked nevertheless.
    """
    if not schema or spelling == "none":
        return {}
    if spelling == "response_format":
        form = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": form}}
    return {"guided_json": schema} if spelling == "guided_json" else {spelling: {"json": schema}}


def completion(turns: Sequence[Turn], part: Part, response_format: str) -> dict[str, Any]:
    """Returns the body of a chat completion, without the model's name."""
    return {
        "messages": messages_of(turns),
        "max_tokens": part.max_tokens,
        "temperature": 0,
        **schema_fields(part.schema, response_format),
    }


def reply_of(content: Any) -> Reply | Fault:
    """Reads a chat completion or a completion, without the thinking before its answer.

    Raises `MalformedReplyError` for anything else.
    """
    try:
        choice, usage = content["choices"][0], content.get("usage") or {}
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        said = str(choice.get("finish_reason"))
        reply = Reply(without_thoughts(str(text or "")), *paid_for(usage), said)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MalformedReplyError(
            "bad_reply", f"no chat completion in the reply: {error!r}", raw(content)
        ) from None
    return checked(reply, said if said == "content_filter" else "")


def paid_for(usage: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the tokens read, the tokens written, and how many of those read were cached."""
    details = usage.get("prompt_tokens_details") or {}
    counts = (
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        details.get("cached_tokens"),
    )
    read, written, cached = (int(count or 0) for count in counts)
    return read, written, cached


def without_thoughts(text: str) -> str:
    """Returns an answer without the thinking that a server left in it.

    >>> without_thoughts("<think>Late parcel, hence angry.</think>\\n-1")
    '-1'
    >>> without_thoughts("Late parcel, hence angry.</think>-1")  # the prompt opened it
    '-1'
    """
    for thoughts in (_THOUGHTS, _END_OF_THOUGHTS):
        if found := thoughts.match(text):
            text = text[found.end() :].strip()
    return text


def thinking_of(model: str, setting: str) -> tuple[dict[str, Any], int]:
    """Returns the fields that say how much a model thinks, and the tokens that this adds.

    A number only makes room for that many tokens, because many local models think without being
    told to. Raises `UsageError` for an unknown setting.
    """
    if setting == "auto":
        setting = "low" if _THINKS_ALWAYS.match(model) else "none"
    if setting == "none":
        return {}, 0
    if setting.isdecimal():
        return {}, int(setting)
    return {"reasoning_effort": setting}, level_tokens(setting)


class OpenAIClient(KeyedClient):
    """Calls chat completions at `--api_endpoint`; `name` is the model's there."""

    optional = ("max_tokens", "temperature", "response_format", "reasoning_effort", "stop")
    instead = {"max_tokens": "max_completion_tokens"}  # noqa: RUF012 (never changed)

    def __init__(self, name: str, settings: RemoteSettings):
        super().__init__(name, settings)
        self._thinking, self._headroom = thinking_of(name, settings.thinking)

    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        content = {
            "model": self.name,
            **completion(turns, part, self.settings.response_format),
            **self._thinking,
        }
        content["max_tokens"] += self._headroom
        if self.settings.service_tier != "standard":
            content["service_tier"] = self.settings.service_tier
        return reply_of(await self.post(self.address("chat/completions"), content))

    def address(self, path: str) -> str:
        return joined(self.settings.api_endpoint or ADDRESS, path)

    async def check(self) -> str:
        try:
            listed = await self.get(self.address("models"))
        except HttpError as error:
            if error.status not in (404, 405):
                raise
            return f"{self.name} was not looked up: {self.address('models')} lists no models"
        models = listed.get("data") if isinstance(listed, dict) else None
        names = [str(model.get("id")) for model in models or () if isinstance(model, dict)]
        if self.name in names or not names:
            return f"{self.name} exists"
        some = ", ".join(names[:5])
        return f"warning: {self.name} is not among the models that {self.address('')} lists: {some}"


class OpenAI(Remote):
    """`openai:NAME`, of a server that speaks OpenAI's protocol."""

    def check(self, spec: ModelSpec) -> None:
        name, settings = spec.name.removeprefix(PREFIX), spec.remote
        if not name:
            raise UsageError("--model=openai: give the model's name on the server, openai:NAME")
        if settings.api_key:
            check_place(settings.api_key, "--api_key")
        if not settings.api_endpoint and not settings.api_key:
            raise UsageError(
                f"--model={spec.name}: give --api_key=env:OPENAI_API_KEY for OpenAI, or "
                "--api_endpoint for another server, e.g. http://localhost:11434/v1"
            )
        thinking_of(name, settings.thinking)

    def client(self, name: str, settings: RemoteSettings) -> Client:
        return OpenAIClient(name.removeprefix(PREFIX), settings)

    def tier(self, spec: ModelSpec) -> str:
        return spec.remote.service_tier
