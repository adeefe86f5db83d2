"""A console in a process of its own, beside what a command does."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from chatflow.errors import UsageError

START_SECONDS = 60.0


@contextlib.contextmanager
def console_beside(flags: Sequence[str], port: int) -> Iterator[str]:
    """Runs `chatflow console` meanwhile; gives its address.

    Args:
      port: where it is looked for first; another one, where that is taken.

    Raises:
      UsageError: it did not start; with what it said.
    """
    command = [sys.executable, "-m", "chatflow", "console", "--while_stdin_is_open", *flags]
    process, address, said = _started([*command, f"--port={port}"])
    if not address and f"--port={port}:" in said:
        process, address, said = _started([*command, "--port=0"])
    if not address:
        raise UsageError(
            f"the console did not start (--console=false goes without): "
            f"{said.removeprefix('chatflow: ')}"
        )
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


def _started(command: Sequence[str]) -> tuple[subprocess.Popen[str], str, str]:
    """The process, its address (empty where it has ended), and what it said last."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # it ends when this does, whatever ends this process
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for chatflow, which drains first
    )
    said: collections.deque[str] = collections.deque([""], maxlen=1)
    address: list[str] = []
    known = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.strip())
            if found := re.match(r"console: (\S+)", line):
                address.append(found[1])
                known.set()
        known.set()

    threading.Thread(target=listen, daemon=True).start()
    if not known.wait(START_SECONDS) or not address:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    return process, "".join(address), said[-1]


def has_screen() -> bool:
    """Whether a browser would come up in a window, and not in the terminal."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
