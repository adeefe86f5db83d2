"""The command line: `chatflow run | stream | publish | tail | replay | evaluate | size`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from chatflow.errors import UsageError, one_line
from chatflow.options import (
    Options,
    Parser,
    add_flags,
    beam_options,
    cloud_of,
    from_flags,
    is_local,
)

if TYPE_CHECKING:
    from rich.console import Console

    from chatflow.models import ModelSpec
    from chatflow.pipeline import Plan
    from chatflow.report import Summary

USAGE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes

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
        pipeline on it, replays chats as live messages, and shows what comes out. Ctrl-C
        drains the pipeline and stops everything that was started.

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
        "measure the sentiment on labelled chats",
        """
        Runs the pipeline on labelled chats and compares. A label is the field `sentiment`
        (-1, 0 or 1) of a chat.

          chatflow evaluate labelled.jsonl
        """,
    )
    evaluate.add_argument("labelled", metavar="LABELLED.jsonl", help="chats with labels")
    evaluate.add_argument(
        "--fit_bias",
        action="store_true",
        help="also fit the tone_bias of the model, to put into the prompt template",
    )
    add_flags(evaluate, leave_out=("input", "show"))
    evaluate.set_defaults(run=_evaluate)

    size = command(
        "size",
        "which machines a model needs, how many, and what they cost",
        """
        Computes the room that a Gemma needs on a worker, the smallest machine that has it, how
        many of them for so many chats, and what they cost on Dataflow. Without --model, a
        table of all. --summary=flags prints the flags of `chatflow run` for it.

          chatflow size --model gemma3_instruct_4b_text --accelerator nvidia-l4 \\
            --chats_per_hour 20000
        """,
        epilog=None,
    )
    size.add_argument("--model", default="", help="as for `chatflow run`, on the worker")
    size.add_argument("--inference", choices=("on_worker", "remote"), default="on_worker")
    size.add_argument(
        "--chats_per_hour", type=positive, default=1000.0, help="(default: %(default)s)"
    )
    size.add_argument(
        "--accelerator", default="", help="a GPU, e.g. nvidia-l4; any: the smallest that fits"
    )
    size.add_argument("--machine_type", default="", help="default: the smallest that fits")
    size.add_argument(
        "--chats_per_second",
        type=positive,
        default=0.0,
        help="of one machine, as the summary of a run says; default: measured or estimated",
    )
    size.add_argument(
        "--utilisation", type=positive, default=0.7, help="how busy workers may be (default: 0.7)"
    )
    size.add_argument(
        "--prices",
        default="",
        help="TOML file with machines, prices and what was measured; default: "
        "chatflow/machines.toml",
    )
    size.add_argument("--summary", choices=("table", "json", "flags"), default="table")
    add_flags(size, only=("dtype", "max_batch_size", "max_prompt_tokens"))
    size.set_defaults(run=_size)
    return parser


def positive(text: str) -> float:
    """A flag's value that has to be more than nothing."""
    if (number := float(text)) <= 0:
        raise ValueError
    return number


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    options = from_flags(parsed, required=("input",))
    if "--no_wait_until_finish" in rest:
        launch(options, rest, parsed.replay)
    else:
        show(execute(options, rest, replay=parsed.replay), options)
    return 0


def show(summary: Summary, options: Options) -> None:
    """Prints what came out of a run: tables, or one line of JSON."""
    if options.summary == "json":
        print(summary.to_json())
        return
    from rich.console import Console

    from chatflow.report import counts_table, results_table

    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.show and any(map(summary.files, summary.destinations)):
        console.print(results_table(summary, options.show))
    console.print(counts_table(summary))


