"""Measures the seconds until `chatflow run` shows or writes its first analysis of the samples.

This tree runs beside another revision (--before), in turns, with the same packages, and the
embedded Gemma. Warm: compiled code is on disk, as after the first run. Cold: it is not. Each run
ends with its first analysis, which is a row in a database or a line in the terminal. Seconds of
the processors (of all threads) are shown, too: other programs on the machine change them less.

  python bench/first_result.py
  python bench/first_result.py --before v0.2.0 --runs 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SAMPLES = HERE / "samples" / "chats.jsonl"
BEFORE = "984bc9d"
"""The last commit that showed nothing before all chats were analysed."""
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", default=BEFORE, help="a revision (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="the best of them counts")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, worktree(parsed.before, scratch) as before:
        sides = {f"before ({parsed.before})": before, "now": HERE}
        caches = {side: Path(scratch, f"xla-{number}") for number, side in enumerate(sides)}
        for side, tree in sides.items():  # fills the caches, and converts the model if needed
            first_result(tree, caches[side], to_the_end=True)
        best: dict[tuple[str, str], tuple[float, float]] = {}
        for _ in range(parsed.runs):
            for side, tree in sides.items():
                for state in ("warm", "cold"):
                    with tempfile.TemporaryDirectory() as empty:
                        cache = caches[side] if state == "warm" else Path(empty)
                        seconds = first_result(tree, cache)
                    known = best.get((state, side), seconds)
                    best[state, side] = min(seconds[0], known[0]), min(seconds[1], known[1])
    print("| compiled code | side | first analysis after | ratio | processors | ratio |")
    print("|---|---|---:|---:|---:|---:|")
    first = next(iter(sides))
    for (state, side), (wall, cpu) in sorted(best.items(), key=lambda item: item[0][0] == "cold"):
        slow, used = best[state, first]
        print(
            f"| {'on disk' if state == 'warm' else 'none'} | {side} | {wall:.1f} s "
            f"| {slow / wall:.1f} | {cpu:.1f} s | {used / cpu:.1f} |"
        )


@contextlib.contextmanager
def worktree(revision: str, scratch: str):
    """Yields a folder with the files of a revision."""
    folder = Path(scratch, "before")
    git = ("git", "-C", str(HERE), "worktree")
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def first_result(tree: Path, cache: Path, to_the_end: bool = False) -> tuple[float, float]:
    """Runs chatflow of a tree; returns the seconds, and those of processors, to its first result.

    Ends the run then, unless `to_the_end`.
    """
    names = [f" {json.loads(line)['chat_id']} " for line in SAMPLES.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        database, said = Path(folder, "results.db"), Path(folder, "said")
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }
        command = [
            sys.executable, "-m", "chatflow", "run", "--input", str(SAMPLES),
            "--output", f"{folder}/out", "--database", f"sqlite:///{database}",
        ]  # fmt: skip
        with said.open("w") as out:
            began = time.monotonic()
            process = subprocess.Popen(
                command, cwd=tree, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
            try:
                while not (found := rows(database) or any(n in said.read_text() for n in names)):
                    if process.poll() is not None:
                        break
                    time.sleep(0.2)
                seconds = time.monotonic() - began, processors(process.pid)
                if not found and not any(n in said.read_text() for n in names):
                    sys.exit(f"no analysis came:\n{said.read_text()}")
                if to_the_end:
                    process.wait()
            finally:
                process.kill()
                process.wait()
    return seconds


def rows(database: Path) -> int:
    """Returns how many analyses are in a database, which may not be there yet."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection,
    ):
        return int(connection.execute("SELECT count(*) FROM analyses").fetchone()[0])
    return 0


def processors(pid: int) -> float:
    """Returns the seconds that a process has used of all processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


if __name__ == "__main__":
    main()
