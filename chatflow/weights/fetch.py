"""`chatflow model fetch`: weights, brought to where workers load them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from chatflow.models.presets import is_instruct

if TYPE_CHECKING:
    from rich.console import Console

    from chatflow.weights.folders import Folder
    from chatflow.weights.transfer import Progressing

FETCH = """
Copies a model to a folder, here or at gs://, for `--model` of chatflow run. SOURCE is
gemma3-270m (embedded), hf://ORG/NAME, ORG/NAME@REVISION, kaggle://…, a preset of keras_hub's,
gs://… or a folder. SHA256SUMS.json is written last: where it is, the folder is whole. A
second run takes what is there.

  HF_TOKEN=… chatflow model fetch google/gemma-3-1b-it gs://BUCKET/models/gemma-3-1b-it
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "fetch",
        help="copy a model to a folder or bucket",
        description=FETCH.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.set_defaults(act=_fetch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all commands have that bring a model from one place to another."""
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION", help="a folder, or gs://BUCKET/NAME")
    parser.add_argument("--summary", choices=("table", "json"), default="table")


def name_warning(source: str, folder: str) -> str:
    """What to say where a name hides that a model follows instructions; else nothing."""
    if not is_instruct(source) or is_instruct(folder):
        return ""
    return (
        f"warning: {source} was tuned to follow instructions, and the name {folder} does not say "
        "so: prompts will not be wrapped as its turns; put -it or instruct into the name"
    )


@contextlib.contextmanager
def shown(progress: Progressing, folder: Folder, console: Console) -> Iterator[None]:
    """Shows on a terminal, or as lines in a log, how far it has come."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    from chatflow.report import in_background, lines

    def text() -> str:
        if not progress.total:
            return f"{folder.url}: looking for the files"
        there = progress.here if folder.path is not None else progress.sent
        return f"{folder.url}: {there / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB"

    def bars(done: threading.Event) -> None:
        columns = (
            TextColumn("{task.description:>8}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            fetched = bars.add_task("fetched", total=None)
            sent = None if folder.path is not None else bars.add_task("sent", total=None)
            while not done.wait(0.2):
                total = progress.total or None
                bars.update(fetched, completed=progress.here, total=total)
                if sent is not None:
                    bars.update(sent, completed=progress.sent, total=total)

    with in_background(bars) if console.is_terminal else lines(console, text):
        yield


def _fetch(parsed: argparse.Namespace) -> int:
    """The command."""
    from rich.console import Console

    from chatflow.weights.folders import Folder
    from chatflow.weights.sources import open_source
    from chatflow.weights.transfer import Progressing, fetch

    started = time.monotonic()
    console = Console(stderr=True)
    folder = Folder(parsed.destination)
    progress = Progressing()
    with shown(progress, folder, console):
        fetched = fetch(open_source(parsed.source), folder, progress)
    say(parsed, "fetched", fetched.to_dict(), str(fetched), started)
    return 0


def say(
    parsed: argparse.Namespace, done: str, values: Mapping[str, Any], text: str, started: float
) -> None:
    """The end of a command: a warning where one is due, and one line for people or machines."""
    if warning := name_warning(parsed.source, parsed.destination):
        print(warning, file=sys.stderr)
    seconds = round(time.monotonic() - started, 2)
    if parsed.summary == "json":
        places = {"source": parsed.source, "destination": parsed.destination}
        print(json.dumps({**places, **values, "seconds": seconds}))
    else:
        print(f"{done} {parsed.destination} in {seconds} s: {text}", file=sys.stderr)
