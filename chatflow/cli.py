"""The command line: `chatflow run`, `stream`, `evaluate`, `tune` and the others."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Sequence

from chatflow.errors import FAILED, INTERRUPTED, USAGE, UsageError
from chatflow.options import Parser, add_flags

_BEAM = """
Every other flag is Beam's and goes to the runner, e.g.
  --runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp
Without --runner the pipeline runs in this process. With one, --no_wait_until_finish
starts the job and ends.

Exit codes: 0 done (also with dead letters: they are counted and can be replayed),
1 the pipeline failed, 2 a wrong flag or file, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    try:
        parsed, rest = _parser().parse_known_args(arguments)
        if rest and rest[0] and not rest[0].startswith("-"):
            raise UsageError(
                f"unexpected argument {rest[0]!r}; see chatflow {parsed.command} --help"
            )
        logging.basicConfig(
            level=logging.DEBUG if parsed.debug else logging.INFO,
            format="%(levelname)s %(name)s: %(message)s",
        )
        code: int = parsed.run(parsed, rest)
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="chatflow",
        description="Reads support chats, asks a language model how each customer feels and what "
        "the chat is about, and drafts apologies to angry customers for staff to review.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    from chatflow import __version__

    parser.add_argument("--version", action="version", version=f"chatflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, help: str, description: str, epilog: str | None = _BEAM
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=help,
            description=textwrap.dedent(description).strip(),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
        return made

    run = command(
        "run",
        "analyse chats of files or of Pub/Sub",
        """
        Analyses chats: one JSON object a line in, analyses, drafts and dead letters out.

          chatflow run --input 'chats/*.jsonl' --output results
          chatflow run --input projects/P/subscriptions/events --output results

        A chat: {"chat_id": "7", "messages": [{"user_id": "1", "role": "customer", "text": "…"}]}
        A message of one: {"chat_id": "7", "user_id": "1", "role": "customer", "text": "…"}
        Its end: {"chat_id": "7", "event": "closed"}
        """,
    )
    add_flags(run)
    run.set_defaults(run=_run, replay=False)

    stream = command(
        "stream",
        "the whole event-driven system on this machine, with a live view",
        """
        Starts the Pub/Sub emulator (or uses the one at PUBSUB_EMULATOR_HOST), runs the
        pipeline on it, replays chats as live messages, and shows what comes out, also on the
        page of `chatflow console`. Ctrl-C drains the pipeline and stops everything that was
        started.

          chatflow stream --rate 2
        """,
    )
    stream.add_argument(
        "--chats", default="samples/chats.jsonl", help="chats to replay (default: %(default)s)"
    )
    stream.add_argument(
        "--rate", type=float, default=1.0, help="messages a second (default: %(default)s)"
    )
    stream.add_argument(
        "--stop_when_done", action="store_true", help="end when all chats were replayed"
    )
    stream.add_argument(
        "--console", choices=("true", "false"), default="true", help="serve the staff's page, too"
    )
    stream.add_argument(
        "--console_port", type=int, default=8080, help="of that page (default: %(default)s)"
    )
    add_flags(stream, leave_out=("input", "id_label"))
    stream.set_defaults(run=_stream)

    publish = command(
        "publish",
        "send chats or messages of a file to a Pub/Sub topic",
        """
        Publishes each line of a file, or of several (a glob), as a message.

          chatflow publish chats.jsonl --topic projects/P/topics/events --rate 10 --as_messages
        """,
        epilog=None,
    )
    publish.add_argument("file", metavar="FILE", help="JSON Lines: chats, messages, anything")
    publish.add_argument("--topic", required=True, help="projects/PROJECT/topics/NAME")
    publish.add_argument(
        "--rate", type=float, default=0.0, help="messages a second (default: as fast as it goes)"
    )
    publish.add_argument(
        "--as_messages",
        action="store_true",
        help="send each chat as if it happened now: its single messages, then its end",
    )
    publish.add_argument("--summary", choices=("table", "json"), default="table")
    publish.set_defaults(run=_publish)

    tail = command(
        "tail",
        "print results from Pub/Sub as they come",
        """
        Prints the analyses, drafts and dead letters of topics (from now on) or subscriptions.

          chatflow tail projects/P/topics/analyses projects/P/topics/drafts
        """,
        epilog=None,
    )
    tail.add_argument("paths", nargs="+", metavar="PATH", help="topics or subscriptions")
    tail.add_argument("--json", action="store_true", help="print records as lines of JSON")
    tail.add_argument("--count", type=int, default=0, help="end after so many records")
    tail.set_defaults(run=_tail)

    replay = command(
        "replay",
        "try dead letters again",
        """
        Sends dead letters in again: chats that could not be analysed, and analyses that have
        no draft.

          chatflow replay --input 'results/dead_letters*.jsonl' --output results/replayed
        """,
    )
    add_flags(replay)
    replay.set_defaults(run=_run, replay=True)

    evaluate = command(
        "evaluate",
        "measure tone, summaries and drafts on labelled chats",
        """
        Runs the pipeline on labelled chats and compares. A label is the field `sentiment`
        (-1, 0 or 1) of a chat.

          chatflow evaluate labelled.jsonl
          chatflow evaluate labelled.jsonl --compare prompts=my-prompts --report report.html
        """,
    )
    from chatflow.evaluation.flags import add

    add(evaluate)
    evaluate.set_defaults(run=_evaluate)

    tune = command(
        "tune",
        "train an adapter on your own labelled chats",
        """
        Trains LoRA matrices, a small addition to the weights of a Gemma, by which it finds the
        tone of chats like yours; on a GPU where there is one. What was best on a part that it
        did not learn from is kept.

          chatflow tune labelled.jsonl --adapter_output tone.lora.h5
          chatflow run --adapter tone.lora.h5 --input 'chats/*.jsonl' --output results
        """,
        epilog=None,
    )
    tune.add_argument("labelled", metavar="LABELLED.jsonl", help="chats with labels")
    tune.add_argument(
        "--adapter_output", default="tone.lora.h5", help="the file to write (default: %(default)s)"
    )
    tune.add_argument(
        "--validation", default="", help="labelled chats to check it by; default: a part of them"
    )
    tune.add_argument("--validation_share", type=share, default=0.1, help="(default: 0.1)")
    tune.add_argument(
        "--apart_from",
        default="",
        help="labelled chats for a later evaluation: what shares text with them is left out",
    )
    for name, kind, default, help in (
        ("epochs", natural, 3, "times that it sees each chat, at most"),
        ("patience", natural, 3, "checks without a lower loss after which it stops"),
        ("learning_rate", positive, 1e-3, "at its highest"),
        ("rank", natural, 4, "of the matrices; that of --adapter, if it begins with one"),
        ("batch", natural, 16, "chats in a step"),
        ("seed", int, 1, "of the division into parts, the order and the first values"),
        ("strength", share, 1.0, "share of what was learned that is kept; less for other texts"),
    ):
        tune.add_argument(
            f"--{name}", type=kind, default=default, help=f"{help} (default: {default})"
        )
    add_flags(
        tune,
        only=("model", "model_kind", "prompts", "max_prompt_tokens", "adapter", "dtype", "summary"),
    )
    tune.set_defaults(run=_tune)

    console = command(
        "console",
        "the web page on which support staff review drafts",
        """
        Serves a page on a database that pipelines write to (chatflow run --database=…): drafts
        that wait for review, the angriest and oldest first; what is approved is published.

          chatflow console --database sqlite:///chatflow.db --replies replies.jsonl

        Without --users and --identity_header, only this machine can reach it.
        """,
        epilog=None,
    )
    console.add_argument(
        "--database",
        default="sqlite:///chatflow.db",
        help="sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME (default: %(default)s)",
    )
    console.add_argument(
        "--database_password",
        default="",
        help="where its password is: env:NAME, file:PATH or projects/P/secrets/S/versions/V",
    )
    console.add_argument(
        "--replies",
        default="",
        help="where approved replies go: projects/P/topics/T, or a file of JSON Lines",
    )
    console.add_argument(
        "--undo_seconds",
        type=seconds,
        default=10.0,
        help="how long an approval can be undone, and its reply waits (default: %(default)s)",
    )
    console.add_argument(
        "--keep_days",
        type=days,
        help="delete chats to which nothing has happened for so long, with all that is known of "
        "them; not while a draft of theirs waits (default: never)",
    )
    console.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    console.add_argument(
        "--port", type=int, default=8080, help="0: a free one (default: %(default)s)"
    )
    console.add_argument(
        "--users", default="", metavar="FILE.toml", help="who may sign in, by tokens, and roles"
    )
    console.add_argument(
        "--new_token",
        default="",
        metavar="NAME:ROLE",
        help="print a new token and its entry of --users, and end; roles: observer, agent, lead",
    )
    console.add_argument(
        "--identity_header",
        default="",
        help="header in which a reverse proxy says who has signed in there, e.g. X-Forwarded-User",
    )
    console.add_argument(
        "--trusted_proxies",
        default="127.0.0.0/8,::1/128",
        help="networks from which that is believed (default: %(default)s)",
    )
    console.add_argument(
        "--allowed_hosts",
        default="",
        help="names by which the console is called, besides localhost; *: all. Needs a sign-in.",
    )
    console.add_argument(
        "--redact",
        default="observer",
        help="roles that do not see what chats and drafts say (default: %(default)s)",
    )
    console.add_argument(
        "--export",
        default="",
        metavar="FILE.jsonl",
        help="write what was decided as labelled chats for evaluate and tune, and end",
    )
    console.add_argument(
        "--open_browser", action="store_true", help="show the page in this machine's browser"
    )
    console.add_argument("--while_stdin_is_open", action="store_true", help=argparse.SUPPRESS)
    console.set_defaults(run=_console)

    from chatflow.commands import size as sizing

    size = command(
        "size",
        "which machines a model needs, how many, and what they cost",
        sizing.DESCRIPTION,
        epilog=None,
    )
    sizing.add_arguments(size)
    size.set_defaults(run=_size)

    model = command(
        "model",
        "fetch, convert and measure models",
        """
        Brings models to where workers load them, and says what they need.
        """,
        epilog=None,
    )
    from chatflow.commands.model import add_commands

    add_commands(model)
    model.set_defaults(run=_model)
    return parser


def positive(text: str) -> float:
    """A flag's value that has to be more than nothing."""
    if (number := float(text)) <= 0:
        raise ValueError
    return number


def seconds(text: str) -> float:
    """A flag's value that is a length of time, or nothing."""
    if not 0 <= (number := float(text)) <= 86_400:
        raise ValueError
    return number


def days(text: str) -> float:
    """A flag's value that is a number of days, up to a hundred years of them."""
    if (number := positive(text)) > 36_500:
        raise ValueError
    return number


def share(text: str) -> float:
    """A flag's value that is more than nothing, and at most all."""
    if (number := positive(text)) > 1:
        raise ValueError
    return number


def natural(text: str) -> int:
    """A flag's value that is a whole number of at least one."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.run import run

    return run(parsed, rest)


def _stream(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.stream import stream

    return stream(parsed, rest)


def _publish(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.publish import publish

    return publish(parsed, rest)


def _tail(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.tail import tail

    return tail(parsed, rest)


def _evaluate(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.evaluate import evaluate

    return evaluate(parsed, rest)


def _tune(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.tune import tune

    return tune(parsed, rest)


def _console(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.console import console

    return console(parsed, rest)


def _size(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.commands.size import run

    return run(parsed, rest)


def _model(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise UsageError(f"unknown flag {rest[0]}; see chatflow model {parsed.action} --help")
    code: int = parsed.act(parsed)
    return code
