"""llama.cpp's own server on the embedded model's file, on loopback: a real server of OpenAI's
protocol. `python -m llamacpp FILE` serves until it is stopped, and prints its address."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """Starts the server on a free port; yields its address, with the path of the protocol."""
    command = [sys.executable, __file__, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()  # when it listens
            if not address:
                raise RuntimeError(f"llama.cpp's server ended with {server.wait()}")
            yield f"{address}/v1"
        finally:
            server.terminate()


def main(path: str) -> None:
    import socket

    import xllamacpp

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port, settings.model_alias = path, port, {"gemma3-270m"}
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 8192, 2, 2
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
