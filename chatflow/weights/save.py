"""`chatflow model save-state-dict`: a model's weights as one file that workers load."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import GoogleAuthError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from chatflow.errors import UsageError, one_line
from chatflow.report import lines
from chatflow.weights import vertex_job
from chatflow.weights.checkpoints import finder
from chatflow.weights.state_dict import SUFFIXES, Plan, plan, write

COPY_BYTES = 1 << 24


def act(parsed: argparse.Namespace) -> int:
    """The command: here, or on Vertex AI."""
    check_path(parsed.path, parsed.overwrite)
    if parsed.on == "vertex":
        return vertex_job.run(parsed)
    vertex_job.check_unused(parsed)
    saved = save(parsed.name, parsed.path, parsed.dtype)
    if parsed.summary == "json":
        print(json.dumps(saved))
    else:
        print(
            f"{saved['path']}: {saved['parameters']:,} parameters as {saved['dtype']}, "
            f"{saved['bytes'] / 1e6:,.1f} MB in {saved['seconds']} s\nSHA-256 {saved['sha256']}"
        )
    return 0


def check_path(path: str, overwrite: bool) -> None:
    """Makes sure that a file can be made under this name.

    Raises:
      UsageError: it has another suffix, is there already, or its place cannot be asked.
    """
    if not path.endswith(SUFFIXES):
        raise UsageError(f"PATH={path}: must end in {', '.join(SUFFIXES)}")
    with reached(path):
        there = FileSystems.exists(path)
    if there and not overwrite:
        raise UsageError(f"PATH={path} is there already; --overwrite replaces it")


def save(name: str, path: str, dtype: str) -> dict[str, Any]:
    """Writes the file and its sum; returns what was written, for the summary.

    The file is written under another name first, so that no broken one is ever found at `path`.
    What is bound for another filesystem is made in the temporary folder (`TMPDIR`).

    Raises:
      UsageError: as `state_dict.plan` and `write`; or there is no room, or no way to write there.
    """
    started = time.monotonic()
    planned = plan(finder(name), name, dtype)
    base = path.rsplit("/", 1)[-1]
    remote = "://" in path
    folder = tempfile.gettempdir() if remote else os.path.dirname(path) or "."
    with reached(path):
        if not remote:
            os.makedirs(folder, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < planned.bytes:
            raise UsageError(
                f"{folder} has {free / 1e9:.1f} GB free, and the file needs "
                f"{planned.bytes / 1e9:.1f} GB" + (" (TMPDIR names another)" if remote else "")
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{base}-") as made:
            part = Path(made) / f"{base}.part"
            with shown(planned, name) as progress:
                write(planned, part, progress)
            size = part.stat().st_size
            if remote:
                sha256 = _copy(part, f"{path}.part")
            else:
                with part.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            _remove(path, f"{path}.sha256")
            if remote:
                FileSystems.rename([f"{path}.part"], [path])
            else:
                part.replace(path)
        with FileSystems.create(f"{path}.sha256", "text/plain", "uncompressed") as file:
            file.write(f"{sha256}  {base}\n".encode())
    return {
        "model": name, "path": path, "dtype": dtype, "parameters": planned.parameters,
        "tensors": len(planned.stored), "bytes": size, "sha256": sha256,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


@contextlib.contextmanager
def reached(path: str) -> Iterator[None]:
    """Says of a filesystem's error what it was about."""
    try:
        yield
    except (OSError, ValueError, BeamIOError, GoogleAPIError, GoogleAuthError) as error:
        raise UsageError(f"PATH={path} cannot be written: {one_line(error)}") from None


def _copy(part: Path, target: str) -> str:
    """Copies a file to another filesystem; gives its SHA-256."""
    total = hashlib.sha256()
    kind = "application/octet-stream"
    with part.open("rb") as source, FileSystems.create(target, kind, "uncompressed") as copy:
        while data := source.read(COPY_BYTES):
            total.update(data)
            copy.write(data)
    return total.hexdigest()


def _remove(*paths: str) -> None:
    if there := [path for path in paths if FileSystems.exists(path)]:
        FileSystems.delete(there)


@contextlib.contextmanager
def shown(planned: Plan, name: str) -> Iterator[Any]:
    """Shows on stderr how many tensors and bytes are written; a bar, or lines in a log."""
    console = Console(stderr=True)
    of, done = len(planned.stored), [0, 0]

    def text() -> str:
        size = f"{done[1] / 1e6:,.0f} of {planned.bytes / 1e6:,.0f} MB"
        return f"{name}: {done[0]} of {of} tensors, {size}"

    columns = (
        TextColumn(f"{{task.fields[tensors]}} of {of} tensors"), BarColumn(), DownloadColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    watched = console.is_terminal
    bars = Progress(*columns, console=console, transient=True, disable=not watched)
    bar = bars.add_task(name, total=planned.bytes, tensors=0)

    def progress(tensors: int, size: int) -> None:
        done[:] = done[0] + tensors, done[1] + size
        bars.update(bar, completed=done[1], tensors=done[0])

    with bars, contextlib.nullcontext() if watched else lines(console, text):
        yield progress
    if not watched:
        console.print(text(), highlight=False, markup=False, soft_wrap=True)
