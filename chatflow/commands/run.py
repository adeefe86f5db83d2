"""`chatflow run`: analyses chats, or dead letters for `replay`."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatflow.errors import FAILED, UsageError
from chatflow.options import Options, Parser, add_flags, from_flags

if TYPE_CHECKING:
    from chatflow.running.summary import Summary

DESCRIPTION = """
Analyses chats. Reads one JSON object per line; writes analyses, drafts and dead letters.

  chatflow run --input 'chats/*.jsonl' --output results
  chatflow run --input projects/P/subscriptions/events --output results

A chat: {"chat_id": "7", "messages": [{"user_id": "1", "role": "customer", "text": "…"}]}
A message of one: {"chat_id": "7", "user_id": "1", "role": "customer", "text": "…"}
Its end: {"chat_id": "7", "event": "closed"}
"""

PASSES_FLAGS_ON = True


def add_arguments(parser: Parser) -> None:
    add_flags(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str], replay: bool = False) -> int:
    """Starts the pipeline and waits for it, unless told not to; returns the exit code."""
    from chatflow.sinks.tables import ending_of
    from chatflow.sources.chats import customs_by
    from chatflow.sources.read import check_input, split_inputs

    options = from_flags(parsed, required=("input",))
    for source in split_inputs(options.input) if replay else ():
        if ending_of(source):
            raise UsageError(
                f"--input: {source} is a table, from which dead letters cannot be replayed; "
                "name their JSON Lines, or the topic or database that has them"
            )
    if "://" not in options.input:
        check_input(
            options.input, customs_by(options)
        )  # before the seconds that it takes to import the rest
    _import_the_rest()
    from chatflow.running.launch import execute, start

    if "--no_wait_until_finish" in rest:
        start(options, rest, replay)
    else:
        summary = execute(options, rest, replay=replay)
        show_summary(summary, options)
        if problem := summary.problem:
            print(f"chatflow: {problem}{_first_error(summary)}", file=sys.stderr)
            return FAILED
    return 0


def _import_the_rest() -> None:
    """Imports Beam and what builds the pipeline, without looking for garbage in between.

    Modules stay, so the collector finds nothing in them, and takes a fifth of the time to look.
    """
    if gc.get_freeze_count():
        return  # a second run in this process
    gc.disable()
    try:
        importlib.import_module("chatflow.running.terminal")
    finally:
        gc.freeze()
        gc.enable()


def _first_error(summary: Summary) -> str:
    from chatflow.records import DeadLetter
    from chatflow.running.summary import read_records

    letters = read_records(DeadLetter, summary.readable("dead_letters"))
    first = next((letter for letter in letters if letter.stage == "read"), None)
    return f"; the first: {first.error}" if first else ""


def show_summary(summary: Summary, options: Options) -> None:
    """Prints a run's results as tables or one line of JSON."""
    if options.summary == "json":
        print(summary.to_json())
        return
    from rich.console import Console

    from chatflow.running.terminal import counts_table, results_table

    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.show and any(map(summary.readable, summary.destinations)):
        console.print(results_table(summary, options.show))
    console.print(counts_table(summary))
