"""A separate PostgreSQL for tests: the real server, on a free port, gone afterwards."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chatflow.running.emulator import free_port

INSTALL = "install PostgreSQL's server (Debian: apt-get install postgresql)"


class MissingError(Exception):
    """PostgreSQL is not installed here; the message says what to install."""


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Starts a server with an empty cluster; yields the URI of its database, without a name.

    Raises:
      MissingError: its programs are not here.
    """
    folder = Path(tempfile.mkdtemp(prefix="chatflow-postgres-"))
    own = _other_user(folder)
    data, port = folder / "data", free_port()
    subprocess.run(
        [
            _program("initdb"),
            "-D",
            data,
            "-U",
            "chatflow",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        **own,
    )
    rules = data / "pg_hba.conf"
    # Of one user it wants a password.
    rules.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}"]
    settings += ["fsync=off", "max_connections=200"]
    flags = " ".join(f"-c {setting}" for setting in settings)
    control = [_program("pg_ctl"), "-D", data, "-w"]
    try:
        subprocess.run(
            [*control, "-o", flags, "-l", folder / "log", "start"],
            check=True,
            stdout=subprocess.DEVNULL,
            **own,
        )
        yield f"postgresql+psycopg://chatflow@127.0.0.1:{port}/"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], stdout=subprocess.DEVNULL, **own)
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str:
    try:
        folder = subprocess.run(
            ["pg_config", "--bindir"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        folder = ""
    found = shutil.which(name, path=os.pathsep.join([folder, os.environ.get("PATH", "")]))
    if found is None:
        raise MissingError(INSTALL)
    return found


def _other_user(folder: Path) -> dict[str, str]:
    """PostgreSQL does not run as root; there, it is another user's."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            return {"user": name, "cwd": str(folder)}
    raise MissingError("PostgreSQL does not run as root, and there is no other user")
