"""Locks output folders on this machine, so that two runs do not write over each other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from typing import Any

from chatflow.errors import UsageError
from chatflow.records import now

LOCK = ".chatflow-lock"

_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


def take(file: Any, how: int) -> bool:
    """Tries to lock a file and returns whether it succeeded; raises `OSError` without locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FolderLock:
    """A lock on a folder, held until `close` or until the process dies.

    A batch holds it alone; streams (`shared`) can hold it together. The lock file says who holds
    it.

    Attributes:
      alone: whether no other run uses the folder. False if the file system has no locks.

    Raises:
      UsageError: another run holds the lock; the message names it.
    """

    def __init__(self, folder: str, shared: bool, command: str):
        self._folder = folder
        self._file: Any = open(os.path.join(folder, LOCK), "a+")  # noqa: SIM115 (held for the run)
        try:
            # A stream first tries to be alone, so that it can clean up after killed runs.
            self.alone = take(self._file, fcntl.LOCK_EX)
            if not self.alone and not (shared and take(self._file, fcntl.LOCK_SH)):
                raise self._in_use()
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                self.close()
                raise
            logging.getLogger(__name__).debug("%s cannot be locked: %s", folder, error)
            self.alone = False
        except UsageError:
            self.close()
            raise
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "started": f"{now():%FT%TZ}",
        }
        self._file.truncate(0)
        self._file.write(json.dumps({**holder, "command": command}) + "\n")
        self._file.flush()

    def _in_use(self) -> UsageError:
        holder = ""  # the holder has just started, or the file cannot be read
        self._file.seek(0)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(self._file.read())
            holder = f" (process {found['process']} on {found['host']}, started {found['started']})"
        return UsageError(
            f"--output: {self._folder!r} is in use by another run{holder}; "
            "wait for it, or name another folder"
        )

    def share(self) -> None:
        """Lets streams into the folder; raises `UsageError` if a batch was faster."""
        if self.alone:
            self.alone = False
            if not take(self._file, fcntl.LOCK_SH):
                raise self._in_use()

    def close(self) -> None:
        self._file.close()
