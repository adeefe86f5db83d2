"""`chatflow size`: computes a model's size, which machines hold it, how many, and their cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError, one_line
from chatflow.options import Parser, add_flags, number
from chatflow.weights import embedded
from chatflow.weights.architectures import DECODERS, Architecture, EncoderDecoder, architecture_of

DESCRIPTION = """
Computes the memory that a model needs on a worker, the smallest machine that has it, the
number of machines for --chats_per_hour, and their cost on Dataflow. Without --model, prints
a table of all models. --summary=flags prints the flags of `chatflow run` for it.

  chatflow size --model gemma3_instruct_4b_text --accelerator nvidia-l4 \\
    --chats_per_hour 20000
"""

PASSES_FLAGS_ON = False

MACHINES = Path(__file__).parent / "machines.toml"

ANSWER_TOKENS = 192
"""Tokens of an answer that a row's cache has room for, after the prompt."""

PROCESS_GB = 1.2
"""Memory of Python, Beam, JAX, the tokenizer and compiled code, besides weights and caches."""

CACHE_ROOM = 1.5
"""Room for a batch's caches, in multiples of their size: some exist twice while prompts are read.
Measured: 32 prompts of 1,470 tokens with Gemma 3 270M peaked at 5.2 GB; this predicts 5.3."""

USABLE = 0.9
"""Share of a machine's or accelerator's memory that the system leaves free."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per number."""

WORK = (230, 40)
"""Tokens read and written per chat in estimates: both prompts, without the part that all chats
share (bench/growth.py: 271 for a chat of ten messages)."""

GPU_EFFICIENCY = 0.3
"""Share of an accelerator's peak that estimates assume. A guess: not measured."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What a model needs on a worker. GB are 10^9 bytes.

    Attributes:
      kv_mb: cache of one chat with the longest prompt.
      memory_gb: needed of the machine, or of the accelerator if there is one.
      chats_per_second, measured: rate of one machine; `given`, `measured` or `estimated`.
    """

    model: str
    parameters: int
    weights_gb: float
    kv_mb: float
    memory_gb: float
    machine_type: str
    accelerator: str
    chats_per_second: float
    measured: str
    machine_dollars_per_hour: float

    def fleet(self, chats_per_hour: float, utilisation: float) -> dict[str, Any]:
        """Returns the number of workers and what they cost."""
        workers = math.ceil(chats_per_hour / (self.chats_per_second * 3600 * utilisation))
        hour = workers * self.machine_dollars_per_hour
        return {
            "workers": workers,
            "dollars_per_hour": round(hour, 2),
            "dollars_per_1000_chats": round(hour / chats_per_hour * 1000, 4),
        }

    def row(self, workers: int, dollars_per_hour: float, dollars_per_1000_chats: float) -> Any:
        """Returns the row of the table by column title."""
        on = f" with {self.accelerator}" if self.accelerator else ""
        return {
            "model": self.model,
            "parameters": f"{self.parameters / 1e6:,.0f} M",
            "weights": f"{self.weights_gb:.1f} GB",
            "KV cache of a chat": f"{self.kv_mb:,.0f} MB",
            "memory": f"{self.memory_gb:.1f} GB",
            "machine": self.machine_type + on,
            "chats/s": f"{self.chats_per_second:.2f} {self.measured}",
            "workers": str(workers),
            "$/hour": f"{dollars_per_hour:.2f}",
            "$/1,000 chats": f"{dollars_per_1000_chats:.2f}",
        }

    def flags(self) -> list[str]:
        """Returns flags of `chatflow run` for Dataflow: machines, resource hints and threads.

        The model batches the requests of all threads, which share one process to save memory.
        """
        hint = f"{math.ceil(self.memory_gb)}GB"
        if self.accelerator:
            fitting = f"type:{self.accelerator};count:1;machine_type:{self.machine_type}"
            own = [f"--accelerator={fitting};install-nvidia-driver", "--machine_type=n2-standard-2"]
        else:
            own = [f"--machine_type={self.machine_type}", f"--min_ram={hint}"]
        return [
            *own,
            "--number_of_worker_harness_threads=32",
            "--sdk_worker_parallelism=1",
            "--experiments=no_use_multiple_sdk_containers",
        ]


REMOTE_FLAGS = ["--machine_type=n2-standard-2"]
"""For a remote model: workers only wait for it."""


