"""Which models are loaded on this machine: each leaves a note while it is in memory."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from chatflow.models.embedded import cache_root

_log = logging.getLogger(__name__)
_numbers = itertools.count()


class Copy(NamedTuple):
    """A model in a process's memory.

    Attributes:
      started: of the process, in the system's ticks; another process may have its number later.
      since: when it was loaded, in seconds since 1970.
    """

    model: str
    pid: int
    started: str
    since: float

    @property
    def resident_mb(self) -> float:
        """Memory of its process, in MB, with all that it holds.

        0 where the system does not say, or the process has ended.
        """
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def notes() -> Path:
    return cache_root() / "loaded"


def note(model: Any, name: str) -> None:
    """Says that a model is loaded, until it is no more; where it cannot be written, nothing."""
    copy = Copy(name, os.getpid(), _started(os.getpid()), time.time())
    path = notes() / f"{copy.pid}-{next(_numbers)}-{time.time_ns()}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        weakref.finalize(model, path.unlink, missing_ok=True)
        path.write_text(json.dumps(copy._asdict()))
    except OSError as error:
        _log.debug("no note of %s: %s", name, error)


def loaded() -> list[Copy]:
    """The models that are in memory now; notes of processes that died are removed."""
    found = []
    for path in sorted(notes().glob("*.json")):
        try:
            copy = Copy(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # being written, or gone
        if copy.started == _started(copy.pid):
            found.append(copy)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda copy: (copy.model, copy.since))


def _started(pid: int) -> str:
    """When a process began, or that it is there where the system does not say; else empty."""
    try:
        if Path("/proc/self/stat").exists():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        os.kill(pid, 0)
        return "at some time"
    except (OSError, IndexError):
        return ""
