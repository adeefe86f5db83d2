"""`chatflow model convert`: Gemma from GGUF or Hugging Face's format to a preset of Keras's."""

from __future__ import annotations

import argparse
import time
from typing import Any

CONVERT = """
Makes a folder that keras_hub loads as it is, from a GGUF file (Gemma 1, 2 or 3, any
quantisation) or from weights in Hugging Face's format: a folder, hf://ORG/NAME, gs://….
Then loads it and compares what both say of the next token, unless --check=false.

  chatflow model convert gemma-3-1b-it-Q8_0.gguf gs://BUCKET/models/gemma-3-1b-it
"""


def add(commands: Any) -> None:
    from chatflow.commands.model.fetch import add_arguments

    parser = commands.add_parser(
        "convert",
        help="make a preset of Keras's from GGUF or Hugging Face's format",
        description=CONVERT.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the weights in the file; workers choose theirs (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        choices=("true", "false"),
        default="true",
        help="load it and compare; needs memory for the weights as float32 (default: %(default)s)",
    )
    parser.set_defaults(act=_convert)


def _convert(parsed: argparse.Namespace) -> int:
    """The command."""
    from rich.console import Console

    from chatflow.commands.model.fetch import say, shown
    from chatflow.weights.conversion import convert
    from chatflow.weights.fetching import Progressing
    from chatflow.weights.folders import Folder

    started = time.monotonic()
    folder = Folder(parsed.destination)
    progress = Progressing()
    with shown(progress, folder.url, Console(stderr=True)):
        made = convert(parsed.source, folder, parsed.dtype, parsed.check == "true", progress)
    say(parsed, "converted", made.to_dict(), str(made), started, made.instruct)
    return 0
