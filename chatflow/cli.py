"""The command line: finds the command and turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from chatflow import __version__
from chatflow.errors import FAILED, INTERRUPTED, USAGE, UsageError
from chatflow.options import Parser

COMMANDS = {
    "run": "analyse chats of files or of Pub/Sub",
    "stream": "the whole event-driven system on this machine, with a live view",
    "publish": "send chats or messages of a file to a Pub/Sub topic",
    "tail": "print results from Pub/Sub as they come",
    "replay": "try dead letters again",
    "evaluate": "measure tone, summaries and drafts on labelled chats",
    "tune": "train an adapter on your own labelled chats",
    "console": "the web page on which support staff review drafts",
    "size": "which machines a model needs, how many, and what they cost",
    "model": "fetch, convert and measure models",
}
"""What each command does; its module is `chatflow.commands.NAME`."""

_BEAM = """
Every other flag is Beam's and goes to the runner, e.g.
  --runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp
Without --runner the pipeline runs in this process. With one, --no_wait_until_finish
starts the job and ends.

Exit codes: 0 done (also with dead letters: they are counted and can be replayed),
1 the pipeline failed, 2 a wrong flag or file, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    try:
        parsed, rest = _parser().parse_known_args(arguments)
        command = f"chatflow {parsed.command}"
        if rest and not (rest[0].startswith("-") or rest[0] == ""):
            raise UsageError(f"unexpected argument {rest[0]!r}; see {command} --help")
        if rest and not parsed.module.PASSES_FLAGS_ON:
            raise UsageError(f"unknown flag {rest[0]}; see {command} --help")
        logging.basicConfig(
            level=logging.DEBUG if parsed.debug else logging.INFO,
            format="%(levelname)s %(name)s: %(message)s",
        )
        code: int = parsed.module.run(parsed, rest)
        return code
    except UsageError as error:
        print(f"chatflow: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("chatflow: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


class CommandParser(Parser):
    """The flags of one command, whose module is imported only when the command is given.

    The module has a `DESCRIPTION` and either subcommands in `COMMANDS` or `add_arguments(parser)`
    and `run(parsed, rest)`, which returns the exit code. `PASSES_FLAGS_ON` says whether unknown
    flags, `rest`, go to Beam.
    """

    module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        module = importlib.import_module(self.module)
        self.description = textwrap.dedent(module.DESCRIPTION).strip()
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        if hasattr(module, "COMMANDS"):
            _add_commands(self, module.COMMANDS, self.module)
        else:
            self.set_defaults(module=module, command=self.prog.removeprefix("chatflow "))
            self.epilog = _BEAM if module.PASSES_FLAGS_ON else None
            module.add_arguments(self)
            self.add_switch("debug", help="log everything, show tracebacks")
        return super().parse_known_args(args, namespace)


def _add_commands(parser: Parser, commands: Mapping[str, str], package: str) -> None:
    found = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, help in commands.items():
        command = found.add_parser(name, help=help, allow_abbrev=False)
        command.module = f"{package}.{name.replace('-', '_')}"


def _parser() -> Parser:
    parser = Parser(
        prog="chatflow",
        description="Reads support chats, asks a language model how each customer feels and what "
        "the chat is about, and drafts apologies to angry customers for staff to review.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"chatflow {__version__}")
    _add_commands(parser, COMMANDS, "chatflow.commands")
    return parser
