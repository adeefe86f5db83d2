"""`chatflow run` and `replay`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from chatflow.options import Options, from_flags
from chatflow.running.launch import execute, launch
from chatflow.running.summary import Summary


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """The command: waits for the pipeline, unless told not to."""
    options = from_flags(parsed, required=("input",))
    if "--no_wait_until_finish" in rest:
        launch(options, rest, parsed.replay)
    else:
        show_summary(execute(options, rest, replay=parsed.replay), options)
    return 0


def show_summary(summary: Summary, options: Options) -> None:
    """Prints what came out of a run: tables, or one line of JSON."""
    if options.summary == "json":
        print(summary.to_json())
        return
    from rich.console import Console

    from chatflow.running.terminal import counts_table, results_table

    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.show and any(map(summary.files, summary.destinations)):
        console.print(results_table(summary, options.show))
    console.print(counts_table(summary))
