"""Runs the command line: finds the command and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from chatflow import __version__
from chatflow.errors import FAILED, INTERRUPTED, USAGE, UsageError, of_machine, one_line
from chatflow.options import Parser, unknown

_log = logging.getLogger(__name__)

COMMANDS = {
    "run": "analyse chats from files or Pub/Sub",
    "stream": "run the whole event-driven system on this machine, with a live view",
    "import": "turn exports of other systems into chatflow's own JSON Lines",
    "export": "write conversations of a database as CSV, Parquet, JSON Lines or CX Insights",
    "publish": "send chats or messages of a file to a Pub/Sub topic",
    "tail": "print results from Pub/Sub as they arrive",
    "replay": "try dead letters again",
    "evaluate": "measure tone, summaries and drafts on labelled chats",
    "estimate": "estimate the cost and time of all chats from a sample",
    "tune": "train an adapter on your own labelled chats",
    "console": "serve the web page where support staff review drafts",
    "size": "show which machines a model needs, how many, and what they cost",
    "model": "fetch, convert and measure models",
}
"""What each command does; its module is `chatflow.commands.NAME`."""

_BEAM = """
Every other flag is Beam's and goes to the runner, e.g.
  --runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp
Without --runner the pipeline runs in this process. With one, --no_wait_until_finish
starts the job and ends.

Exit codes: 0 done (even with dead letters: they are counted and can be replayed),
1 the pipeline failed, 2 a wrong flag or file, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; prints an error as one line on stderr."""
    _print_anything()
    try:
        parsed, rest = _parser().parse_known_args(arguments)
        if parsed.module is None:
            parsed.print_help(sys.stderr)
            return USAGE
        _start_logging(parsed.debug)
        code: int = parsed.module.run(parsed, rest)
        sys.stdout.flush()
        return code
    except UsageError as error:
        _log.debug("the command failed", exc_info=True)
        _say(str(error))
        return USAGE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED
    except Exception as error:
        _log.debug("the command failed", exc_info=True)
        if _is_of_credentials(error):
            _say(
                f"the credentials of Google Cloud cannot be used: {one_line(error)}; run `gcloud "
                "auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key "
                "file"
            )
            return USAGE
        _say(f"{explained(error)}; --debug shows the whole traceback")
        return FAILED
    finally:
        _drop_unprinted()


def explained(error: Exception) -> str:
    """Returns one line for an error that no command expects.

    It says whether the cause is this machine, a service or chatflow.
    """
    if _is_a(error, "google.api_core.exceptions", "GoogleAPIError"):
        return f"Google Cloud: {one_line(error)}"
    if isinstance(error, OSError):
        return of_machine(error)
    if isinstance(error, MemoryError):
        return "this machine does not have enough memory for this"
    said = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
    return f"internal error: {said}; please report it"


def _is_of_credentials(error: Exception) -> bool:
    if isinstance(error, OSError) and error.filename:
        return bool(error.filename == os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"))
    return _is_a(error, "google.auth.exceptions", "GoogleAuthError")


def _is_a(error: Exception, module: str, name: str) -> bool:
    """Returns whether an error is of a class, without importing its module.

    If the error is of that class, whoever raised it has imported the module.
    """
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def _say(text: str) -> None:
    """Prints one line on stderr, whatever the text contains."""
    with contextlib.suppress(OSError):
        print(f"chatflow: {' '.join(text.split())}", file=sys.stderr)


def _start_logging(debug: bool) -> None:
    logging.raiseExceptions = debug  # e.g. where stderr is a file on a full disk
    handler = logging.StreamHandler()
    kind = logging.Formatter if debug else ShortFormatter
    handler.setFormatter(kind("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    if not debug:
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it speaks when it is imported


class ShortFormatter(logging.Formatter):
    """Writes log records; of a traceback, e.g. of a retry by Beam, the first and last line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"{lines[0]} … {lines[-1]}" if "Traceback " in text else text


