"""`chatflow replay`: runs `chatflow run` on dead letters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from chatflow.commands import run as of_chats
from chatflow.options import Parser

DESCRIPTION = """
Runs the pipeline again on dead letters: chats that could not be analysed, and analyses
that have no draft.

  chatflow replay --input 'results/dead_letters*.jsonl' --output results/replayed
"""

PASSES_FLAGS_ON = True


def add_arguments(parser: Parser) -> None:
    of_chats.add_arguments(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    return of_chats.run(parsed, rest, replay=True)
