"""Processes of Python that have imported chatflow already, for tests that start many.

`python warm.py FOLDER` imports chatflow once and serves at a socket in the folder until it is
stopped. For each caller it forks a process that has the caller's arguments, folder, environment
and files, and does what `python -c CODE ARGUMENTS` or `python -m MODULE ARGUMENTS` would do. The
programs `chatflow` and `python` in the folder are such callers.
"""

import concurrent.futures
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

from remembered import remember

IMPORTED = (
    "alembic.command", "apache_beam.runners.portability.fn_api_runner.fn_runner",
    "chatflow.cli", "chatflow.commands.run", "chatflow.database.upserts", "chatflow.pipeline",
    "chatflow.running.launch", "chatflow.running.summary", "chatflow.running.terminal",
    "chatflow.sinks.database", "chatflow.sinks.tables", "py3langid.langid",
)  # fmt: skip
PROGRAM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
said = json.dumps([[*{first}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(said).to_bytes(4, "big")], [0, 1, 2])
server.sendall(said)
replies = server.makefile()
replies.readline()
sys.exit(int(replies.readline() or "1"))
"""


class Warm:
    """The server of warm processes.

    Attributes:
      folder: has the programs `chatflow` and `python`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        command = [sys.executable, __file__, str(folder)]
        paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._server = subprocess.Popen(
            command, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline(), "warm.py did not start"

    def close(self) -> None:
        """Ends the server and all its processes."""
        with self._server:
            os.killpg(self._server.pid, signal.SIGKILL)

    def start(
        self, *arguments: str, cwd: str | Path = ".", env: Mapping[str, str] | None = None
    ) -> "Process":
        """Starts a process with pipes; the arguments are those of Python, `-c` or `-m` first."""
        own, others = zip(*(os.pipe() for _ in range(3)), strict=True)
        stdin, stdout, stderr = others[0], own[1], own[2]
        said = json.dumps([arguments, os.path.abspath(cwd), dict(env or os.environ)]).encode()
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self.folder / "socket"))
        files = [own[0], others[1], others[2]]
        socket.send_fds(server, [len(said).to_bytes(4, "big")], files)
        server.sendall(said)
        for file in files:
            os.close(file)
        return Process(server, stdin, stdout, stderr)

    def run(self, *arguments: str, **given: object) -> "Process":
        """Runs a process to its end; then it has its `returncode`, `said` and `complained`."""
        with self.start(*arguments, **given) as process:
            process.communicate()
        return process


class Process:
    """A process that was started warm, with the methods of `subprocess.Popen`, in text."""

    def __init__(self, server: socket.socket, stdin: int, stdout: int, stderr: int):
        self._replies, self._server = server.makefile(), server
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(stdin, "w"), os.fdopen(stdout), os.fdopen(stderr),
        )  # fmt: skip
        self.pid = int(self._replies.readline())
        self.returncode: int | None = None

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            file.close()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout)
            self.returncode = int(self._replies.readline())
            self._server.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        self.stdin.close()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            complained = pool.submit(self.stderr.read)
            self.said, self.complained = self.stdout.read(), complained.result()
        self.wait()
        return self.said, self.complained

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(folder: Path) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    remember()
    gc.collect()
    gc.freeze()  # else each process would copy the memory of all that is imported
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        for name, first in (("chatflow", ["-m", "chatflow"]), ("python", [])):
            program = PROGRAM.format(python=sys.executable, address=address, first=first)
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
    with caller:
        size, files, *_ = socket.recv_fds(caller, 4, 3)
        with caller.makefile("rb") as said:
            arguments, place, environment = json.loads(said.read(int.from_bytes(size, "big")))
        if child := os.fork():
            for file in (0, 1, 2, *files):
                os.close(file)
            caller.sendall(b"%d\n" % child)
            _, status = os.waitpid(child, 0)
            with contextlib.suppress(OSError):  # a caller may have gone
                caller.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            os._exit(0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    kind, what, *sys.argv[1:] = arguments
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, vars(sys.modules["__main__"]))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
