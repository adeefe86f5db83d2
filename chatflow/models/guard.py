"""Runs a command that ends with the process that started it, however that ends.

  python -I guard.py COMMAND …

That process holds the other end of our standard input. When it is closed, or at SIGTERM, the
command is told to end with all that it has started; what is left after `GRACE` is killed. vLLM's
engines outlive a server that is killed, and keep the GPU's memory
(https://github.com/vllm-project/vllm/issues/55510). Imports nothing of chatflow's.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 8.0  # seconds; Beam kills us after ten


def main() -> None:
    # Ctrl-C is for our parent, which may still need the command while it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A group of its own, so that its children end with it.
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, number)

    def stop(*_: object) -> None:
        end(signal.SIGTERM)
        later = threading.Timer(GRACE, end, (signal.SIGKILL,))
        later.daemon = True
        later.start()

    def watch() -> None:
        sys.stdin.buffer.read()
        stop()

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()
    code = command.wait()
    end(signal.SIGKILL)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
