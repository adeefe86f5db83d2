"""`chatflow model save-state-dict`: writes a model's weights as one file for workers."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatflow.commands.model import vertex_job
from chatflow.commands.model.fetch import add_output_flags, shown
from chatflow.commands.model.vertex_job import VERTEX_FLAGS
from chatflow.errors import UsageError, one_line
from chatflow.options import Parser
from chatflow.weights.checkpoints import finder
from chatflow.weights.state_dict import SUFFIXES, plan, write

if TYPE_CHECKING:
    from chatflow.weights.fetching import Progressing

DESCRIPTION = """
Writes the state_dict of a Hugging Face model as one file, which Beam's PytorchModelHandler and
--state_dict_path read, tensor by tensor: neither the model nor the file is ever in memory as a
whole. Its SHA-256 is written beside it. --on=vertex does the same on a machine of Vertex AI.
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="a model on the hub (google/flan-t5-xl), a folder, or gs://…"
    )
    parser.add_argument(
        "path", metavar="PATH", help="the file, local or gs://: .pt, .pth or .safetensors"
    )
    add_output_flags(parser)
    parser.add_switch("overwrite", help="replace what is at PATH")
    group = parser.add_argument_group("on Vertex AI")
    group.add_argument(
        "--on", choices=("here", "vertex"), default="here", help="where (default: %(default)s)"
    )
    for name, help in VERTEX_FLAGS.items():
        metavar = name.rsplit("_", 1)[-1].upper()
        group.add_argument(f"--{name}", default="", metavar=metavar, help=help)
    parser.add_switch("no_wait_until_finish", help="start the job, print its id, and end", to=group)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the file, here or on Vertex AI; returns the exit code."""
    check_path(parsed.path, parsed.overwrite)
    if parsed.on == "vertex":
        return vertex_job.run(parsed)
    if given := [name for name in (*VERTEX_FLAGS, "no_wait_until_finish") if getattr(parsed, name)]:
        raise UsageError(f"--{given[0]}: only with --on=vertex")
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
    """Raises `UsageError` for a wrong suffix, an unreachable place or a file not to overwrite."""
    if not path.endswith(SUFFIXES):
        raise UsageError(f"PATH={path}: must end in {', '.join(SUFFIXES)}")
    from apache_beam.io.filesystems import FileSystems

    with reached(path):
        there = FileSystems.exists(path)
    if there and not overwrite:
        raise UsageError(f"PATH={path} exists already; --overwrite replaces it")


def save(name: str, path: str, dtype: str) -> dict[str, Any]:
    """Writes the file and its SHA-256; returns the values of the summary.

    Writes to a temporary name first, so that `path` never holds an incomplete file. A file for
    another filesystem is made in the temporary folder (`TMPDIR`).

    Raises:
      UsageError: see `state_dict.plan` and `write`; or no room, or `path` cannot be written.
    """
    from rich.console import Console

    from chatflow.weights.fetching import Progressing

    started = time.monotonic()
    planned = plan(finder(name), name, dtype)
    with reached(path):
        made = _workplace(path, planned.bytes)
    with made:
        part = Path(made.name) / f"{path.rsplit('/', 1)[-1]}.part"
        progress = Progressing("no tensor yet", planned.bytes)
        with shown(progress, name, Console(stderr=True)), reached(path, OSError):
            write(planned, part, _counting(progress, len(planned.stored)))
        size = part.stat().st_size
        with reached(path):
            sha256 = _publish(part, path)
    return {
        "model": name, "path": path, "dtype": dtype, "parameters": planned.parameters,
        "tensors": len(planned.stored), "bytes": size, "sha256": sha256,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


@contextlib.contextmanager
def reached(path: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turns any filesystem's error into a `UsageError` that names the file."""
    try:
        yield
    except kind as error:
        raise UsageError(f"PATH={path} cannot be written: {one_line(error)}") from error


def _workplace(path: str, needed: int) -> tempfile.TemporaryDirectory[str]:
    """Makes a folder with enough room, beside a local `path` so that a rename suffices."""
    remote = "://" in path
    folder = tempfile.gettempdir() if remote else os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UsageError(
            f"{folder} has {free / 1e9:.1f} GB free, but the file needs {needed / 1e9:.1f} GB"
            + (" (TMPDIR names another folder)" if remote else "")
        )
    return tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.rsplit('/', 1)[-1]}-")


def _publish(part: Path, path: str) -> str:
    """Moves the finished file to `path`, writes its SHA-256 beside it and returns that."""
    from chatflow.weights.folders import Folder

    folder, name = Folder(os.path.dirname(path) or "."), path.rsplit("/", 1)[-1]
    sha256 = Folder(str(part.parent)).sha256(part.name)
    folder.put(part, name)
    part.write_text(f"{sha256}  {name}\n")
    folder.put(part, f"{name}.sha256")
    return sha256


def _counting(progress: Progressing, tensors: int) -> Callable[[int, int], None]:
    """Returns a callback that adds the written tensors and bytes to `progress`."""
    written = 0

    def count(more: int, size: int) -> None:
        nonlocal written
        written += more
        progress.got += size
        progress.doing = f"{written} of {tensors} tensors"

    return count
