"""Calls Gemini on Vertex AI through google-genai."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from google import genai
from google.genai import types
from google.oauth2.credentials import Credentials

from chatflow.models.remote.clients import Client, Reply, Turn, checked, level_tokens
from chatflow.models.remote.faults import Fault, Kind
from chatflow.models.requests import Part
from chatflow.options import RemoteSettings

FINISH_REASONS = {"STOP": "stop", "MAX_TOKENS": "length"}
BLOCKED = frozenset(
    ("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR")
)


FLEX = {
    "X-Vertex-AI-LLM-Request-Type": "shared",
    "X-Vertex-AI-LLM-Shared-Request-Type": "flex",
}
"""https://cloud.google.com/vertex-ai/generative-ai/docs/flex-paygo"""


def thinking_of(model: str, setting: str) -> tuple[dict[str, Any] | None, int]:
    """Returns the arguments of google-genai's `ThinkingConfig`, and the tokens that they add.

    Thinking is paid for as part of the answer, and counts towards `max_output_tokens`; a tone and a
    summary hardly need it. The setting is a level of Gemini 3 and later, a number of tokens for
    Gemini 2.5, `none` for the model's default, or `auto` for as little as the model allows; else
    `UsageError` is raised.
    """
    if setting == "auto":
        found = re.match(r"gemini-(\d+(?:\.\d+)?)", model)
        version = float(found[1]) if found else 3.0
        if version < 2.5:
            setting = "none"
        elif version < 3:
            setting = "128" if "pro" in model else "0"
        else:
            setting = "low"
    if setting == "none":
        return None, 0
    if setting.isdecimal():
        return {"thinking_budget": int(setting)}, int(setting)
    return {"thinking_level": setting}, level_tokens(setting)


class GeminiClient(Client):
    """Calls generateContent of one model (`gemini-…`), with a schema if the answer is JSON."""

    def __init__(self, name: str, settings: RemoteSettings):
        self.name = name
        self._thinking, self._headroom = thinking_of(name, settings.thinking)
        address = settings.api_endpoint
        if address and "://" not in address:
            address = f"https://{address}"
        no_credentials = Credentials(token="none")  # type: ignore[no-untyped-call]
        self._client = genai.Client(
            vertexai=True,
            project=settings.project,
            location=settings.location,
            http_options=types.HttpOptions(
                timeout=round(settings.request_timeout * 1000),
                # No retries of google-genai's, not even its hidden one: they ignore Retry-After.
                retry_options=types.HttpRetryOptions(attempts=1),
                base_url=address or None,
                headers=FLEX if settings.service_tier == "flex" else None,
            ),
            credentials=no_credentials if settings.without_credentials else None,
        )

    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        response = await self._client.aio.models.generate_content(
            model=self.name,
            contents=[
                types.Content(role=turn.role, parts=[types.Part(text=turn.text)]) for turn in turns
            ],
            config=self._config(part),
        )
        return _reply(response)

    def _config(self, part: Part) -> types.GenerateContentConfig:
        form: dict[str, Any] = {}
        if part.schema:
            # JSON Schema, because in an OpenAPI schema enums contain only strings.
            form = {"response_mime_type": "application/json", "response_json_schema": part.schema}
        if self._thinking is not None:
            form["thinking_config"] = types.ThinkingConfig(**self._thinking)
        return types.GenerateContentConfig(
            temperature=0, max_output_tokens=part.max_tokens + self._headroom, **form
        )

    async def check(self) -> str:
        await self._client.aio.models.count_tokens(model=self.name, contents="Hello")
        return f"{self.name} exists"

    async def close(self) -> None:
        await self._client.aio.aclose()


def _reply(response: types.GenerateContentResponse) -> Reply | Fault:
    usage = response.usage_metadata or types.GenerateContentResponseUsageMetadata()
    paid = (
        usage.prompt_token_count or 0,
        (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0),
        usage.cached_content_token_count or 0,
    )
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason:
        why = _with_ratings(feedback.block_reason.value, feedback.safety_ratings)
        return checked(Reply("", *paid, "blocked"), why)
    if not response.candidates:
        said = "the reply has no candidates"
        return Fault(Kind.MALFORMED, "no_candidates", said, 0.0, None, *paid)
    candidate = response.candidates[0]
    said = candidate.finish_reason.value if candidate.finish_reason else "none"
    parts = (candidate.content.parts if candidate.content else None) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    blocked = _with_ratings(said, candidate.safety_ratings) if said in BLOCKED else ""
    return checked(Reply(text, *paid, FINISH_REASONS.get(said, said.lower())), blocked)


def _with_ratings(reason: str, ratings: Sequence[types.SafetyRating] | None) -> str:
    blocked = [
        f"{rating.category.value} {rating.probability.value if rating.probability else ''}".strip()
        for rating in ratings or ()
        if rating.blocked and rating.category
    ]
    return f"{reason} ({', '.join(blocked)})" if blocked else reason
