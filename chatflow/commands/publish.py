"""`chatflow publish`: publishes chats or messages of files to a Pub/Sub topic, at a rate."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence

from chatflow.errors import UsageError
from chatflow.options import Parser, add_flags

DESCRIPTION = """
Publishes each line of a file, or of several (a glob), as a message. If the file is in another
format that `chatflow run` reads, publishes each chat as a message.

  chatflow publish chats.jsonl --topic projects/P/topics/events --rate 10 --as_messages
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        help="JSON Lines (chats, messages, anything) or an export; one file, a folder or a 'glob'",
    )
    parser.add_argument("--topic", required=True, help="projects/PROJECT/topics/NAME")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="messages a second (default: as fast as possible)"
    )
    parser.add_switch(
        "as_messages",
        help="send each chat as if it happened now: its single messages, then its end",
    )
    parser.add_argument("--summary", choices=("table", "json"), default="table")
    add_flags(parser, only=("input_format", "columns"))


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from chatflow.options import from_flags
    from chatflow.running.publishing import (
        Replay,
        as_they_are,
        chats_in,
        others_in,
        read_lines,
        send,
    )
    from chatflow.sinks.pubsub import PUBSUB_TOPIC
    from chatflow.sources.chats import customs_by

    if not (topic := PUBSUB_TOPIC.fullmatch(parsed.topic)):
        raise UsageError(f"--topic={parsed.topic}: must be projects/PROJECT/topics/NAME")
    if not 0 <= parsed.rate < math.inf:
        raise UsageError(f"--rate={parsed.rate}: must be at least 0")
    customs = customs_by(from_flags(parsed))
    raw = read_lines(parsed.file, customs=customs)
    lines = as_they_are(raw, customs)
    total = sum(1 for _ in raw)  # all must be readable before anything is sent
    if parsed.as_messages:
        others = as_they_are(others_in(raw, customs), customs)
        lines = itertools.chain(others, Replay(chats_in(raw, customs)))
        # A chat is its messages and its end.
        total += sum(len(chat.messages) for chat in chats_in(raw, customs))
    console = Console(stderr=True)
    started = time.monotonic()
    columns = (TextColumn("published"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        count = send(
            lines, topic[1], parsed.rate, lambda so_far: bar.update(task, completed=so_far)
        )
    seconds = round(time.monotonic() - started, 2)
    if parsed.summary == "json":
        print(json.dumps({"published": count, "topic": topic[1], "seconds": seconds}))
    else:
        print(f"published {count} messages to {topic[1]} in {seconds} s", file=sys.stderr)
    return 0