def _print_anything() -> None:
    """Lets stdout and stderr print any character in any locale, even if they are closed."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_unprinted() -> None:
    """Drops output that stdout does not take; else Python tries again at exit, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class CommandParser(Parser):
    """The flags of one command, whose module is imported only when the command is given.

    The module has a `DESCRIPTION` and either subcommands in `COMMANDS` or `add_arguments(parser)`
    and `run(parsed, rest)`, which returns the exit code. `PASSES_FLAGS_ON` says whether unknown
    flags, `rest`, go to Beam.
    """

    module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the parsed flags and those for Beam.

        Raises:
          UsageError: an argument is unknown (reported first), is missing, or has a wrong value.
        """
        module = importlib.import_module(self.module)
        self.description = textwrap.dedent(module.DESCRIPTION).strip()
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        if hasattr(module, "COMMANDS"):
            _add_commands(self, module.COMMANDS, self.module)
            return super().parse_known_args(args, namespace)
        self.set_defaults(module=module, command=self.prog.removeprefix("chatflow "))
        self.epilog = _BEAM if module.PASSES_FLAGS_ON else None
        module.add_arguments(self)
        self.add_switch("debug", help="log everything, show tracebacks")
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False  # argparse would report missing flags before unknown ones
        arguments = list(sys.argv[1:] if args is None else args)
        parsed, rest = super().parse_known_args(arguments, namespace)
        if rest:
            self._check(rest, arguments, module.PASSES_FLAGS_ON)
        for action in required:
            if getattr(parsed, action.dest) is None:
                raise UsageError(
                    f"{_name_of(action)} is missing: {action.help or f'see {self.prog} --help'}"
                )
        return parsed, rest

    def _check(self, rest: Sequence[str], arguments: Sequence[str], passes_on: bool) -> None:
        """Raises `UsageError` for the first flag or argument that is unknown here and to Beam.

        Flags come first.
        """
        known, else_see = self.flags(), f"see {self.prog} --help"
        if passes_on:
            from chatflow.running.runner import not_beams

            rest, of_beam = not_beams(rest)
            known, else_see = [*known, *of_beam], "it is neither chatflow's nor Beam's"
        for argument in rest:
            if argument.startswith("-"):
                raise UsageError(unknown(argument, known, else_see))
        if rest:
            raise UsageError(self._unexpected(rest[0], arguments))

    def _unexpected(self, argument: str, arguments: Sequence[str]) -> str:
        """Returns the message for an unexpected argument, e.g. a pattern without quotes."""
        before = arguments[: arguments.index(argument)]
        flag = next((text for text in before[-2:] if text.startswith("--")), "").split("=")[0]
        positional = [_name_of(action) for action in self._actions if not action.option_strings]
        name = flag or "".join(positional[-1:])
        ending = os.path.splitext(argument)[1]
        said = f"unexpected argument {argument!r}"
        is_file = ending or os.path.exists(argument)
        if is_file and not name and "--input" in self.flags():
            return f"{said}; did you mean --input '{argument}'?"
        if not is_file or name not in _PATTERNS:
            takes = f"{name} takes one value; " if name else ""
            return f"{said}; {takes}see {self.prog} --help"
        pattern = os.path.join(os.path.dirname(argument), f"*{ending}")
        quoted = f"'{pattern}'" if name == "FILE" else f"{name} '{pattern}'"
        return f"{said}: the shell expanded a pattern; put it into quotes: {quoted}"


_PATTERNS = ("--input", "--chats", "FILE")
"""Arguments that can be a pattern of many files."""


def _name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _add_commands(parser: Parser, commands: Mapping[str, str], package: str) -> None:
    parser.commands = tuple(commands)
    found = parser.add_subparsers(metavar="COMMAND", parser_class=CommandParser)
    parser.set_defaults(module=None, print_help=parser.print_help)
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
