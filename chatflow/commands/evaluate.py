"""`chatflow evaluate`: runs the pipeline on labelled chats and measures its results."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatflow.errors import FAILED, UsageError
from chatflow.options import Parser, add_flags, number

DESCRIPTION = """
Runs the pipeline on labelled chats and compares its results with the labels. A label is the
field `sentiment` (-1, 0 or 1) of a chat; in a table, a column of this name in the chat's first
row.

  chatflow evaluate labelled.jsonl
  chatflow evaluate labelled.jsonl --compare prompts=my-prompts --report report.html
"""

PASSES_FLAGS_ON = True

LEFT_OUT = (
    "input", "show", "analyses", "drafts", "dead_letters", "database", "database_password",
    "webhook_secret",
)  # fmt: skip
"""Flags of `chatflow run` that an evaluation does not take: it reads its own results."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("labelled", metavar="LABELLED.jsonl", help="chats with labels")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="FLAGS",
        help="run again with these flags instead of the given ones, e.g. 'prompts=my-prompts "
        "model=gemma3_1b', and compare; repeatable. vader: compare with VADER's list of words",
    )
    parser.add_argument(
        "--report", default="", metavar="FILE.html", help="also write everything as a page"
    )
    parser.add_argument(
        "--history",
        default="",
        metavar="FILE.jsonl",
        help="add a line of figures to this file; exit with code 1 if the accuracy fell since its "
        "newest line of the same chats",
    )
    parser.add_argument(
        "--tolerance",
        type=number(zero=True),
        default=0.03,
        help="how far the accuracy may fall (default: %(default)s)",
    )
    parser.add_switch(
        "fit_bias", help="also fit tone_bias and tone_temperature, to put into the prompt template"
    )
    add_flags(parser, leave_out=LEFT_OUT)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs all variants and prints tables or one line of JSON; returns the exit code.

    It is 1 if the accuracy fell by more than --tolerance since the newest line of --history.

    Raises:
      UsageError: a wrong flag or file, before anything runs; or there is nothing to fit.
      SystemExit: with code 1, if a pipeline fails.
    """
    from rich.console import Console

    from chatflow.evaluation.bias import fitted, prompt_to_fit
    from chatflow.evaluation.figures import figures
    from chatflow.evaluation.history import append, entry, fall, read_history
    from chatflow.evaluation.labels import read_labels
    from chatflow.evaluation.measures import CLASSES
    from chatflow.evaluation.page import write_page
    from chatflow.evaluation.tables import show
    from chatflow.evaluation.variants import answered, variants_of
    from chatflow.options import from_flags
    from chatflow.sources.chats import customs_by

    labels = read_labels(parsed.labelled, customs_by(from_flags(parsed)))
    if parsed.fit_bias and len({label.sentiment for label in labels.values()}) < len(CLASSES):
        raise UsageError(f"--fit_bias: {parsed.labelled!r} must have labels of all three tones")
    if parsed.fit_bias and parsed.inference == "remote":
        raise UsageError("--fit_bias: remote models return no scores, which it needs")
    for name in ("report", "history"):
        if not (path := getattr(parsed, name)):
            continue
        file, folder = Path(path), Path(path).absolute().parent
        if not folder.is_dir():
            raise UsageError(f"--{name}={path}: there is no such folder")
        if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
            raise UsageError(f"--{name}={path}: cannot be written; name another file")
    history = read_history(parsed.history) if parsed.history else []
    with tempfile.TemporaryDirectory(prefix="chatflow-evaluate-") as scratch:
        variants = variants_of(parsed, rest, scratch, LEFT_OUT)
        if parsed.fit_bias:
            prompt_to_fit(variants[0])
        ran = []
        for number, variant in enumerate(variants, 1):
            if len(variants) > 1:
                of = f"{number} of {len(variants)}: {variant.name}"
                Console(stderr=True).print(of, highlight=False, markup=False)
            ran.append(answered(variant, labels, rest))
    report: dict[str, Any] = {
        "labelled": parsed.labelled,
        "chats": len(labels),
        "variants": [figures(each, ran[0] if each is not ran[0] else None) for each in ran],
    }
    if parsed.fit_bias:
        report |= fitted(ran[0])
    falls = []
    if parsed.history:
        lines = [
            entry(number, each, found, parsed.labelled)
            for number, (each, found) in enumerate(zip(ran, report["variants"], strict=True))
        ]
        falls = list(
            filter(None, (fall(history, line, labels, parsed.tolerance) for line in lines))
        )
        append(parsed.history, lines)
        report["history"] = {
            "file": parsed.history,
            "lines": [_without_answers(line) for line in (*history, *lines)[-10:]],
            "falls": falls,
        }
    if parsed.summary == "json":
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report)
    if parsed.report:
        write_page(parsed.report, report, ran)
    for text in falls:
        print(f"chatflow: {text}", file=sys.stderr)
    return FAILED if falls else 0


def _without_answers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "answers"}
