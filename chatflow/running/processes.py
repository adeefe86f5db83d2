"""Starts processes and waits until they print that they are ready."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence


def started(
    command: Sequence[str], pattern: str, seconds: float
) -> tuple[subprocess.Popen[str], re.Match[str] | None, str]:
    """Starts a process and waits until it prints a line that matches `pattern`.

    Returns the process, the match and the last line printed. The match is None if the process ended
    or took too long; then it is killed, with its children.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # it can end when this closes, whatever ends this process
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for chatflow, which drains first
    )
    said, matches, known = [""], list[re.Match[str]](), threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:  # to the end, or the process would block on a full pipe
            if known.is_set():
                continue
            said[0] = line.strip() or said[0]
            if match := re.search(pattern, line):
                matches.append(match)
                known.set()
        known.set()

    threading.Thread(target=listen, daemon=True).start()
    known.wait(seconds)
    if not matches:
        kill(process)
    return process, matches[0] if matches else None, said[0]


def kill(process: subprocess.Popen[str]) -> None:
    """Kills a process that `started` returned, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
