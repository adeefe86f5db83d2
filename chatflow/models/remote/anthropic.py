"""Calls Claude by Anthropic's Messages API: at Anthropic, or on Vertex AI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chatflow.errors import UsageError
from chatflow.models.remote.clients import Client, Reply, Turn, checked, messages_of, raw
from chatflow.models.remote.faults import Fault, MalformedReplyError
from chatflow.models.remote.keyed import KeyedClient, joined
from chatflow.models.remote.kind import Remote
from chatflow.models.requests import Part
from chatflow.models.spec import ModelSpec
from chatflow.options import RemoteSettings
from chatflow.secrets import check_place

PREFIX = "anthropic:"
ADDRESS = "https://api.anthropic.com/v1"
VERSION, VERTEX_VERSION = "2023-06-01", "vertex-2023-10-16"
FINISH_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "tool_use": "stop",
                  "max_tokens": "length"}  # fmt: skip
TOOL = "answer"


class AnthropicClient(KeyedClient):
    """Calls the Messages API with `--api_key`, or else on Vertex AI with Google's credentials.

    Asks for JSON as the input of a tool that the model must call: all models support this, and
    none of Google's organisation policies forbids it.
    """

    optional = ("temperature",)

    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        content: dict[str, Any] = {
            "messages": messages_of(turns),
            "max_tokens": part.max_tokens,
            "temperature": 0,
        }
        if part.schema and self.settings.response_format != "none":
            said = "Gives the answer that was asked for."
            content["tools"] = [{"name": TOOL, "description": said, "input_schema": part.schema}]
            content["tool_choice"] = {"type": "tool", "name": TOOL}
        if self.settings.api_key:
            content["model"] = self.name
            return reply_of(await self.post(self._direct("messages"), content))
        content["anthropic_version"] = VERTEX_VERSION
        return reply_of(await self.post(self._on_vertex(self.name), content))

    def _direct(self, path: str) -> str:
        return joined(self.settings.api_endpoint or ADDRESS, path)

    def _on_vertex(self, model: str) -> str:
        settings, location = self.settings, self.settings.location
        host = "aiplatform" if location == "global" else f"{location}-aiplatform"
        path = f"v1/projects/{settings.project}/locations/{location}/publishers/anthropic/models"
        return joined(
            settings.api_endpoint or f"{host}.googleapis.com", f"{path}/{model}:rawPredict"
        )

    async def headers(self, url: str) -> Mapping[str, str]:
        if key := await self.key():
            return {"x-api-key": key, "anthropic-version": VERSION}
        return await super().headers(url)

    async def check(self) -> str:
        if self.settings.api_key:
            await self.get(self._direct(f"models/{self.name}"))
        else:
            hello = {"model": self.name, "messages": [{"role": "user", "content": "Hello"}]}
            await self.post(self._on_vertex("count-tokens"), hello)
        return f"{self.name} exists"


def reply_of(content: Any) -> Reply | Fault:
    """Reads a message; raises `MalformedReplyError` for anything else."""
    try:
        usage = content.get("usage") or {}
        new, cached, kept, written = (
            int(usage.get(name) or 0)
            for name in (
                "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens",
                "output_tokens",
            )
        )  # fmt: skip
        blocks = content["content"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        called = [block["input"] for block in blocks if block["type"] == "tool_use"]
        said = str(content.get("stop_reason"))
        reply = Reply(
            json.dumps(called[0], ensure_ascii=False) if called else text,
            new + cached + kept,
            written,
            cached,
            FINISH_REASONS.get(said, said),
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        said = f"no message in the reply: {error!r}"
        raise MalformedReplyError("bad_reply", said, raw(content)) from None
    return checked(reply, said if said == "refusal" else "")


class Anthropic(Remote):
    """`anthropic:NAME`, at Anthropic or on Vertex AI."""

    def check(self, spec: ModelSpec) -> None:
        settings = spec.remote
        if not spec.name.removeprefix(PREFIX):
            raise UsageError("--model=anthropic: give the model's name, anthropic:NAME")
        if settings.api_key:
            check_place(settings.api_key, "--api_key")
        elif not settings.project or not settings.location:
            raise UsageError(
                f"--model={spec.name}: give --api_key=env:ANTHROPIC_API_KEY for Anthropic, or "
                "--project and --location for Vertex AI"
            )

    def client(self, name: str, settings: RemoteSettings) -> Client:
        return AnthropicClient(name.removeprefix(PREFIX), settings)
