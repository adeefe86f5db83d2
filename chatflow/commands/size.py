"""`chatflow size`: how large a model is, which machines hold it, how many, and what they cost."""

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

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError, one_line
from chatflow.weights import embedded
from chatflow.weights.architectures import GEMMAS, Architecture, EncoderDecoder, architecture_of

MACHINES = Path(__file__).parent / "machines.toml"

ANSWER_TOKENS = 192
"""Room for the answer behind a prompt in a row's cache."""

PROCESS_GB = 1.2
"""Python, Beam, JAX, the tokenizer and compiled code, beside weights and caches."""

CACHE_ROOM = 1.5
"""Room for a batch's caches, in multiples of them: some are there twice while prompts are read.
Measured: 32 prompts of 1,470 tokens with Gemma 3 270M peaked at 5.2 GB; this says 5.3."""

USABLE = 0.9
"""Part of a machine's or accelerator's memory that is not the system's."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

WORK = (230, 40)
"""Tokens of a chat that are read, and written, where work is estimated; of both prompts,
without what all chats share (bench/growth.py: 271 for a chat of ten messages)."""

GPU_EFFICIENCY = 0.3
"""Part of an accelerator's peak that estimates count on. A guess: none was measured."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What a model needs on a worker. GB are 10^9 bytes.

    Attributes:
      kv_mb: of one chat at the longest prompt, in MB.
      memory_gb: of the machine, or of the accelerator where there is one.
      chats_per_second: of one machine.
      measured: where that is from: `given`, `measured` or `estimated`.
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
        """How many workers, and what they cost."""
        workers = math.ceil(chats_per_hour / (self.chats_per_second * 3600 * utilisation))
        hour = workers * self.machine_dollars_per_hour
        return {
            "workers": workers,
            "dollars_per_hour": round(hour, 2),
            "dollars_per_1000_chats": round(hour / chats_per_hour * 1000, 4),
        }

    def flags(self) -> list[str]:
        """Flags of `chatflow run` for Dataflow: machines, hints of the inference steps, threads.

        The threads of a worker wait for the model, which takes what all of them ask as one
        batch. One process has them all, so that memory is not spent on others.
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
"""Where the model is remote, workers only wait for it."""


def read_machines(path: str = "") -> dict[str, Any]:
    """A table like `machines.toml`.

    Raises:
      UsageError: it cannot be read, or lacks what is needed.
    """
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
    """What a model needs, and the smallest machine of the table that has it.

    Args:
      accelerator: a name of the table's, `any` for the smallest that fits, or empty: none.
      chats_per_second: as measured on such a machine; 0: as in the table, or estimated.

    Raises:
      UsageError: nothing in the table has room, or a name that is not in it.
    """
    shape = architecture_of(model)
    usual = 2 if accelerator else 4
    width = WIDTHS.get(dtype, usual)
    weights = (shape.parameters * width + (2 * shape.wide if dtype == "float16" else 0)) / 1e9
    kv = shape.kv_bytes(prompt_tokens + ANSWER_TOKENS, width)
    row = CACHE_ROOM * kv + shape.score_bytes(prompt_tokens, width)
    needed = weights + shape.rows(batch, prompt_tokens) * row / 1e9 + PROCESS_GB
    if accelerator:
        gpu = first_that_fits(table["accelerator"], accelerator, needed, "accelerator", model)
        machine, vcpus, memory = gpu["machine"], gpu["vcpus"], gpu["machine_gb"]
        estimate = 1 / _gpu_seconds(shape, gpu, weights * 1e9, batch * kv, batch)
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
        model, shape.parameters, weights, kv / 1e6, needed, machine, gpu["name"] if gpu else "",
        rate, origin, dollars,
    )  # fmt: skip


def first_that_fits(
    choices: Sequence[Mapping[str, Any]], name: str, needed: float, flag: str, model: str
) -> Mapping[str, Any]:
    """The first machine or accelerator of this name, or of any, that has so many GB.

    Raises:
      UsageError: none has.
    """
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
    """Scaled from what was measured, by operations and by processors."""
    base = next((entry for entry in measured if not entry.get("accelerator")), None)
    if base is None:
        raise UsageError("--prices: the table has no [[measured]] of a machine without accelerator")
    ratio = architecture_of(base["model"]).operations(*WORK) / shape.operations(*WORK)
    return float(base["chats_per_second"] * ratio * vcpus / base["vcpus"])


def _gpu_seconds(
    shape: Architecture | EncoderDecoder,
    gpu: Mapping[str, Any],
    weights: float,
    caches: float,
    batch: int,
) -> float:
    """Of one chat: arithmetic, and reading weights and caches for each token that is written."""
    arithmetic = shape.operations(*WORK) / (gpu["tflops"] * 1e12 * GPU_EFFICIENCY)
    reading = WORK[1] * (weights + caches) / batch / (gpu["gb_second"] * 1e9 * GPU_EFFICIENCY)
    return float(arithmetic + reading)


def size(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    """The command: all Gemmas without `--model`; else one of them, and a fleet of workers."""
    if rest:
        raise UsageError(f"unknown flag {rest[0]}; see chatflow size --help")
    if parsed.inference == "remote":
        if parsed.summary == "flags":
            print(" ".join(REMOTE_FLAGS))
            return 0
        raise UsageError("--inference=remote: the model takes no room on the workers")
    table = read_machines(parsed.prices)

    def sized(model: str) -> Size:
        return size_of(
            model, table, parsed.accelerator, parsed.machine_type, parsed.dtype,
            parsed.max_batch_size, parsed.max_prompt_tokens, parsed.chats_per_second,
        )  # fmt: skip

    if parsed.summary == "flags":
        print(" ".join(sized(parsed.model or embedded.NAME).flags()))
        return 0
    rows, too_large = [], []
    for model in [parsed.model] if parsed.model else GEMMAS:
        try:
            found = sized(model)
        except UsageError as error:
            if parsed.model:
                raise
            too_large.append(str(error))
            continue
        fleet = found.fleet(parsed.chats_per_hour, parsed.utilisation)
        rows.append({**dataclasses.asdict(found), **fleet})
    if parsed.summary == "json":
        for row in rows:
            print(json.dumps(row))
    else:
        _show(rows, too_large, parsed)
    return 0


def _show(
    rows: Sequence[Mapping[str, Any]], notes: Sequence[str], parsed: argparse.Namespace
) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{parsed.chats_per_hour:,.0f} chats an hour, workers {parsed.utilisation:.0%} busy"
    shown = Table(title=title)
    for name in (
        "model", "parameters", "weights", "KV cache of a chat", "memory", "machine",
        "chats/s", "workers", "$/hour", "$/1,000 chats",
    ):  # fmt: skip
        shown.add_column(name, justify="left" if name in ("model", "machine") else "right")
    for row in rows:
        on = f" with {row['accelerator']}" if row["accelerator"] else ""
        shown.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['weights_gb']:.1f} GB",
            f"{row['kv_mb']:,.0f} MB",
            f"{row['memory_gb']:.1f} GB",
            row["machine_type"] + on,
            f"{row['chats_per_second']:.2f} {row['measured']}",
            str(row["workers"]),
            f"{row['dollars_per_hour']:.2f}",
            f"{row['dollars_per_1000_chats']:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(shown)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    if any(row["measured"] == "estimated" for row in rows):
        console.print(
            "estimated: scaled from what was measured; run a thousand chats of yours, and give "
            "the summary's chats_per_second",
            highlight=False,
        )