def read_machines(path: str = "") -> dict[str, Any]:
    """Returns a table like `machines.toml`; raises `UsageError` if unreadable or incomplete."""
    from apache_beam.io.filesystems import FileSystems

    where = path or str(MACHINES)
    try:
        with FileSystems.open(where) as file:
            table = tomllib.loads(file.read().decode())
        _ = table["dataflow"]["vcpu_hour"] + table["dataflow"]["gb_hour"]
        for machine in table["machine"]:
            _ = machine["name"], machine["vcpus"] + machine["memory_gb"]
        for gpu in table["accelerator"]:
            _ = gpu["name"], gpu["machine"], gpu["hour"] + gpu["vcpus"] + gpu["machine_gb"]
            _ = gpu["memory_gb"] + gpu["tflops"] + gpu["gb_second"]
        for measured in table["measured"]:
            _ = measured["model"], measured["vcpus"] * measured["chats_per_second"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--prices={where}: {type(error).__name__}: {one_line(error)}") from None
    return table


def size_of(
    model: str,
    table: Mapping[str, Any],
    accelerator: str = "",
    machine_type: str = "",
    dtype: str = "auto",
    batch: int = 32,
    prompt_tokens: int = 1536,
    chats_per_second: float = 0.0,
) -> Size:
    """Returns what a model needs, and the smallest machine in the table that has it.

    Args:
      accelerator: a name in the table, `any` for the smallest that fits, or empty for none.
      chats_per_second: as measured on such a machine; 0: from the table, or estimated.

    Raises:
      UsageError: nothing in the table is large enough, or a name is not in it.
    """
    shape = architecture_of(model)
    usual = 2 if accelerator else 4
    width = WIDTHS.get(dtype, usual)
    weights, kv, needed = room_of(shape, dtype, width, batch, prompt_tokens)
    if accelerator:
        gpu = first_that_fits(table["accelerator"], accelerator, needed, "accelerator", model)
        machine, vcpus, memory = gpu["machine"], gpu["vcpus"], gpu["machine_gb"]
        estimate = 1 / _gpu_seconds(shape, gpu, weights, kv, batch)
    else:
        found = first_that_fits(table["machine"], machine_type, needed, "machine_type", model)
        gpu, machine = None, found["name"]
        vcpus, memory = found["vcpus"], found["memory_gb"]
        estimate = _cpu_rate(shape, vcpus, table["measured"])
    known = [
        entry["chats_per_second"]
        for entry in table["measured"]
        if width == usual
        and architecture_of(entry["model"]) == shape
        and (entry["vcpus"], entry.get("accelerator", "")) == (vcpus, gpu["name"] if gpu else "")
    ]
    rate, origin = (
        (chats_per_second, "given") if chats_per_second
        else (known[0], "measured") if known
        else (estimate, "estimated")
    )  # fmt: skip
    prices = table["dataflow"]
    dollars = vcpus * prices["vcpu_hour"] + memory * prices["gb_hour"] + (gpu or {}).get("hour", 0)
    return Size(
        model, shape.parameters, weights, kv * 1e3, needed, machine, gpu["name"] if gpu else "",
        rate, origin, dollars,
    )  # fmt: skip


def room_of(
    shape: Architecture | EncoderDecoder, dtype: str, width: int, batch: int, prompt_tokens: int
) -> tuple[float, float, float]:
    """Returns GB of weights, a chat's cache and all on a worker; `width` is bytes per number."""
    # transformers keeps part of a float16 T5 in float32. Measured: 235 MB to load for 242 of
    # float32, 155 for 121 of float16.
    weights = (shape.parameters * width + (2 * shape.wide if dtype == "float16" else 0)) / 1e9
    kv = shape.kv_bytes(prompt_tokens + ANSWER_TOKENS, width) / 1e9
    row = CACHE_ROOM * kv + shape.score_bytes(prompt_tokens, width) / 1e9
    return weights, kv, weights + shape.rows(batch, prompt_tokens) * row + PROCESS_GB


def first_that_fits(
    choices: Sequence[Mapping[str, Any]], name: str, needed: float, flag: str, model: str
) -> Mapping[str, Any]:
    """Returns the first choice named `name` (or any) with `needed` GB, or raises `UsageError`."""
    named = [choice for choice in choices if name in ("", "any", choice["name"])]
    if not named:
        known = ", ".join(choice["name"] for choice in choices)
        raise UsageError(f"--{flag}={name}: not in the table; known are {known} (--prices)")
    usable = {choice["name"]: choice["memory_gb"] * USABLE for choice in named}
    fitting = [choice for choice in named if usable[choice["name"]] >= needed]
    if not fitting:
        raise UsageError(
            f"--model={model}: needs {needed:.0f} GB; of the largest --{flag}, "
            f"{max(usable.values()):.0f} GB can be used. A smaller --max_batch_size or "
            "--max_prompt_tokens needs less"
        )
    return fitting[0]


def _cpu_rate(
    shape: Architecture | EncoderDecoder, vcpus: int, measured: Sequence[Mapping[str, Any]]
) -> float:
    """Returns chats per second, scaled from a measured rate by operations and by vCPUs."""
    base = next((entry for entry in measured if not entry.get("accelerator")), None)
    if base is None:
        raise UsageError("--prices: the table has no [[measured]] of a machine without accelerator")
    ratio = architecture_of(base["model"]).operations(*WORK) / shape.operations(*WORK)
    return float(base["chats_per_second"] * ratio * vcpus / base["vcpus"])


def _gpu_seconds(
    shape: Architecture | EncoderDecoder,
    gpu: Mapping[str, Any],
    weights: float,
    kv: float,
    batch: int,
) -> float:
    """Returns a chat's seconds: arithmetic, and reading weights and cache per token written."""
    arithmetic = shape.operations(*WORK) / (gpu["tflops"] * 1e12 * GPU_EFFICIENCY)
    reading = WORK[1] * (weights / batch + kv) / (gpu["gb_second"] * GPU_EFFICIENCY)
    return float(arithmetic + reading)


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model", default="", help="as for `chatflow run`, on the worker; or torch:NAME, a T5"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *WIDTHS),
        default="auto",
        help="precision of the weights; auto: bfloat16 on an accelerator, else float32",
    )
    parser.add_argument(
        "--chats_per_hour", type=number(), default=1000.0, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--accelerator", default="", help="a GPU, e.g. nvidia-l4; any: the smallest that fits"
    )
    parser.add_argument("--machine_type", default="", help="default: the smallest that fits")
    parser.add_argument(
        "--chats_per_second",
        type=number(),
        default=0.0,
        help="rate of one machine, from the summary of a run; default: measured or estimated",
    )
    parser.add_argument(
        "--utilisation", type=number(), default=0.7, help="how busy workers may be (default: 0.7)"
    )
    parser.add_argument(
        "--prices",
        default="",
        help="TOML file with machines, prices and what was measured; default: "
        "chatflow/commands/machines.toml",
    )
    parser.add_argument("--summary", choices=("table", "json", "flags"), default="table")
    add_flags(parser, only=("inference", "max_batch_size", "max_prompt_tokens"))


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints the size of `--model`, or of all Gemmas without it; returns the exit code."""
    if parsed.inference == "remote":
        if parsed.summary == "flags":
            print(" ".join(REMOTE_FLAGS))
            return 0
        raise UsageError("--inference=remote: the model needs no memory on the workers")
    table = read_machines(parsed.prices)

    def sized(model: str) -> Size:
        return size_of(
            model, table, parsed.accelerator, parsed.machine_type, parsed.dtype,
            parsed.max_batch_size, parsed.max_prompt_tokens, parsed.chats_per_second,
        )  # fmt: skip

    if parsed.summary == "flags":
        print(" ".join(sized(parsed.model or embedded.NAME).flags()))
        return 0
    rows, notes = [], []
    for model in [parsed.model] if parsed.model else DECODERS:
        try:
            found = sized(model)
        except UsageError as error:
            if parsed.model:
                raise
            notes.append(str(error))
            continue
        rows.append((found, found.fleet(parsed.chats_per_hour, parsed.utilisation)))
    if parsed.summary == "json":
        for found, fleet in rows:
            print(json.dumps({**dataclasses.asdict(found), **fleet}))
        return 0
    if any(found.measured == "estimated" for found, _ in rows):
        notes.append(
            "estimated: scaled from measured rates; run a thousand of your chats, and give the "
            "summary's chats_per_second"
        )
    title = f"{parsed.chats_per_hour:,.0f} chats an hour, workers {parsed.utilisation:.0%} busy"
    show_table(title, [found.row(**fleet) for found, fleet in rows], notes)
    return 0


def show_table(title: str, rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> None:
    """Prints rows as a table with the first row's keys as columns, and the notes below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name in ("model", "machine") else "right")
    for row in rows:
        table.add_row(*row.values())
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
