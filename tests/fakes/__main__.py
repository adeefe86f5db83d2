"""Serves the stand-in for Vertex AI, by itself or around a command.

  python -m tests.fakes --rates 429=0.1 --retry_after 1
  python -m tests.fakes --latency lognormal:0.3,0.5 -- chatflow run … --api_endpoint {address}

In the command, {address} stands for the stand-in's address, and {public}, {dedicated}, {psa} and
{psc} for the names of its endpoints. Exit code: the command's, or 1 when the stand-in saw a call
before its Retry-After.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .brain import FAULTS, Behaviour, scripted_answer
from .vertex import ENDPOINTS, FakeVertex

NAMES = {
    "public": "public",
    "dedicated": "dedicated",
    "psa": "private service access",
    "psc": "private service connect",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fakes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--latency", default="0.2", help="seconds, or uniform:A,B lognormal:MEDIAN,SIGMA "
        "bimodal:FAST,SLOW,SHARE (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rates", default="", help=f"FAULT=SHARE,…: a status or one of {', '.join(FAULTS)}"
    )
    parser.add_argument("--quota", type=int, default=0, help="answered calls in any second")
    parser.add_argument("--capacity", type=int, default=0, help="calls at once")
    parser.add_argument("--bursts", default="", help="EVERY,FOR: seconds of refusing all calls")
    parser.add_argument("--retry_after", type=float, help="seconds, with 429 and 503")
    parser.add_argument("--seed", type=int, default=Behaviour.seed)
    parser.add_argument("--grpc", action="store_true", help="also serve gRPC")
    parser.add_argument("command", nargs="*", help="command to run; the stand-in ends with it")
    parsed = parser.parse_args(arguments)
    pairs = [pair.partition("=") for pair in parsed.rates.split(",") if pair]
    try:
        rates = {fault: float(share) for fault, _, share in pairs}
        Behaviour(rates=rates)
    except ValueError as error:
        parser.error(f"--rates={parsed.rates}: {error}")
    behaviour: dict[str, Any] = {
        "latency": parsed.latency,
        "rates": rates,
        "quota": parsed.quota,
        "capacity": parsed.capacity,
        "bursts": [float(number) for number in parsed.bursts.split(",") if number],
        "retry_after": parsed.retry_after,
        "seed": parsed.seed,
    }
    scripted_answer("")  # reads the script now, so that the first call is not a slow one
    with FakeVertex(with_grpc=parsed.grpc) as fake, fake.trusted():
        fake.reset(**behaviour)
        places = {name: ENDPOINTS[kind] for name, kind in NAMES.items()}
        places["address"] = fake.address
        if parsed.command:
            command = [_fill(word, places) for word in parsed.command]
            code = subprocess.run(command, env=dict(os.environ)).returncode
        else:
            code = 0
            doors = {"address": fake.address, "secure": fake.secure, "grpc": fake.grpc}
            print(json.dumps({**doors, "certificate": str(fake.certificate)}), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        stats = fake.brain.stats()
    _show(stats)
    return code or int(stats["before_retry_after"] > 0)


def _fill(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(f"{{{name}}}", place)
    return word


def _show(stats: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What the stand-in saw", show_header=False)
    for name, value in stats.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in sorted(value.items())) or "none"
        table.add_row(name.replace("_", " "), str(value))
    Console(file=sys.stderr).print(table)


if __name__ == "__main__":
    sys.exit(main())
