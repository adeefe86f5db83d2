"""`chatflow estimate`: asks a model about some chats, and estimates the cost of all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence

from chatflow.errors import UsageError
from chatflow.options import Parser, add_flags, number

DESCRIPTION = """
Analyses some chats of the input, drawn at random, and estimates the cost and time of all of
them, with 95 % intervals. The sample's answers are paid for; with --answers they are kept, and
the run that follows does not ask for them again.

  chatflow estimate --input 'chats/*.jsonl' --inference=remote --model=gemini-2.5-flash
"""

PASSES_FLAGS_ON = True

LEFT_OUT = ("output", "analyses", "drafts", "dead_letters", "database", "skip_done", "show")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--sample",
        type=number(int),
        default=50,
        help="how many chats to ask about (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: %(default)s)")
    add_flags(parser, leave_out=LEFT_OUT)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints a table or one line of JSON; returns the exit code.

    Raises:
      UsageError: a wrong flag or file, or the input has no whole chats.
    """
    from chatflow.evaluation.estimate import drawn, estimate, keep, show
    from chatflow.options import from_flags
    from chatflow.pipeline import plan
    from chatflow.running.launch import execute
    from chatflow.running.runner import beam_options, cloud_of
    from chatflow.sources.chats import customs_by
    from chatflow.sources.lines import READ_WHOLE

    options = from_flags(parsed)
    answers = options.answers
    sample, chats = drawn(options.input, parsed.sample, parsed.seed, customs_by(options))
    with tempfile.TemporaryDirectory(prefix="chatflow-estimate-") as scratch:
        with open(f"{scratch}/sample.jsonl", "wb") as file:
            file.writelines(line + b"\n" for line in sample)
        options = dataclasses.replace(
            options,
            input=f"{scratch}/sample.jsonl",
            output=f"{scratch}/out",
            answers=f"sqlite:///{scratch}/answers.db",
            # The chats of the sample are now in chatflow's own format.
            input_format="auto" if options.input_format in READ_WHOLE else options.input_format,
        )
        planned = plan(options, cloud_of(beam_options(rest, shown=options.flags()), options))
        summary = execute(options, rest)
        if not summary.get("analysed"):
            raise UsageError("no chat of the sample was analysed; `chatflow run` says why")
        found = estimate(options, planned.prices, summary.seconds, len(sample), chats)
        if answers:
            keep(options, answers)
    if parsed.summary == "json":
        print(json.dumps(found))
    else:
        show(found)
    return 0
