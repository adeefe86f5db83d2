"""A stand-in for Vertex AI on loopback: Gemini's generateContent and an endpoint's predict.

It speaks what the real clients send over HTTP, answers with a function of the prompt, and
misbehaves on cue. The shapes are those that Google documents; nothing was compared with the
real service.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

ENDPOINT = "projects/p/locations/us-central1/endpoints/1001"


class Call(NamedTuple):
    at: float
    prompt: str
    body: dict[str, Any]


class FakeVertex:
    """Starts on a free port; use as a context manager.

    Attributes:
      faults: what happens to the next calls, in order: `ok`, a status (`429`), `hang`,
        `reset`, `html`, `empty`, `blocked`, `malformed`; after the last, all is well.
      poison: a prompt that holds this text gets a 400, always.
      latency, retry_after: seconds.
    """

    def __init__(self, answer: Callable[[str], str]):
        self.answer = answer
        self.reset()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.split("/v1beta1/")[-1].split("/v1/")[-1]
                self.reply(200, {"name": name, "createTime": "2026-01-01T00:00:00Z"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.serve(self, body)

            def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                for name, text in (headers or {}).items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        self.calls: list[Call] = []
        self.faults: list[str] = []
        self.poison: str | None = None
        self.latency = 0.0
        self.retry_after: float | None = None
        self.peak = self._now = 0
        self._lock = threading.Lock()
        self.released = threading.Event()

    def __enter__(self) -> FakeVertex:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: Any, body: dict[str, Any]) -> None:
        gemini = handler.path.endswith(":generateContent")
        prompt = (
            body["contents"][0]["parts"][0]["text"]
            if gemini
            else body["instances"][0]["messages"][0]["content"]
        )
        with self._lock:
            self.calls.append(Call(time.monotonic(), prompt, body))
            fault = self.faults.pop(0) if self.faults else "ok"
            self._now += 1
            self.peak = max(self.peak, self._now)
        try:
            time.sleep(self.latency)
            self._reply(handler, prompt, gemini, fault)
        finally:
            with self._lock:
                self._now -= 1

    def _reply(self, handler: Any, prompt: str, gemini: bool, fault: str) -> None:
        if self.poison is not None and self.poison in prompt:
            fault = "400"
        if fault.isdigit():
            error = {"error": {"code": int(fault), "message": "no", "status": "SAID_NO"}}
            wait = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
            handler.reply(int(fault), error, wait)
        elif fault == "hang":
            self.released.wait(30)
        elif fault == "reset":
            handler.close_connection = True
            handler.connection.close()
        elif fault == "html":
            handler.reply(502, b"<html>Bad gateway</html>")
        elif gemini:
            handler.reply(200, self._generated(prompt, fault))
        else:
            handler.reply(200, {"predictions": self._predicted(prompt, fault)})

    def _generated(self, prompt: str, fault: str) -> dict[str, Any]:
        if fault == "blocked":
            return {"promptFeedback": {"blockReason": "SAFETY"}}
        text = "" if fault == "empty" else self.answer(prompt)
        candidate = {
            "content": {"role": "model", "parts": [{"text": text}]},
            "finishReason": "MAX_TOKENS" if fault == "empty" else "STOP",
        }
        usage = {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18}
        return {"candidates": [candidate], "usageMetadata": usage}

    def _predicted(self, prompt: str, fault: str) -> Any:
        if fault in ("blocked", "empty"):
            return []
        if fault == "malformed":
            return [{"choices": "none"}]
        message = {"role": "assistant", "content": self.answer(prompt)}
        usage = {"prompt_tokens": 11, "completion_tokens": 7}
        return [{"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}]
