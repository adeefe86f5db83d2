"""The commands of `chatflow model`, on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from chatflow.commands.model import convert, fetch, info, save_state_dict
from chatflow.options import Parser


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds each command's parser; `parsed.act(parsed)` then runs it and gives the exit code."""
    commands: Any = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    fetch.add(commands)
    convert.add(commands)
    save_state_dict.add_save(commands)
    info.add_info(commands)
