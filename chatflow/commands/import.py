"""`chatflow import`: turns the exports of other systems into chatflow's own JSON Lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import IO

from chatflow.errors import FAILED, UsageError
from chatflow.options import MAX_LINE_BYTES, Parser, add_flags

DESCRIPTION = """
Reads files of any format that `chatflow run` reads (--input_format), writes their chats, one per
line, and prints a report. What cannot be read goes to OUTPUT.dead_letters.jsonl, for
`chatflow replay`. Nothing is sent anywhere.

  chatflow import export.zip chats.jsonl
  chatflow import tickets.csv chats.jsonl --columns chat=ticket_id,who=author,text=body
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="one file, a folder or a 'glob'")
    parser.add_argument("output", metavar="OUTPUT", help="the file to write, e.g. chats.jsonl")
    parser.add_argument("--summary", choices=("table", "json"), default="table")
    add_flags(parser, only=("input_format", "columns", "roles", "placeholders"))


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes the chats; prints a report; returns the exit code.

    Raises:
      UsageError: there is no such file, none can be read, or the output cannot be written.
    """
    from rich.console import Console

    from chatflow import metrics
    from chatflow.dead_letters import dead_letter
    from chatflow.options import from_flags
    from chatflow.records import Chat, Range
    from chatflow.sinks.files import check_writable
    from chatflow.sources.chats import customs_by
    from chatflow.sources.lines import about, read_lines, root_of
    from chatflow.sources.parse import parse_arrival
    from chatflow.sources.read import check_input, split_inputs

    customs = customs_by(from_flags(parsed))
    paths, root = check_input(parsed.file, customs), root_of(split_inputs(parsed.file))
    folder = os.path.dirname(os.path.abspath(parsed.output))
    check_writable(folder, "OUTPUT")
    letters_in = f"{parsed.output.removesuffix('.jsonl')}.dead_letters.jsonl"
    real = {os.path.realpath(path) for path in paths}
    if not real.isdisjoint({os.path.realpath(parsed.output), os.path.realpath(letters_in)}):
        raise UsageError(f"{parsed.output} is one of the files to read; name another output")
    console = Console(stderr=True, highlight=False)
    counts: Counter[str] = Counter()
    before = metrics.local_counts()
    first_error = ""
    if os.path.isdir(parsed.output):
        raise UsageError(f"OUTPUT: {parsed.output!r} is a folder; name a file in it")
    with (
        open(f"{parsed.output}.part", "w", encoding="utf-8") as out,
        contextlib.ExitStack() as opened,
        console.status("reading") as status,
    ):
        letters: IO[str] | None = None
        for path in paths:
            if found := about(path, customs):
                console.print(f"{path} is {found}", soft_wrap=True)
            for arrival in read_lines(Range(path), MAX_LINE_BYTES, customs=customs, root=root):
                counts["lines"] += 1
                own: Counter[str] = Counter()
                try:
                    read = parse_arrival(arrival, timedelta(0), customs, own)
                except Exception as error:
                    if letters is None:
                        letters = opened.enter_context(
                            open(f"{letters_in}.part", "w", encoding="utf-8")
                        )
                    letter = dead_letter("read", arrival, error)
                    letters.write(letter.to_json() + "\n")
                    first_error = first_error or f"{error} ({arrival.source or path})"
                    counts[f"dead_letters/{letter.reason}"] += 1
                    continue
                counts.update(own)
                for one in read:
                    is_chat = isinstance(one, Chat)
                    counts["chats" if is_chat else "messages_and_ends"] += 1
                    counts["messages"] += len(one.messages) if isinstance(one, Chat) else 0
                    out.write((one.to_json() if isinstance(one, Chat) else one.to_line()) + "\n")
                if counts["lines"] % 1000 == 0:
                    status.update(f"reading: {counts['chats']:,} chats")
    os.replace(f"{parsed.output}.part", parsed.output)
    if letters is not None:
        os.replace(f"{letters_in}.part", letters_in)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(letters_in)  # of an earlier import
    for name, count in metrics.local_counts().items():
        if name.startswith(("formats/", "input/")) and count > before.get(name, 0):
            counts[name] += count - before.get(name, 0)
    written = [parsed.output, *([letters_in] if letters is not None else [])]
    _show(parsed.summary == "json", counts, written, first_error)
    nothing = first_error and not counts["chats"] + counts["messages_and_ends"]
    return FAILED if nothing else 0


def _show(as_json: bool, counts: Counter[str], written: list[str], first_error: str) -> None:
    if as_json:
        print(json.dumps({**counts, "written": written}))
        return
    from rich.console import Console
    from rich.table import Table

    from chatflow.sources.formats.objects import described

    def under(prefix: str) -> dict[str, int]:
        return {name[len(prefix) :]: n for name, n in counts.items() if name.startswith(prefix)}

    if formats := under("formats/"):
        found = described(formats, under("input/"), counts["messages"])
        Console(stderr=True, highlight=False).print(found, soft_wrap=True, markup=False)
    table = Table(title="Imported", show_header=False)
    for name, count in counts.items():
        table.add_row(
            name.rpartition("input/")[2].replace("_", " ").replace("/", ": "), f"{count:,}"
        )
    table.add_row("written to", "\n".join(written))
    Console().print(table)
    if first_error:
        print(f"chatflow: the first that could not be read: {first_error}", file=sys.stderr)
