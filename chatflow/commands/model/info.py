"""`chatflow model info`: what it takes to write a model's state dict, to load it, and to run it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatflow.commands.model.fetch import _add_common
from chatflow.commands.size import (
    ANSWER_TOKENS,
    CACHE_ROOM,
    PROCESS_GB,
    WIDTHS,
    first_that_fits,
    read_machines,
)
from chatflow.errors import UsageError
from chatflow.weights.architectures import (
    GEMMAS,
    T5S,
    Architecture,
    EncoderDecoder,
    architecture_of,
)
from chatflow.weights.checkpoints import RUN_BYTES, contents
from chatflow.weights.presets import TORCH
from chatflow.weights.state_dict import CHUNK, DTYPES, SUFFIXES

LEAST_DISK_GB = 100
"""Of a machine of Vertex AI's, which is also its default."""

MODELS = (*(f"google/{name}" for name in T5S if name.startswith("flan-")), *GEMMAS)

SAVE_PROCESS_GB = 0.7
"""Python, Beam, PyTorch and transformers. Measured: 0.5."""

SYSTEM_DISK_GB = 20
"""The container's image, and what it unpacks to."""

BATCH, PROMPT_TOKENS = 8, 512
"""What is counted on where a model runs. T5 was trained on 512 tokens."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a model needs, in GB of 10^9 bytes.

    Attributes:
      file_gb: the state dict.
      save_gb: memory at the peak of `chatflow model save-state-dict`.
      save_disk_gb: for the model's own files, which may be of float32, and the state dict.
      load_gb: memory to load it: the weights, once. Of a T5 in float16, transformers keeps a part
        in float32. Measured: 235 MB for 242 of float32, 155 for 121 of float16.
      run_gb: memory for `BATCH` requests of `PROMPT_TOKENS` at a time.
      run_machine: the smallest that holds that.
    """

    model: str
    parameters: int
    dtype: str
    file_gb: float
    save_gb: float
    save_machine: str
    save_disk_gb: int
    load_gb: float
    run_gb: float
    run_machine: str


class _Counted(NamedTuple):
    """A state dict of which only the numbers are known."""

    parameters: int
    embedding: int
    wide: int = 0

    def rows(self, batch: int, tokens: int) -> int:
        return batch

    def kv_bytes(self, tokens: int, width: int) -> int:
        return 0

    def score_bytes(self, tokens: int, width: int) -> int:
        return 0


def needs_of(name: str, dtype: str = DTYPES[0]) -> Needs:
    """Computes what a model needs.

    Args:
      name: of the hub, a folder, gs://…, a Gemma's name, or a local file with a state dict, which
        does not tell how large caches are.
      dtype: of the state dict.

    Raises:
      UsageError: its size is not known, or no machine of `machines.toml` holds it.
    """
    shape = _shape(name)
    table, width = read_machines(), WIDTHS[dtype]
    weights = shape.parameters * width / 1e9
    # Of the largest tensor, mapped; of a part of it, the converted one and masks.
    tensors = max(RUN_BYTES, 4 * shape.embedding) + (width + 4) * CHUNK
    save = SAVE_PROCESS_GB + tensors / 1e9
    cache = CACHE_ROOM * shape.kv_bytes(PROMPT_TOKENS + ANSWER_TOKENS, width)
    row = cache + shape.score_bytes(PROMPT_TOKENS, width)
    rows = shape.rows(BATCH, PROMPT_TOKENS) * row / 1e9
    load = weights + (2 * shape.wide / 1e9 if dtype == "float16" else 0) + PROCESS_GB
    run = load + rows
    disk = 10 * math.ceil((4 * shape.parameters / 1e9 + weights + SYSTEM_DISK_GB) / 10)
    saver = first_that_fits(table["save_machine"], "", save, "machine_type", name)
    runner = first_that_fits(table["machine"], "", run, "machine_type", name)
    return Needs(
        name, shape.parameters, dtype, weights, save, saver["name"], max(LEAST_DISK_GB, disk),
        load, run, runner["name"],
    )  # fmt: skip


def _shape(name: str) -> Architecture | EncoderDecoder | _Counted:
    if name.endswith(SUFFIXES):
        return _counted(Path(name))
    try:
        return architecture_of(f"{TORCH}{name}")
    except UsageError as error:
        said = str(error).replace("--model=", "NAME=").replace(TORCH, "")
        raise UsageError(said) from None


def _counted(path: Path) -> _Counted:
    if not path.is_file():
        raise UsageError(f"NAME={path}: there is no such file here")
    counts = {entry.same_as: entry.numbers for entry in contents([path]).values()}
    return _Counted(sum(counts.values()), max(counts.values(), default=0))


def act(parsed: argparse.Namespace) -> int:
    """The command."""
    found = [needs_of(name, parsed.dtype) for name in ([parsed.name] if parsed.name else MODELS)]
    if parsed.summary == "json":
        for needs in found:
            print(json.dumps(dataclasses.asdict(needs)))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, head, rows in tables(found):
        shown = Table(title=title)
        for name in head:
            shown.add_column(name, justify="left" if name in ("model", "machine") else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    return 0


def tables(found: Sequence[Needs]) -> Iterable[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Two tables as title, head and rows: to write the state dict, and to run it."""
    dtype = found[0].dtype if found else ""
    yield (
        f"writing the state dict, {dtype}",
        ("model", "parameters", "file", "memory", "machine", "disk"),
        [
            (
                needs.model, f"{needs.parameters / 1e6:,.0f} M", _gb(needs.file_gb),
                _gb(needs.save_gb), needs.save_machine, f"{needs.save_disk_gb} GB",
            )
            for needs in found
        ],
    )  # fmt: skip
    yield (
        f"running it, {BATCH} requests of {PROMPT_TOKENS} tokens at a time",
        ("model", "memory to load", "memory to run", "machine"),
        [
            (needs.model, _gb(needs.load_gb), _gb(needs.run_gb), needs.run_machine)
            for needs in found
        ],
    )


def _gb(size: float) -> str:
    return f"{size:.1f} GB" if size >= 0.95 else f"{1000 * size:.0f} MB"


def add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="parameters, memory and machines of a model",
        description="Computes what it takes to write a model's state dict, to load it and to run "
        "it, and the smallest machines for that; without NAME, for Flan-T5, Flan-UL2 and Gemma. "
        "chatflow size says more of what runs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", default="",
        help="a model on the hub (google/flan-t5-xl), a folder, gs://…, a Gemma, or a state dict",
    )  # fmt: skip
    _add_common(parser)
    parser.set_defaults(act=act)