def _stream(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.stream import stream

    return stream(parsed, rest)


def _publish(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.publish import publish

    return publish(parsed, rest)


def _tail(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.tail import tail

    return tail(parsed, rest)


def _evaluate(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.evaluate import evaluate

    return evaluate(parsed, rest)


def _size(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    from chatflow.sizing import size

    return size(parsed, rest)


def execute(
    options: Options, flags: Sequence[str], replay: bool = False, drafts: bool = True
) -> Summary:
    """Checks everything, runs the pipeline, and waits for it; see `pipeline.Plan`.

    Returns:
      the counts.

    Raises:
      UsageError: before anything runs.
      SystemExit: with code 1, when the pipeline fails.
    """
    from rich.console import Console

    from chatflow import report

    console = Console(stderr=True)
    planned, pipeline = prepare(options, flags, console, replay, drafts)
    started = time.monotonic()
    # Elsewhere, counts are not in this process, and the runner says how it goes on.
    shown = report.progress(console) if is_local(pipeline.options) else contextlib.nullcontext()
    with failures(planned), shown:
        result = pipeline.run()
        finish(result, console)
    return report.Summary.of(result, time.monotonic() - started, planned)


def launch(options: Options, flags: Sequence[str], replay: bool = False) -> None:
    """Starts a pipeline that another runner runs, and prints by what id it is known there.

    Raises:
      as `execute`.
    """
    from rich.console import Console

    planned, pipeline = prepare(options, flags, Console(stderr=True), replay)
    with failures(planned):
        result = pipeline.run()
    # A Flex Template's launcher only writes the job down, so that there is none yet.
    job_id = result.job_id() if getattr(result, "has_job", False) else None
    if options.summary == "json":
        print(json.dumps({"job_id": job_id}))
    elif job_id:
        print(f"started: {job_id}")


@contextlib.contextmanager
def failures(planned: Plan) -> Iterator[None]:
    """Says of a failed pipeline what failed, in a line, and ends with exit code 1."""
    try:
        yield
    except Exception as error:
        if "KeyboardInterrupt" in str(error):  # as Beam's local runner passes it on
            raise KeyboardInterrupt from None
        logging.getLogger(__name__).debug("the pipeline failed", exc_info=error)
        last = str(error).strip().splitlines()[-1:] or [""]
        print(
            f"chatflow: the pipeline failed: {type(error).__name__}: {last[0]} "
            "(--debug shows the whole traceback)",
            file=sys.stderr,
        )
        raise SystemExit(FAILED) from None
    finally:
        planned.model.forget()


def prepare(
    options: Options,
    flags: Sequence[str],
    console: Console,
    replay: bool = False,
    drafts: bool = True,
) -> tuple[Plan, Any]:
    """Checks everything that can be checked before a pipeline runs, and builds it.

    Raises:
      UsageError: a wrong flag, file or setting.
    """
    import apache_beam as beam

    from chatflow.bigquery import check_tables
    from chatflow.pipeline import build, plan
    from chatflow.publishing import check_topics
    from chatflow.sinks import prepare_output
    from chatflow.sources import check_input, check_messages, is_stream

    beam_flags = beam_options(flags, is_stream(options.input), options.flags())
    local = is_local(beam_flags)
    quieten(local)
    if not local:
        check_credentials(beam_flags)
    inputs = check_input(options.input)
    planned = plan(options, cloud_of(beam_flags, options), replay, drafts)
    try:
        pipeline = beam.Pipeline(options=beam_flags)
        build(pipeline, planned)
    except ValueError as error:  # Beam's own check of its flags and of names
        raise UsageError("; ".join(filter(None, str(error).splitlines()))) from None
    destinations = [uri for uris in planned.destinations.values() for uri in uris]
    if local:
        check_messages(options.input)
        check_topics(destinations)
        check_tables(planned.destinations)
        prepare_model(planned, console)
    if planned.spec.is_remote and options.check_endpoint == "true":
        check_model(planned.spec, local, console)
    removed = prepare_output(destinations, inputs, planned.streaming, local)
    if removed:
        console.print(f"replacing {removed} result files of an earlier run")
    return planned, pipeline


def finish(result: Any, console: Console) -> None:
    """Waits for a pipeline; drains a stream at the first Ctrl-C or SIGTERM."""
    if not hasattr(result, "drain"):
        result.wait_until_finish()
        return
    with sigterm_interrupts():
        try:
            result.wait_until_finish()
        except KeyboardInterrupt:
            console.print("draining: what was read is finished; Ctrl-C again stops at once")
            result.drain()
            result.wait_until_finish()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Meanwhile, SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_credentials(options: Any) -> None:
    """Makes sure that a job can be sent to Google Cloud at all.

    Raises:
      UsageError: there are no credentials.
    """
    from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions

    google_cloud = options.view_as(GoogleCloudOptions)
    if options.view_as(StandardOptions).runner != "DataflowRunner" or google_cloud.no_auth:
        return
    import google.auth

    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        raise UsageError(
            "--runner=DataflowRunner: there are no credentials of Google Cloud here; run "
            "`gcloud auth application-default login`"
        ) from None


def quieten(local: bool) -> None:
    """Leaves Beam's logs out: a local run shows its progress, and its failure as one line.

    A run elsewhere logs what its runner says, e.g. where to watch the job, but not the whole
    description of the job.
    """
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    logging.getLogger().setLevel(logging.CRITICAL if local else logging.WARNING)
    logging.getLogger("chatflow").setLevel(logging.WARNING)
    if not local:
        logging.getLogger("apache_beam.runners").setLevel(logging.INFO)
        logging.getLogger("apache_beam.transforms").setLevel(logging.ERROR)
        for handler in logging.getLogger().handlers:
            handler.addFilter(
                lambda record: record.levelno > logging.INFO or len(record.getMessage()) < 220
            )


CHECK_SECONDS = 15.0

_NOT_OURS_TO_ASK = ("credentials", "http_401", "http_403")


def check_model(spec: ModelSpec, local: bool, console: Console) -> None:
    """Asks the service whether a remote model is there.

    Where it cannot be reached, or this machine may not ask it for a job that runs
    elsewhere, only a warning is printed: the workers may well reach it.

    Raises:
      UsageError: the service says that the model is not there, or not for us.
    """
    from chatflow.models.calls import RemoteModel
    from chatflow.models.faults import Kind, classify
    from chatflow.models.remote import client_of

    settings = spec.remote._replace(timeout=min(spec.remote.timeout, CHECK_SECONDS))
    model = RemoteModel(spec.name, client_of(spec.name, settings), settings)
    try:
        console.print(model.check(), highlight=False)
    except UsageError:
        raise
    except Exception as error:
        fault = classify(error)
        said = f"--model={spec.name}: {fault.reason}: {one_line(error)}"
        if fault.kind is Kind.FATAL and (local or fault.reason not in _NOT_OURS_TO_ASK):
            raise UsageError(f"{said} (--check_endpoint=false does not ask)") from None
        console.print(f"warning: not checked: {said}", highlight=False, markup=False)
    finally:
        model.close()


def prepare_model(planned: Plan, console: Console) -> None:
    """Makes the embedded model now, with progress, if it is asked for and not there yet."""
    if not planned.spec.is_embedded:
        return
    from chatflow.models import embedded
    from chatflow.models.presets import local_preset

    try:
        local_preset(
            embedded.NAME,
            lambda text: console.print(f"{embedded.NAME}: {text}", highlight=False),
        )
    except embedded.EmbeddedModelError as error:
        raise UsageError(f"--model={embedded.NAME}: {error}") from None
