"""Reads large exports, and measures the rate and the memory that it takes.

    python bench/formats.py                    # 1 GB each: about 5 minutes and 2 GB of disk
    python bench/formats.py --megabytes 100 --chats

Makes a file of each format: `csv` (a row per message; those of a chat are far apart), `jsonl` and
`array` (a chat per line or element). A separate process reads each, up to our lines; with
`--chats` once more, up to the chats in them. Prints a table and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

HEADER = "message_id,ticket_id,author_role,author,created_at,public,product,body\n"
MAX_LINE_BYTES = 16_000_000


def text_of(number: int) -> str:
    return f"My order {number} has not come, and nobody tells me why. " * 3


def csv(size: int) -> Iterator[str]:
    yield HEADER
    chats, number = max(size // 2000, 1), 0
    while True:
        number += 1
        who = "agent" if number // chats % 2 else "end-user"
        at = f"2026-03-01T{number // chats % 24:02}:{number % 60:02}:00Z"
        yield (
            f"{number},{number % chats},{who},{who}-{number % chats},{at},true,kettle,"
            f'"{text_of(number)}"\n'
        )


def chats(size: int) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        said = [
            {"user_id": role, "role": role, "text": text_of(number)}
            for role in ("customer", "agent")
        ]
        yield json.dumps({"chat_id": str(number), "messages": said}) + "\n"


def array(size: int) -> Iterator[str]:
    for number, chat in enumerate(chats(size)):
        yield f"{',' if number else '['}{chat}"


FORMATS = {"csv": csv, "jsonl": chats, "array": array}


def write(path: Path, name: str, size: int) -> None:
    written = 0
    with path.open("w") as file:
        for part in FORMATS[name](size):
            written += file.write(part)
            if written >= size:
                break
        file.write("]" if name == "array" else "")


def read(path: str, as_chats: bool) -> dict[str, Any]:
    """Returns the count, seconds and memory (bytes above that of the imports) of reading a file."""
    from chatflow.records import Range
    from chatflow.sources.lines import read_lines
    from chatflow.sources.parse import parse_arrival

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, started, count = peak(), time.perf_counter(), 0
    for arrival in read_lines(Range(path), MAX_LINE_BYTES):
        count += 1
        if arrival.fault is not None:
            raise SystemExit(arrival.fault.message)
        if as_chats:
            parse_arrival(arrival, timedelta(0))
    seconds = time.perf_counter() - started
    return {"chats": count, "seconds": seconds, "memory": peak() - before, "process": peak()}


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--chats", action="store_true", help="also read up to chats")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--as_chats", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.read:
        print(json.dumps(read(flags.read, flags.as_chats)))
        return
    found = []
    print("| format | up to | chats | s | MB/s | memory, MB | of the process, MB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="chatflow-formats-") as folder:
        for name in flags.formats.split(","):
            path = Path(folder) / name
            write(path, name, flags.megabytes * 1_000_000)
            megabytes = path.stat().st_size / 1e6
            for stage in ("lines", "chats") if flags.chats else ("lines",):
                command = [sys.executable, __file__, "--read", str(path)]
                command += ["--as_chats"] if stage == "chats" else []
                said = subprocess.run(command, check=True, capture_output=True, env=os.environ)
                one = {"format": name, "megabytes": megabytes, "stage": stage}
                one |= json.loads(said.stdout)
                found.append(one)
                print(
                    f"| {name} | {stage} | {one['chats']:,} | {one['seconds']:,.0f} | "
                    f"{megabytes / one['seconds']:,.0f} | {one['memory'] / 1e6:,.0f} | "
                    f"{one['process'] / 1e6:,.0f} |",
                    flush=True,
                )
            path.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    bench()
