"""`chatflow model convert`: converts Gemma from GGUF or Hugging Face to a Keras preset."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from chatflow.commands.model import fetch
from chatflow.options import Parser

DESCRIPTION = """
Makes a folder that keras_hub can load, from a GGUF file (Gemma 1, 2 or 3, any quantisation)
or from weights in Hugging Face's format: a folder, hf://ORG/NAME, gs://….
Then loads it and compares how both predict the next token, unless --check=false.

  chatflow model convert gemma-3-1b-it-Q8_0.gguf gs://BUCKET/models/gemma-3-1b-it
"""

PASSES_FLAGS_ON = False


def add_arguments(parser: Parser) -> None:
    fetch.add_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the weights in the file; workers choose theirs (default: %(default)s)",
    )
    parser.add_switch(
        "check",
        True,
        "load it and compare; needs memory for the weights as float32 (default: true)",
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Converts a model; returns the exit code."""
    from rich.console import Console

    from chatflow.weights.conversion import convert
    from chatflow.weights.fetching import Progressing
    from chatflow.weights.folders import Folder

    started = time.monotonic()
    folder = Folder(parsed.destination)
    progress = Progressing()
    with fetch.shown(progress, folder.url, Console(stderr=True)):
        made = convert(parsed.source, folder, parsed.dtype, parsed.check, progress)
    fetch.say(parsed, "converted", made.to_dict(), str(made), started, made.instruct)
    return 0
