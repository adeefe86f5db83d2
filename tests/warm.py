"""The command `chatflow` without its seconds of imports, for tests that type many commands.

`python warm.py FOLDER` imports chatflow once and writes a program `chatflow` into the folder. For
each command that is typed, it forks a process that has the caller's arguments, folder, environment,
stdin, stdout and stderr, and ends with the exit code of `chatflow`. It prints a line when it is
ready, and serves until it is stopped.
"""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from chatflow.cli import main

IMPORTED = (
    "alembic.command", "apache_beam.runners.portability.fn_api_runner.fn_runner",
    "chatflow.database.upserts", "chatflow.pipeline", "chatflow.running.launch",
    "chatflow.sinks.database", "chatflow.sinks.tables", "py3langid.langid",
)  # fmt: skip
PROGRAM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(said).to_bytes(4, "big")], [0, 1, 2])
server.sendall(said)
code = server.recv(1)
sys.exit(code[0] if code else "the server of warm.py ended")
"""


@contextlib.contextmanager
def warm_chatflow(folder: Path) -> Iterator[None]:
    """Puts a fast program `chatflow` into the folder, until the end of the context."""
    command = [sys.executable, __file__, str(folder)]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline(), "warm.py did not start"
            yield
        finally:
            server.terminate()


def serve(folder: Path) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        program = folder / "chatflow"
        program.write_text(PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
    with caller:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            caller.send(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
            os._exit(0)
        size, files, *_ = socket.recv_fds(caller, 4, 3)
        with caller.makefile("rb") as said:
            sys.argv, place, environment = json.loads(said.read(int.from_bytes(size, "big")))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
