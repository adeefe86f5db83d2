"""vLLM's own server, as Beam's handlers start and watch it. For workers: needs openai."""

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
    """Starts a server, and waits until it answers.

    Beam's handler composes its command, looks for a free port, asks until the model is there, and
    starts it anew up to three times where it ends before. It loses what a server says that does
    not start, and a worker that is killed leaves it running; so the process itself is started
    here, under a guard.

    Args:
      model: what `--model` of the server's is given.
      arguments: its other flags; None for one without a value.
      instruct: it is asked for chat completions, else for completions.

    Raises:
      ModelError: `no_server`; with the last lines that it printed.
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
        """Raises `ConnectionRefusedError` where the server has ended and has no port as yet."""
        port = self._server._server_port
        if port < 0:
            raise ConnectionRefusedError(f"the vLLM server of {self.model} is being started")
        return f"http://127.0.0.1:{port}"

    @property
    def runs(self) -> bool:
        process = self._server._server_process
        return process is not None and process.poll() is None

    def start_again(self) -> None:
        """Starts a server that has ended; for one caller at a time.

        Raises:
          ModelError: as when it is made.
        """
        if not self._stop.alive:
            raise ModelError("no_server", f"{self.model}: its server was stopped")
        _log.warning("the vLLM server of %s has ended, and is started again", self.model)
        with self._starting():
            if self._server._server_process is None:  # the last start failed
                self._server.get_server_port()
            else:
                self._server.check_connectivity()

    def stop(self) -> None:
        """Ends the server; also done when nobody holds this, and when the process ends."""
        self._stop()

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        try:
            with _started_by(self._start):
                yield
        except Exception as error:  # Beam's own is no more than that
            if self._listener is not None:
                self._listener.join(2)
            said = " / ".join(self._lines) or "nothing"
            status = one_line(error).removesuffix(
                " Next time a request is tried, the server will be restarted"
            )
            raise ModelError("no_server", f"{self.model}: {status} It last said: {said}") from None

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
        """In place of Beam's function of this use."""
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
    """Logs and keeps what a server prints. Holds no server, which ends when nobody does."""
    with said:
        for raw in said:
            line = raw.decode(errors="backslashreplace").rstrip()
            if line:
                lines.append(line)
                _log.info("%s", line)


def _without_proxy() -> None:
    """Beam's client would ask a proxy for the server, and Beam end it as one that never answers."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = os.environ.get(name, "")
        if "localhost" not in hosts:
            os.environ[name] = ",".join(filter(None, (hosts, "localhost", "127.0.0.1")))


_lock = threading.Lock()


@contextlib.contextmanager
def _started_by(start: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile, Beam's module starts processes by our function: it has no other way in."""
    with _lock:
        own, vllm_inference.start_process = vllm_inference.start_process, start
        try:
            yield
        finally:
            vllm_inference.start_process = own
