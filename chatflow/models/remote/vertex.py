"""Calls text models on Vertex AI endpoints: public, dedicated and private ones."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
from google.auth.credentials import AnonymousCredentials

from chatflow.errors import UsageError
from chatflow.models.remote.clients import Client, GoogleToken, Reply, Turn, checked, post, raw
from chatflow.models.remote.faults import Fault, HttpError, MalformedReplyError
from chatflow.models.remote.openai import completion, reply_of, without_thoughts
from chatflow.models.requests import Part
from chatflow.network import session
from chatflow.options import RemoteSettings

ENDPOINT = re.compile(r"projects/([^/]+)/locations/([^/]+)/endpoints/([^/]+)")


def body(turns: Sequence[Turn], part: Part, settings: RemoteSettings) -> dict[str, Any]:
    """Returns the body of a call, by `RemoteSettings.request_format`.

    - `chat_completions`: an instance of predict, for Model Garden's vLLM containers.
    - `raw_predict`: OpenAI's body, for containers that serve its route.
    - `prompt`: an instance with a prompt, for containers without chats.
    """
    if settings.request_format == "prompt":
        prompt = "\n\n".join(turn.text for turn in turns)
        instance = {"prompt": prompt, "max_tokens": part.max_tokens, "temperature": 0}
        return {"instances": [instance]}
    chat = completion(turns, part, settings.response_format)
    if settings.request_format == "raw_predict":
        return {"model": "", **chat}
    return {"instances": [{"@requestFormat": "chatCompletions", **chat}]}


class Address(NamedTuple):
    """The URLs of an endpoint, and the number of models deployed on it.

    Attributes:
      kind: `public`, `dedicated`, `private service access` or `overridden`.
      verified: whether its certificate is checked.
    """

    kind: str
    predict: str
    raw_predict: str
    models: int = 1
    verified: bool = True

    @classmethod
    def at(cls, base: str, name: str, kind: str, models: int = 1, verified: bool = True) -> Address:
        """Returns the address of an endpoint, by its Vertex AI name, at the host `base`."""
        url = f"{base.rstrip('/')}/v1/{name}"
        return cls(kind, f"{url}:predict", f"{url}:rawPredict", models, verified)


class EndpointClient(Client):
    """Calls predict or rawPredict of one endpoint, `projects/P/locations/L/endpoints/E`.

    The first call looks up the endpoint's kind and address. Calls use plain HTTP, because
    aiplatform's classes hide a dedicated endpoint's error status in a text, and have no timeout for
    a private endpoint.
    """

    def __init__(self, name: str, settings: RemoteSettings):
        self.name, self.settings = name, settings
        self._address: Address | None = None
        self._looking_up = asyncio.Lock()
        self._token = GoogleToken(settings.without_credentials)
        self._http: aiohttp.ClientSession | None = None

    async def prepare(self) -> None:
        if self._address is None:
            await self.address()

    async def ask(self, turns: Sequence[Turn], part: Part) -> Reply | Fault:
        address = await self.address()
        raw_predict = self.settings.request_format == "raw_predict"
        content = await self._post(
            address.raw_predict if raw_predict else address.predict,
            body(turns, part, self.settings),
            address.verified,
        )
        return _reply(content if raw_predict else _prediction(content))

    async def address(self) -> Address:
        async with self._looking_up:
            if self._address is None:
                settings = self.settings
                if settings.endpoint_override:
                    self._address = overridden(self.name, settings.endpoint_override)
                else:
                    self._address = await asyncio.to_thread(look_up, self.name, settings)
            return self._address

    async def _post(self, url: str, content: Mapping[str, Any], verified: bool) -> Any:
        if self._http is None:
            self._http = await session(verified)
        headers = await self._token.header() if url.startswith("https://") else {}
        try:
            return await post(self._http, url, content, headers)
        except HttpError as error:
            if error.status == 404:  # it may have been deployed again at another address
                self._address = None
            raise

    async def check(self) -> str:
        if self.settings.endpoint_override:
            return (
                f"{self.name} was not looked up: it is called at {self.settings.endpoint_override}"
            )
        address = await self.address()
        if not address.models:
            raise _nothing_deployed(self.name)
        return f"{self.name} exists, a {address.kind} endpoint"

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()


def overridden(name: str, address: str) -> Address:
    """Returns the address of an endpoint at a known host; the default scheme is https."""
    if "://" in address:
        return Address.at(address, name, "overridden")
    # Not verified, as in aiplatform's PrivateEndpoint: the address is in the user's own network,
    # and the certificate is Google's own.
    return Address.at(f"https://{address}", name, "overridden", verified=False)


def _nothing_deployed(name: str) -> UsageError:
    return UsageError(f"--model={name}: no model is deployed on this endpoint")


def look_up(name: str, settings: RemoteSettings) -> Address:
    """Returns an endpoint's address from Vertex AI.

    Raises `UsageError` for a Private Service Connect endpoint (its address must be given) or a
    private one without a model, and `google.api_core.exceptions.GoogleAPICallError`.
    """
    found = ENDPOINT.fullmatch(name)
    assert found is not None  # checked by `Remote.check`
    base = settings.api_endpoint or f"https://{found[2]}-aiplatform.googleapis.com"
    if "://" not in base:
        base = f"https://{base}"
    endpoint = _endpoint_service(base).get_endpoint(
        name=name, timeout=settings.request_timeout, retry=None
    )
    models = len(endpoint.deployed_models)
    if endpoint.dedicated_endpoint_enabled and endpoint.dedicated_endpoint_dns:
        kind, base = "dedicated", f"https://{endpoint.dedicated_endpoint_dns}"
    elif endpoint.private_service_connect_config.enable_private_service_connect:
        raise UsageError(
            f"--model={name} is a private service connect endpoint: give the address of its "
            "forwarding rule with --endpoint_override"
        )
    elif endpoint.network:
        if not models:
            raise _nothing_deployed(name)
        uri = endpoint.deployed_models[0].private_endpoints.predict_http_uri
        return Address("private service access", uri, uri, models)
    else:
        kind = "public"
    return Address.at(base, name, kind, models)


def _endpoint_service(base: str) -> Any:
    from google.cloud.aiplatform_v1 import EndpointServiceClient
    from google.cloud.aiplatform_v1.services.endpoint_service.transports.rest import (
        EndpointServiceRestTransport,
    )

    scheme, host = base.rstrip("/").split("://", 1)
    if scheme == "http":
        anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
        transport = EndpointServiceRestTransport(
            host=host, url_scheme="http", credentials=anonymous
        )
        return EndpointServiceClient(transport=transport)
    return EndpointServiceClient(client_options={"api_endpoint": host})


def _prediction(content: Any) -> Any:
    """Returns the prediction of a reply. Public examples disagree on whether it is in a list."""
    predictions = content.get("predictions") if isinstance(content, dict) else None
    if not predictions:
        said = "the reply has no predictions"
        raise MalformedReplyError("no_predictions", said, raw(content))
    return predictions[0] if isinstance(predictions, list) else predictions


def _reply(prediction: Any) -> Reply | Fault:
    """Reads a chat completion, a completion or a text; raises `MalformedReplyError` for others."""
    if isinstance(prediction, str):
        # Model Garden's containers repeat the prompt.
        said = without_thoughts(prediction.split("\nOutput:\n", 1)[-1])
        return checked(Reply(said, finish_reason="unknown"))
    return reply_of(prediction)
