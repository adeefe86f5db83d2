"""Runs a command that ends with the process that started it, however that ends.

  python -I guard.py COMMAND …

That process holds the other end of our standard input. When it is closed, or at SIGTERM, the
command is told to end with all that it has started; what is left after `GRACE` is killed. vLLM's
engines outlive a server that is killed, and keep the GPU's memory
(https://github.com/vllm-project/vllm/issues/55510). Where we are killed ourselves, Linux tells the
command alone, and nobody sees to it that it ends. Imports nothing of chatflow's.
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
    # Ctrl-C is for our parent, which may still need the command while it drains.
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
    # A group of its own, so that its children end with it.
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
    """What the command does before it starts, so that it is told to end when we are killed.

    By SIGTERM, at which vLLM's server ends its engines; None where the system cannot do it.
    """
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
