"""A stand-in for Vertex AI on loopback, for real clients: HTTP, HTTPS and gRPC.

It speaks generateContent and countTokens of Gemini; GetEndpoint, predict, rawPredict and chat
completions of endpoints of every kind; OpenAI's chat completions and list of models; Anthropic's
messages, its own and Vertex AI's; and OAuth's token route. The shapes are those that the vendors
document; nothing was compared with the real services. `brain.Behaviour` describes its answers
and faults; over gRPC, faults are statuses, hanging, or no predictions.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from aiohttp import web

from . import environment
from .brain import Brain, Call, scripted_answer

_BETWEEN = (("since", "0"), ("until", "inf"))
_ENDPOINTS = "projects/p/locations/us-central1/endpoints"
ENDPOINTS = {
    "public": f"{_ENDPOINTS}/1001",
    "dedicated": f"{_ENDPOINTS}/1002",
    "private service access": f"{_ENDPOINTS}/1003",
    "private service connect": f"{_ENDPOINTS}/1004",
    "empty": f"{_ENDPOINTS}/1005",
}


class FakeVertex:
    """Starts on free ports; use as a context manager.

    Attributes:
      brain: its behaviour, and the calls that it saw.
      address: of plain HTTP, for `--api_endpoint`.
      secure, grpc: addresses (host:port) with TLS, with a certificate for which see `trusted`.
    """

    def __init__(self, answer: Callable[[str], str] = scripted_answer, with_grpc: bool = False):
        self.brain = Brain(answer)
        self.grpc = ""
        self._with_grpc = with_grpc
        self._folder = tempfile.TemporaryDirectory(prefix="fake-vertex-")
        self.certificate = Path(self._folder.name) / "certificate.pem"
        self._loop = asyncio.new_event_loop()
        self._ready, self._done = threading.Event(), asyncio.Event()

    def __enter__(self) -> FakeVertex:
        key = make_certificate(self.certificate)
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(key),), daemon=True
        )
        self._thread.start()
        if not self._ready.wait(30):
            raise RuntimeError("the stand-in did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)
        self._folder.cleanup()

    def trusted(self) -> AbstractContextManager[None]:
        """Makes clients of this process trust the stand-in's certificate inside the context."""
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
        return environment(dict.fromkeys(names, str(self.certificate)))

    def on_loop(self, function: Callable[[], None]) -> None:
        """Runs a function on the server's event loop, and waits for it."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(10)

    def reset(self, **behaviour: Any) -> Brain:
        self.on_loop(lambda: self.brain.reset(**behaviour))
        return self.brain

    async def _serve(self, key: Path) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # End a call whose client has disconnected.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        ports = []
        for secure in (None, context):
            listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
            await web.SockSite(runner, listener, ssl_context=secure).start()
            ports.append(listener.getsockname()[1])
        self.address = f"http://127.0.0.1:{ports[0]}"
        self.secure = f"127.0.0.1:{ports[1]}"
        server = None
        if self._with_grpc:
            from .grpc_door import open_door

            server, self.grpc = await open_door(self, self.certificate, key)
        self._ready.set()
        await self._done.wait()
        if server is not None:
            await server.stop(None)
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path == "/token":
            return web.json_response({"access_token": "a-token", "expires_in": 3600})
        if path == "/_control":
            return await self._control(request)
        if request.method == "GET" and "/models" in path:
            models = {"data": [{"id": "small"}, {"id": "large"}]}
            return web.json_response(models if path.endswith("/models") else {"id": "small"})
        if request.method == "GET":
            found = self.endpoint(path.split("/", 2)[-1])
            return web.json_response(found or _error(404), status=200 if found else 404)
        body = await request.json()
        if path.endswith((":countTokens", "count-tokens:rawPredict")):
            return web.json_response({"totalTokens": 1})
        for name in self.brain.behaviour.refused:
            if name in body:
                said = f"Unsupported parameter: '{name}' is not supported with this model."
                error = {"message": said, "param": name, "type": "invalid_request_error"}
                return web.json_response({"error": error}, status=400)
        gemini = path.endswith(":generateContent")
        prompts = prompts_of(body)
        authorization = request.headers.get("Authorization", "")
        call = self.brain.receive(path, prompts, body, authorization)
        call.key = request.headers.get("api-key", request.headers.get("x-api-key", ""))
        try:
            return await self._answer(request, call, gemini)
        finally:
            self.brain.leave(call)

    async def _control(self, request: web.Request) -> web.Response:
        """GET returns what was seen (`?since=S&until=S`); POST resets, with a behaviour as JSON."""
        if request.method == "POST":
            self.brain.reset(**await request.json())
        between = (float(request.query.get(name, default)) for name, default in _BETWEEN)
        return web.json_response(self.brain.stats(*between))

    def endpoint(self, name: str) -> dict[str, Any] | None:
        """Returns the endpoint as GetEndpoint does."""
        kind = next((kind for kind, known in ENDPOINTS.items() if known == name), None)
        if kind is None:
            return None
        model: dict[str, Any] = {"id": "7", "model": f"{_ENDPOINTS}/models/7"}
        found: dict[str, Any] = {"name": name, "createTime": "2026-01-01T00:00:00Z"}
        if kind == "dedicated":
            found |= {"dedicatedEndpointEnabled": True, "dedicatedEndpointDns": self.secure}
        elif kind == "private service access":
            found["network"] = "projects/1/global/networks/vpc"
            uri = f"{self.address}/v1/models/7:predict"
            model["privateEndpoints"] = {"predictHttpUri": uri}
        elif kind == "private service connect":
            found["privateServiceConnectConfig"] = {"enablePrivateServiceConnect": True}
        return found if kind == "empty" else {**found, "deployedModels": [model]}

    async def _answer(self, request: web.Request, call: Call, gemini: bool) -> web.StreamResponse:
        fault = call.fault
        if fault.isdecimal():
            wait = self.brain.behaviour.retry_after if self.brain.asks_to_wait(fault) else None
            headers = {} if wait is None else {"Retry-After": str(wait)}
            return web.json_response(_error(int(fault), wait), status=int(fault), headers=headers)
        await self.brain.wait()
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "reset":
            return _reset(request)
        if fault == "html":
            return web.Response(
                status=502, content_type="text/html", text="<html><h1>502 Bad Gateway</h1></html>"
            )
        if gemini:
            value: Any = self.generated(call)
        elif "instances" in call.body:
            value = self.predicted(call)
        elif "messages" in call.path or "anthropic" in call.path:
            value = self.message(call)
        else:
            value = self.completed(call)
        raw = json.dumps(value).encode()
        if fault == "malformed":
            raw = raw[: len(raw) // 2]
        if fault in ("slow_body", "cut_body"):
            return await self._in_pieces(request, raw, fault)
        return web.Response(body=raw, content_type="application/json")

    async def _in_pieces(self, request: web.Request, raw: bytes, fault: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(raw)
        await response.prepare(request)
        half = len(raw) // 2
        await response.write(raw[:half])
        if fault == "cut_body":
            assert request.transport is not None
            request.transport.close()
            return response
        for byte in raw[half:]:
            await asyncio.sleep(self.brain.behaviour.slow_seconds / (len(raw) - half))
            await response.write(bytes([byte]))
        return response

    def said(self, prompt: str, fault: str) -> str:
        text = self.brain.answer(prompt)
        if fault == "truncated":
            return text[: len(text) // 2]
        return "As a language model, I would rather not." if fault == "nonsense" else text

    def generated(self, call: Call) -> dict[str, Any]:
        """Returns a reply of Gemini, which takes several parts of one turn as one prompt."""
        (prompt,) = call.prompts
        if call.fault == "safety":
            rating = {
                "category": "HARM_CATEGORY_HARASSMENT", "probability": "HIGH", "blocked": True,
            }  # fmt: skip
            return {"promptFeedback": {"blockReason": "SAFETY", "safetyRatings": [rating]}}
        if call.fault in ("empty", "fewer"):
            return {"candidates": [], "usageMetadata": {"promptTokenCount": 1}}
        text = self.said(prompt, call.fault)
        candidate = {
            "content": {"role": "model", "parts": [{"text": text}]},
            "finishReason": "MAX_TOKENS" if call.fault == "truncated" else "STOP",
        }
        counts = (len(prompt.split()), len(text.split()))
        usage = {
            "promptTokenCount": counts[0],
            "candidatesTokenCount": counts[1],
            "totalTokenCount": sum(counts),
            "cachedContentTokenCount": 1,
        }
        return {"candidates": [candidate], "usageMetadata": usage}

    def predicted(self, call: Call) -> dict[str, Any]:
        """Returns a reply of predict."""
        values: list[Any] = [
            self.completion(prompt, call.fault)
            if "messages" in instance
            else f"Prompt:\n{prompt}\nOutput:\n{self.said(prompt, call.fault)}"
            for prompt, instance in zip(call.prompts, call.body["instances"], strict=True)
        ]
        if call.fault == "empty":
            values = []
        elif call.fault == "fewer":
            values = values[:-1]
        chats = "messages" in call.body["instances"][0]
        listed = self.brain.behaviour.listed or not chats or not values
        return {"predictions": values if listed else values[0], "deployedModelId": "7"}

    def completed(self, call: Call) -> dict[str, Any]:
        """Returns a reply of the route for chat completions."""
        return self.completion(call.prompts[0], call.fault)

    def message(self, call: Call) -> dict[str, Any]:
        """Returns a reply of Anthropic's messages: for JSON, the input of a required tool."""
        text = "" if call.fault == "safety" else self.said(call.prompts[0], call.fault)
        blocks: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if "tool_choice" in call.body:
            with contextlib.suppress(ValueError):
                name = call.body["tool_choice"]["name"]
                blocks = [{"type": "tool_use", "id": "1", "name": name, "input": json.loads(text)}]
        reasons = {"truncated": "max_tokens", "safety": "refusal"}
        usage = {
            "input_tokens": len(call.prompts[0].split()) - 1,
            "cache_read_input_tokens": 1,
            "output_tokens": len(text.split()),
        }
        return {
            "type": "message",
            "content": [] if call.fault in ("empty", "fewer") else blocks,
            "stop_reason": reasons.get(call.fault, "end_turn"),
            "usage": usage,
        }

    def completion(self, prompt: str, fault: str) -> dict[str, Any]:
        text = "" if fault == "safety" else self.said(prompt, fault)
        reasons = {"truncated": "length", "safety": "content_filter"}
        choice = {
            "message": {"role": "assistant", "content": text},
            "finish_reason": reasons.get(fault, "stop"),
        }
        usage = {
            "prompt_tokens": len(prompt.split()),
            "completion_tokens": len(text.split()),
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        return {"choices": [] if fault in ("empty", "fewer") else [choice], "usage": usage}


def prompts_of(body: dict[str, Any]) -> list[str]:
    """Returns a call's prompts: one of each instance, or one for all parts of the first turn."""
    if "contents" in body:
        return ["".join(part["text"] for part in body["contents"][0]["parts"])]
    instances = body.get("instances", [body])
    return [
        instance["messages"][0]["content"] if "messages" in instance else instance["prompt"]
        for instance in instances
    ]


def _error(status: int, wait: float | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"code": status, "message": "the stand-in refuses", "status": "NO"}
    if wait is not None:
        info = "type.googleapis.com/google.rpc.RetryInfo"
        error["details"] = [{"@type": info, "retryDelay": f"{wait}s"}]
    return {"error": error}


def _reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()


def make_certificate(path: Path) -> Path:
    """Writes a self-signed certificate for loopback, and its key beside it; returns that path."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]  # fmt: skip
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    own = path.with_suffix(".key")
    own.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return own
