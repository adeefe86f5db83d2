"""A stand-in for vLLM's server, as a package `vllm` that Beam's handlers start.

It answers as the other stand-ins do, and has an engine: a separate process, which outlives it
when it is killed, as vLLM's does. It shares a folder with the tests:

- `started.jsonl`, `calls.jsonl`: its arguments, and its calls with their answers.
- `behaviour.json`: the fields of `brain.Behaviour`.
- `crash`: a text. The server dies of a prompt that has it, once each time the file is written.
- `broken`: what it prints before it ends at once, with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from .brain import SCRIPT, Call
from .vertex import FakeVertex, prompts_of

FOLDER = "FAKE_VLLM_FOLDER"
FLAGS = (
    "model", "port", "host", "served-model-name", "max-model-len", "max-num-seqs", "dtype",
    "tensor-parallel-size", "gpu-memory-utilization",
)  # fmt: skip


class Place:
    """The shared folder, for tests."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(self) -> dict[str, str]:
        """Makes the package; returns the environment in which Beam starts it."""
        place = self.folder / "vllm" / "entrypoints" / "openai"
        place.mkdir(parents=True)
        (self.folder / "vllm" / "__init__.py").write_text("")
        (place / "api_server.py").write_text("from fakes.vllm import main\n\nmain()\n")
        tests = Path(__file__).parent.parent
        path = os.pathsep.join(map(str, (self.folder, tests, tests.parent)))
        return {FOLDER: str(self.folder), "PYTHONPATH": path}

    def behave(self, **behaviour: Any) -> None:
        """Sets the behaviour from the next start on."""
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def crash(self, text: str) -> None:
        (self.folder / "crash").write_text(text)

    def broken(self, text: str) -> None:
        """Makes it fail to start from now on; an empty text makes it start again."""
        path = self.folder / "broken"
        path.write_text(text) if text else path.unlink()

    @property
    def started(self) -> list[Any]:
        return self._lines("started")

    @property
    def calls(self) -> list[Any]:
        return self._lines("calls")

    def _lines(self, name: str) -> list[Any]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(self, name: str, value: Any) -> None:
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(value) + "\n")

    def all_gone(self, seconds: float = 15) -> bool:
        """Waits until no server and no engine is left."""
        until = time.monotonic() + seconds
        pids = [
            start[kind] for start in self.started for kind in ("pid", "engine") if kind in start
        ]
        return all(_gone(pid, until - time.monotonic()) for pid in pids)


def _gone(pid: int, seconds: float) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(process):
        return bool(select.select([process], [], [], max(0.0, seconds))[0])


class FakeVllm(FakeVertex):
    """Serves in this process, until it is told to end."""

    def __init__(self, place: Place, flags: argparse.Namespace):
        super().__init__(say)
        self.place, self.flags = place, flags
        path = place.folder / "behaviour.json"
        self.brain.reset(**(json.loads(path.read_text()) if path.exists() else {}))

    async def serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        done = asyncio.Event()  # before any client can know that the server runs
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, done.set)
        await runner.setup()
        await web.TCPSite(runner, self.flags.host, self.flags.port).start()
        print("Application startup complete.", flush=True)
        await done.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": self.flags.served_model_name}]})
        known = request.path in ("/v1/chat/completions", "/v1/completions")
        content = await request.json()
        if not known or content["model"] != self.flags.served_model_name:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        self._perhaps_crash(prompts_of(content)[0])
        response = await super()._handle(request)
        seen = {"pid": os.getpid(), "path": request.path, "body": content}
        self.place.note("calls", {**seen, "status": response.status})
        return response

    def _perhaps_crash(self, prompt: str) -> None:
        path = self.place.folder / "crash"
        if path.exists() and path.read_text() in prompt:
            path.unlink()
            print("CUDA error: an illegal memory access was encountered", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def completed(self, call: Call) -> dict[str, Any]:
        content, chat = call.body, "messages" in call.body
        reply = self.completion(call.prompts[0], call.fault)
        for choice in reply["choices"]:
            if content.get("logprobs"):
                choice["logprobs"] = _logprobs(call.prompts[0], chat)
                choice["finish_reason"] = "length"
                choice["message"]["content"] = "\n"  # no choice is the likeliest of all
            if not chat:
                choice["text"] = choice.pop("message")["content"]
        return reply


TONES = {-1: "angry", 0: "neutral", 1: "happy"}


def _logprobs(prompt: str, chat: bool) -> dict[str, Any]:
    """Returns the likeliest first tokens: the words of all tones but one, which is far behind."""
    tone = TONES[tone_of(own_words(prompt))]
    likely = {"\n": -0.05, " the": -4.0, **{f" {word}": -5.0 for word in ("angry", "neutral")}}
    likely[f" {tone}"] = -0.1
    if not chat:
        return {"top_logprobs": [likely]}
    tops = [{"token": token.strip(), "logprob": score} for token, score in likely.items()]
    return {"content": [{"top_logprobs": tops}]}


def say(prompt: str) -> str:
    """Answers as `brain.scripted_answer` does, without the slow import of chatflow."""
    if "Apology:" in prompt or "Write an apology" in prompt:
        return " your order was late" if "Apology:" in prompt else "We are sorry for the trouble."
    words = own_words(prompt)
    if "Answer with one JSON object" in prompt:
        return json.dumps({"sentiment": tone_of(words), "summary": f"They say: {words[:120]}"})
    return f" {words[:60] or prompt[:60]}"


def own_words(prompt: str) -> str:
    """Returns the words of the user whose tone is asked for, from chatflow's own prompts."""
    found = re.search(r"\nThe user: (.+)|Tone of (.+):$|: (\S+) says that$", prompt)
    user = next(filter(None, found.groups())).strip() if found else ""
    chat = re.split(r"Chat history:\n|\n\n(?=\S+: )", prompt)[-1]
    return " ".join(re.findall(rf"^(?:\S+ )?{re.escape(user)}: (.+)$", chat, re.MULTILINE))


def tone_of(words: str) -> int:
    rules = [json.loads(line) for line in SCRIPT.read_text().splitlines()]
    tones = (rule for rule in rules if rule.get("task") != "apology")
    rule = next(rule for rule in tones if re.search(rule.get("match", ""), words))
    return int(rule["answer"]["sentiment"])


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", type=int if flag == "port" else str)
    for flag in ("enforce-eager", "disable-uvicorn-access-log"):
        parser.add_argument(f"--{flag}", action="store_true")
    flags = parser.parse_args()
    place = Place(Path(os.environ[FOLDER]))
    if (broken := place.folder / "broken").exists():
        place.note("started", {"argv": sys.argv[1:], "pid": os.getpid()})
        sys.exit(broken.read_text())
    engine = subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(600)"])
    place.note("started", {"argv": sys.argv[1:], "pid": os.getpid(), "engine": engine.pid})
    try:
        asyncio.run(FakeVllm(place, flags).serve())
    finally:
        engine.terminate()
