"""Runs a command that ends with the process that started this guard, however that process ends.

  python -I guard.py COMMAND …

When the parent closes our standard input, or at SIGTERM, the command and its children get SIGTERM,
and SIGKILL after `GRACE`. vLLM's engines outlive a killed server, and keep the GPU's memory
(https://github.com/vllm-project/vllm/issues/55510). If this guard is killed, Linux sends SIGTERM to
the command only, and nothing enforces its end. This module imports nothing of chatflow.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

GRACE = 8.0  # seconds; Beam kills us after ten
PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/pr_set_pdeathsig.2const.html


def main() -> None:
    # Ctrl-C is for our parent, which may need the command while it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command: subprocess.Popen[bytes] | None = None
    told = False

    def end(number: int) -> None:
        if command is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, number)

    def stop(*_: object) -> None:
        nonlocal told
        told = True
        end(signal.SIGTERM)
        later = threading.Timer(GRACE, end, (signal.SIGKILL,))
        later.daemon = True
        later.start()

    def watch() -> None:
        sys.stdin.buffer.read()
        stop()

    signal.signal(signal.SIGTERM, stop)
    # In a separate process group, so that its children end with it.
    command = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_tied()
    )
    if told:  # while it started
        stop()
    threading.Thread(target=watch, daemon=True).start()
    code = command.wait()
    end(signal.SIGKILL)
    os._exit(code if code >= 0 else 128 - code)


def _tied() -> Callable[[], None] | None:
    """Returns what makes the command get SIGTERM when we are killed; None except on Linux."""
    if sys.platform != "linux":
        return None
    prctl, guard = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard:  # killed just now
            os._exit(1)

    return tie


if __name__ == "__main__":
    main()
