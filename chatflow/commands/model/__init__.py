"""`chatflow model`: fetches, converts and measures models, a module a command."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

DESCRIPTION = "Brings models to where workers load them, and says what they need."

COMMANDS = {
    "fetch": "copy a model to a folder or bucket",
    "convert": "make a preset of Keras's from GGUF or Hugging Face's format",
    "save-state-dict": "write a model's weights as one file of a chosen precision",
    "info": "parameters, memory and machines of a model",
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds each command's parser; `parsed.act(parsed)` then runs it and returns the exit code."""
    from chatflow.options import Parser

    commands: Any = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    for name, help in COMMANDS.items():
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        made = commands.add_parser(
            name,
            help=help,
            description=module.DESCRIPTION.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(made)
        made.set_defaults(act=lambda parsed, module=module: module.run(parsed, []))
