"""`chatflow tail`: prints results from Pub/Sub as they arrive."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from chatflow.errors import UsageError
from chatflow.options import Parser, number

DESCRIPTION = """
Prints the analyses, drafts and dead letters of topics (from now on) or subscriptions.

  chatflow tail projects/P/topics/analyses projects/P/topics/drafts
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="topics or subscriptions")
    parser.add_switch("json", help="print records as lines of JSON")
    parser.add_argument(
        "--count", type=number(int, zero=True), default=0, help="end after this many records"
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints until it is interrupted or `--count` is reached."""
    from rich.console import Console

    from chatflow.running.terminal import said
    from chatflow.sources.puller import follow
    from chatflow.sources.read import PUBSUB_INPUT

    paths = []
    for path in parsed.paths:
        if not (matched := PUBSUB_INPUT.fullmatch(path)):
            raise UsageError(
                f"{path!r}: must be projects/PROJECT/topics/NAME or "
                "projects/PROJECT/subscriptions/NAME"
            )
        paths.append(matched[1])
    console = Console(highlight=False, soft_wrap=True)
    shown = 0
    with follow(paths) as arrived:
        while not parsed.count or shown < parsed.count:
            for message in arrived():
                if parsed.json:
                    print(message.data.decode(errors="backslashreplace"), flush=True)
                else:
                    console.print(said(message.data))
                shown += 1
    return 0
