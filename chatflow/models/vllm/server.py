"""Starts vLLM's server through Beam's handlers. Only for workers: needs openai."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from apache_beam.ml.inference import vllm_inference
from apache_beam.utils import subprocess_server

from chatflow.errors import ModelError, one_line

_log = logging.getLogger(__name__)

GUARD = Path(__file__).with_name("guard.py")
LAST_LINES = 8


class VllmServer:
    """Starts a server and waits until it answers.

    Beam's handler composes the command, finds a free port, polls until the model is ready, and
    restarts the server up to three times if it ends before that. But it loses the output of a
    server that does not start, and a killed worker leaves the server running. So the process
    itself is started here, under a guard.

    Args:
      arguments: flags besides `--model`; None for one without a value.
      instruct: asks for chat completions, else for completions.

    Raises:
      ModelError: `no_server`, with the last lines that it printed.
    """

    def __init__(self, model: str, arguments: Mapping[str, str | None], instruct: bool):
        self.model = model
        self._lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._listener: threading.Thread | None = None
        handlers: dict[bool, Any] = {
            True: vllm_inference.VLLMChatModelHandler,
            False: vllm_inference.VLLMCompletionsModelHandler,
        }
        _without_proxy()
        handler = handlers[instruct](model, vllm_server_kwargs=dict(arguments))
        with self._starting():
            self._server = handler.load_model()
        self._stop = weakref.finalize(self, self._server._stop_processes)

    @property
    def address(self) -> str:
        """The server's URL; raises `ConnectionRefusedError` while a restart has no port yet."""
        port = self._server._server_port
        if port < 0:
            raise ConnectionRefusedError(f"the vLLM server of {self.model} is being started")
        return f"http://127.0.0.1:{port}"

    @property
    def runs(self) -> bool:
        process = self._server._server_process
        return process is not None and process.poll() is None

    def start_again(self) -> None:
        """Restarts a server that has ended, for one caller at a time; raises `ModelError`."""
        if not self._stop.alive:
            raise ModelError("no_server", f"{self.model}: its server was stopped")
        _log.warning("the vLLM server of %s has ended; restarting it", self.model)
        with self._starting():
            if self._server._server_process is None:  # the last start failed
                self._server.get_server_port()
            else:
                self._server.check_connectivity()

    def stop(self) -> None:
        """Ends the server; also runs at garbage collection and when the process ends."""
        self._stop()

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        try:
            with _started_by(self._start):
                yield
        except Exception as error:  # Beam raises nothing more specific
            if self._listener is not None:
                self._listener.join(2)
            said = " / ".join(self._lines) or "nothing"
            status = one_line(error).removesuffix(
                " Next time a request is tried, the server will be restarted"
            )
            raise ModelError("no_server", f"{self.model}: {status} It last said: {said}") from None

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
        """Replaces Beam's `start_process`."""
        (port,) = subprocess_server.pick_port(None)
        command = [word.replace("{{PORT}}", str(port)) for word in command]
        _log.info("starting %s", " ".join(command))
        process = subprocess.Popen(
            [sys.executable, "-I", str(GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines.clear()
        self._listener = threading.Thread(
            target=_listen, args=(process.stdout, self._lines), daemon=True
        )
        self._listener.start()
        return process, port


def _listen(said: IO[bytes], lines: collections.deque[str]) -> None:
    """Logs and keeps a server's output; holds no server, so that it can be garbage-collected."""
    with said:
        for raw in said:
            line = raw.decode(errors="backslashreplace").rstrip()
            if line:
                lines.append(line)
                _log.info("%s", line)


def _without_proxy() -> None:
    """Exempts the server from proxies: Beam would ask one, get no answer, and end the server."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = os.environ.get(name, "")
        if "localhost" not in hosts:
            os.environ[name] = ",".join(filter(None, (hosts, "localhost", "127.0.0.1")))


_lock = threading.Lock()


@contextlib.contextmanager
def _started_by(start: Callable[..., Any]) -> Iterator[None]:
    """Makes Beam's module start processes with `start` meanwhile; it has no hook for that."""
    with _lock:
        own, vllm_inference.start_process = vllm_inference.start_process, start
        try:
            yield
        finally:
            vllm_inference.start_process = own
