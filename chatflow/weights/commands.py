"""The commands of `chatflow model`, on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from chatflow.options import Parser
from chatflow.weights import convert, fetch, parsers


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds each command's parser; `parsed.act(parsed)` then runs it and gives the exit code."""
    commands: Any = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    fetch.add(commands)
    convert.add(commands)
    parsers.add_save(commands)
    parsers.add_info(commands)
