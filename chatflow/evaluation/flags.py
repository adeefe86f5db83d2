"""The flags of `chatflow evaluate`; apart, so that `chatflow --help` need not import the rest."""

from __future__ import annotations

import argparse

from chatflow.options import add_flags

LEFT_OUT = (
    "input", "show", "analyses", "drafts", "dead_letters", "database", "database_password",
    "webhook_secret",
)  # fmt: skip
"""Flags of `chatflow run` that an evaluation has no use for: it reads its own results."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labelled", metavar="LABELLED.jsonl", help="chats with labels")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="FLAGS",
        help="run again with these flags in place of the given ones, e.g. 'prompts=my-prompts "
        "model=gemma3_1b', and compare; repeatable. vader: compare with VADER's list of words",
    )
    parser.add_argument(
        "--report", default="", metavar="FILE.html", help="write everything as a page, too"
    )
    parser.add_argument(
        "--history",
        default="",
        metavar="FILE.jsonl",
        help="add a line of figures to this file; exit code 1 when the accuracy fell since its "
        "newest line of the same chats",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.03,
        help="by how much it may fall (default: %(default)s)",
    )
    parser.add_argument(
        "--fit_bias",
        action="store_true",
        help="also fit tone_bias and tone_temperature, to put into the prompt template",
    )
    add_flags(parser, leave_out=LEFT_OUT)
