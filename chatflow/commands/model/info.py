"""`chatflow model info`: computes what it takes to write a state dict, load and run a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from chatflow.commands.model.fetch import add_output_flags
from chatflow.commands.size import (
    PROCESS_GB,
    WIDTHS,
    first_that_fits,
    read_machines,
    room_of,
    show_table,
)
from chatflow.errors import UsageError
from chatflow.options import Parser
from chatflow.weights.architectures import DECODERS, T5S, architecture_of
from chatflow.weights.checkpoints import RUN_BYTES, contents
from chatflow.weights.presets import TORCH
from chatflow.weights.state_dict import CHUNK, DTYPES, SUFFIXES

DESCRIPTION = """
Computes what it takes to write a model's state dict, to load it and to run it, and the smallest
machines for that; without NAME, for Flan-T5, Flan-UL2 and Gemma. chatflow size says more about
running it.
"""

PASSES_FLAGS_ON = False

LEAST_DISK_GB = 100
"""Smallest disk of a Vertex AI machine; also the default there."""

MODELS = (
    *(f"google/{name}" for name in T5S if name.startswith("flan-")),
    *(n for n, d in DECODERS.items() if not d.total),
)

SAVE_PROCESS_GB = 0.7
"""Memory of Python, Beam, PyTorch and transformers. Measured: 0.5."""

SYSTEM_DISK_GB = 20
"""Disk for the container image and what it unpacks to."""

BATCH, PROMPT_TOKENS = 8, 512
"""Requests and their tokens that memory to run is computed for. T5 was trained on 512 tokens."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a model needs, in GB of 10^9 bytes.

    Attributes:
      file_gb, save_gb: size of the state dict, and peak memory of `save-state-dict`.
      save_disk_gb: disk for the model's own files, which may be float32, and the state dict.
      load_gb: memory to load it: the weights, once.
      run_gb, run_machine: memory for `BATCH` requests of `PROMPT_TOKENS`, and smallest machine.
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


def needs_of(name: str, dtype: str = DTYPES[0]) -> Needs:
    """Returns what a model needs.

    Args:
      name: on the hub, a folder, gs://…, a decoder, or a local state dict (caches not counted).

    Raises:
      UsageError: the model's size is not known, or no machine in `machines.toml` is large enough.
    """
    table, width = read_machines(), WIDTHS[dtype]
    if name.endswith(SUFFIXES):
        parameters, largest = _counted(Path(name))
        weights = parameters * width / 1e9
        memory = weights + PROCESS_GB
    else:
        try:
            shape = architecture_of(f"{TORCH}{name}")
        except UsageError as error:
            said = str(error).replace("--model=", "NAME=").replace(TORCH, "")
            raise UsageError(said) from None
        parameters, largest = shape.parameters, shape.embedding
        weights, _, memory = room_of(shape, dtype, width, BATCH, PROMPT_TOKENS)
    file = parameters * width / 1e9
    # The largest tensor, mapped; of one chunk of it, the converted numbers and masks.
    save = SAVE_PROCESS_GB + (max(RUN_BYTES, 4 * largest) + (width + 4) * CHUNK) / 1e9
    disk = 10 * math.ceil((4 * parameters / 1e9 + file + SYSTEM_DISK_GB) / 10)
    saver = first_that_fits(table["save_machine"], "", save, "machine_type", name)
    runner = first_that_fits(table["machine"], "", memory, "machine_type", name)
    return Needs(
        name, parameters, dtype, file, save, saver["name"], max(LEAST_DISK_GB, disk),
        weights + PROCESS_GB, memory, runner["name"],
    )  # fmt: skip


def _counted(path: Path) -> tuple[int, int]:
    """Returns how many numbers a state dict and its largest tensor have."""
    if not path.is_file():
        raise UsageError(f"NAME={path}: there is no such file here")
    counts = {entry.same_as: entry.numbers for entry in contents([path]).values()}
    return sum(counts.values()), max(counts.values(), default=0)


def tables(found: Sequence[Needs]) -> Iterator[tuple[str, list[Mapping[str, str]]]]:
    """Yields two tables as (title, rows): writing the state dict, and running the model."""
    yield (
        f"writing the state dict, {found[0].dtype}",
        [
            {
                "model": needs.model,
                "parameters": f"{needs.parameters / 1e6:,.0f} M",
                "file": _gb(needs.file_gb),
                "memory": _gb(needs.save_gb),
                "machine": needs.save_machine,
                "disk": f"{needs.save_disk_gb} GB",
            }
            for needs in found
        ],
    )
    yield (
        f"running it, {BATCH} requests of {PROMPT_TOKENS} tokens at a time",
        [
            {
                "model": needs.model,
                "memory to load": _gb(needs.load_gb),
                "memory to run": _gb(needs.run_gb),
                "machine": needs.run_machine,
            }
            for needs in found
        ],
    )


def _gb(size: float) -> str:
    return f"{size:.1f} GB" if size >= 0.95 else f"{1000 * size:.0f} MB"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", default="",
        help="a model on the hub (google/flan-t5-xl), a folder, gs://…, a decoder, or a state dict",
    )  # fmt: skip
    add_output_flags(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints what one model needs, or each of `MODELS`; returns the exit code."""
    found = [needs_of(name, parsed.dtype) for name in ([parsed.name] if parsed.name else MODELS)]
    if parsed.summary == "json":
        for needs in found:
            print(json.dumps(dataclasses.asdict(needs)))
        return 0
    for title, rows in tables(found):
        show_table(title, rows)
    return 0
