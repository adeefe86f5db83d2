"""`chatflow model copies`: which models are in this machine's memory, and how often."""

from __future__ import annotations

import argparse
import collections
import json
import textwrap
import time
from typing import Any

from chatflow.models.copies import Copy, loaded


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "copies",
        help="which models are loaded on this machine, and how often",
        description=textwrap.dedent(
            """
            Lists the models that pipelines of this machine hold in memory now, with their
            processes. In a container, run it there. What to expect:

              --large_model=false                 one copy for each process of a worker
              (default)                           one for each worker
              --model_copies=N                    N for each worker
            """
        ).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--summary", choices=("table", "json"), default="table")
    parser.set_defaults(act=act)


def act(parsed: argparse.Namespace) -> int:
    found = loaded()
    if parsed.summary == "json":
        for copy in found:
            print(json.dumps({**copy._asdict(), "resident_mb": round(copy.resident_mb)}))
        return 0
    _show(found)
    return 0


def _show(found: list[Copy]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not found:
        console.print("no model is loaded on this machine")
        return
    by_model = collections.Counter(copy.model for copy in found)
    processes = len({copy.pid for copy in found})
    table = Table(title=f"{len(found)} copies of models in {processes} processes")
    for name in ("model", "copies", "process", "its memory", "loaded"):
        table.add_column(name, justify="left" if name == "model" else "right")
    last = None
    for copy in found:
        first = copy.model != last
        table.add_row(
            copy.model if first else "",
            str(by_model[copy.model]) if first else "",
            str(copy.pid),
            f"{copy.resident_mb:,.0f} MB",
            f"{time.time() - copy.since:,.0f} s ago",
        )
        last = copy.model
    console.print(table)
