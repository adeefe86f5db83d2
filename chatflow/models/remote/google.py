"""Gemini and endpoints on Vertex AI, as a kind of model."""

from __future__ import annotations

from chatflow.errors import UsageError
from chatflow.models.remote.clients import Client
from chatflow.models.remote.gemini import GeminiClient, thinking_of
from chatflow.models.remote.kind import Remote
from chatflow.models.remote.vertex import ENDPOINT, EndpointClient
from chatflow.models.spec import ModelSpec
from chatflow.options import RemoteSettings


class Google(Remote):
    """`gemini-…` and `projects/P/locations/L/endpoints/E`."""

    def check(self, spec: ModelSpec) -> None:
        """Checks the name and the settings without a call."""
        name, settings = spec.name, spec.remote
        if ENDPOINT.fullmatch(name):
            return
        if settings.endpoint_override:
            raise UsageError(f"--endpoint_override: only with an endpoint, not with --model={name}")
        if not name.startswith("gemini-"):
            raise UsageError(
                f"--model={name}: with --inference=remote give gemini-…, openai:NAME, "
                "anthropic:NAME or projects/P/locations/L/endpoints/E"
            )
        if not settings.project:
            raise UsageError(f"--model={name}: give --project, or set GOOGLE_CLOUD_PROJECT")
        if not settings.location:
            raise UsageError(
                f"--model={name}: give --location (or Beam's --region), or set "
                "GOOGLE_CLOUD_LOCATION"
            )
        thinking_of(name, settings.thinking)

    def client(self, name: str, settings: RemoteSettings) -> Client:
        """Returns a client that has made no call yet."""
        if ENDPOINT.fullmatch(name):
            return EndpointClient(name, settings)
        return GeminiClient(name, settings)

    def tier(self, spec: ModelSpec) -> str:
        return "standard" if ENDPOINT.fullmatch(spec.name) else spec.remote.service_tier
