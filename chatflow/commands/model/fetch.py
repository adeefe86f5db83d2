"""`chatflow model fetch`: copies weights to where workers load them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chatflow.options import Parser
from chatflow.weights.presets import is_instruct, names_instruct
from chatflow.weights.state_dict import DTYPES

if TYPE_CHECKING:
    from rich.console import Console

    from chatflow.weights.fetching import Progressing

DESCRIPTION = """
Copies a model to a folder, here or at gs://, for `--model` of chatflow run. SOURCE is
gemma3-270m (embedded), hf://ORG/NAME, ORG/NAME@REVISION, kaggle://…, a keras_hub preset,
gs://… or a folder. SHA256SUMS.json is written last: a folder that has it is complete. A second
run keeps the files that are right; if some have changed, SHA256SUMS.json is missing until all are
new. So give each version its own folder if --model_updates watches it: otherwise workers go back
to an older version until then.

  HF_TOKEN=… chatflow model fetch google/gemma-3-1b-it gs://BUCKET/models/gemma-3-1b-it
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    """Adds the flags that `fetch` and `convert` share."""
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION", help="a folder, or gs://BUCKET/NAME")
    parser.add_argument("--summary", choices=("table", "json"), default="table")


@contextlib.contextmanager
def shown(progress: Progressing, name: str, console: Console) -> Iterator[None]:
    """Shows progress while the block runs: as bars on a terminal, else as lines in a log."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from chatflow.running.terminal import in_background, lines

    def text() -> str:
        there = progress.sent if progress.sending else progress.here
        done = f", {there / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB" if progress.total else ""
        return f"{name}: {progress.doing}{done}"

    def bars(done: threading.Event) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            here = bars.add_task("", total=None)
            sent = bars.add_task("sending", total=None, visible=False)
            while not done.wait(0.2):
                total = progress.total or None
                bars.update(here, completed=progress.here, total=total, description=progress.doing)
                bars.update(sent, completed=progress.sent, total=total, visible=progress.sending)

    with in_background(bars) if console.is_terminal else lines(console, text):
        yield


def say(
    parsed: argparse.Namespace,
    done: str,
    values: Mapping[str, Any],
    text: str,
    started: float,
    instruct: bool,
) -> None:
    """Prints the outcome; warns if `instruct` and the destination's name does not say so."""
    if instruct and not is_instruct(parsed.destination):
        print(
            f"warning: {parsed.source} was tuned to follow instructions, but the name "
            f"{parsed.destination} does not say so: its prompts would not be wrapped as turns; "
            "put -it or instruct into the name",
            file=sys.stderr,
        )
    seconds = round(time.monotonic() - started, 2)
    if parsed.summary == "json":
        places = {"source": parsed.source, "destination": parsed.destination}
        print(json.dumps({**places, **values, "seconds": seconds}))
    else:
        print(f"{done} {parsed.destination} in {seconds} s: {text}", file=sys.stderr)


def add_output_flags(parser: Parser) -> None:
    """Adds the flags for the precision of a state dict and the format of the summary."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="precision (default: %(default)s)"
    )
    parser.add_argument("--summary", choices=("table", "json"), default="table")


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Fetches a model; returns the exit code."""
    from rich.console import Console

    from chatflow.weights.fetching import Progressing, fetch
    from chatflow.weights.folders import Folder
    from chatflow.weights.hubs import open_source

    started = time.monotonic()
    folder = Folder(parsed.destination)
    progress = Progressing()
    with shown(progress, folder.url, Console(stderr=True)):
        fetched = fetch(open_source(parsed.source), folder, progress)
    instruct = names_instruct(parsed.source)
    say(parsed, "fetched", fetched.to_dict(), str(fetched), started, instruct)
    return 0
