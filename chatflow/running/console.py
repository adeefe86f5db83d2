"""Runs a console in a separate process beside a command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from chatflow.errors import UsageError
from chatflow.running.processes import started

READY = r"^console: (\S+)"
START_SECONDS = 60.0


@contextlib.contextmanager
def console_beside(flags: Sequence[str], port: int) -> Iterator[str]:
    """Runs `chatflow console` while the block runs, on `port` or a free one if that is taken.

    Yields its address; raises `UsageError`, with its last line, if it does not start.
    """
    command = [sys.executable, "-m", "chatflow", "console", "--while_stdin_is_open", *flags]
    process, ready, said = started([*command, f"--port={port}"], READY, START_SECONDS)
    if not ready and f"--port={port}:" in said:
        process, ready, said = started([*command, "--port=0"], READY, START_SECONDS)
    if not ready:
        raise UsageError(
            f"the console did not start (--console=false runs without it): "
            f"{said.removeprefix('chatflow: ')}"
        )
    try:
        yield ready[1]
    finally:
        process.terminate()
        process.wait()


def has_screen() -> bool:
    """Returns whether a browser would open in a window, and not in the terminal."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
