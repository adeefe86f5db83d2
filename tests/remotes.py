"""What the tests of remote models share."""

from __future__ import annotations

from fakes.vertex import ENDPOINTS

from chatflow.errors import BadAnswerError
from chatflow.models.requests import Part, Request
from chatflow.options import RemoteSettings
from chatflow.prompts.answers import ANALYSIS_SCHEMA

GEMINI = "gemini-2.5-flash"


OPENAI, CLAUDE = "openai:small", "anthropic:small"


MODELS = [
    GEMINI, *(ENDPOINTS[kind] for kind in ENDPOINTS if kind != "empty"), OPENAI, CLAUDE,
]  # fmt: skip


def request(prompt="hello", task="analysis", check=None, name="id"):
    schema = ANALYSIS_SCHEMA if task == "analysis" else None
    part = Part(field=None, prompt=prompt, max_tokens=9, schema=schema, check=check)
    return Request(name, task, "7", "c", (part,))


def settings_of(fake, model, **settings):
    defaults = {"project": "p", "location": "us-central1", "api_endpoint": fake.address}
    if model == OPENAI:
        defaults["api_endpoint"] = f"{fake.address}/v1"
    if model == ENDPOINTS["private service connect"]:
        defaults["endpoint_override"] = fake.address
    return RemoteSettings(**{**defaults, **settings})


ANGRY = '{"sentiment": -1, "summary": "The parcel is late."}'


def is_json(text):
    if not text.startswith("{"):
        raise BadAnswerError("not_json", "that is no JSON", text)
