"""Measures what the pipeline costs around the model: CPU to start, and CPU for each chat.

The model is scripted and the chats come from a file. Each figure is of this tree beside another
revision, run in turn, the least of several runs of user and system time of the process:

    python bench/pipeline.py                     # a table, and where the time goes
    python bench/pipeline.py --before v0.2.0     # beside another revision
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "984bc9d"
"""The last commit before the pipeline was made faster."""

RULES = [
    {"task": "analysis", "match": "late", "answer": {"sentiment": -1, "summary": "It is late."}},
    {"task": "analysis", "answer": {"sentiment": 0, "summary": "The customer asks something."}},
    {"task": "apology", "answer": "We are sorry that it is late."},
]
SAYS = (
    "My parcel is late, it should have come on Monday, and nobody has told me why",
    "Thank you for the message, I am looking for the parcel in our system now",
    "Where can I see it, and which number do you need from me for that",
    "You can see it on the page of your account, under orders and deliveries",
)
FEW = 5

STAGES = {
    "parse lines": ("parse.py", "parse"),
    "tell chats apart": ("identity.py", "compare"),
    "render prompts": ("analyse.py", "ask_for_analysis"),
    "the scripted model": ("handlers.py", "run_inference"),
    "parse answers": ("analyse.py", "analysed"),
    "render prompts of drafts": ("draft.py", "ask_for_draft"),
    "parse drafts": ("draft.py", "drafted"),
    "coders: encode": ("coders.py", "encode"),
    "coders: decode": ("coders.py", "decode"),
    "coders: pickle": ("~", "<built-in method _pickle.dumps>"),
}
"""Where the time goes: names, with the file and the function whose time counts."""

PROFILE = """
import cProfile, pstats, sys, threading
from chatflow.cli import main
profile = cProfile.Profile()
profile.enable()
main(sys.argv[2:])
profile.disable()
pstats.Stats(profile).dump_stats(sys.argv[1])
"""


def write_chats(path: Path, count: int, messages: int = 5) -> None:
    """Writes chats of two people each; one in four is angry."""
    with path.open("w") as file:
        for number in range(count):
            said = [
                {
                    "user_id": f"{role}-{number}",
                    "role": role,
                    "message_id": str(at),
                    "sent_at": f"2026-05-01T{at // 3600 % 24:02}:{at // 60 % 60:02}:{at % 60:02}Z",
                    "text": f"{SAYS[(at + 2 * (number % 4 > 0)) % 4]} ({at})",
                }
                for at in range(messages)
                for role in [("customer", "agent")[at % 2]]
            ]
            file.write(json.dumps({"chat_id": f"chat-{number}", "messages": said}) + "\n")


def write_script(folder: Path) -> str:
    """Writes the model's script; returns the value of `--model`."""
    script = folder / "script.jsonl"
    script.write_text("\n".join(map(json.dumps, RULES)))
    return f"scripted:{script}"


def run(tree: Path, chats: Path, model: str, profile: str = "") -> dict[str, float]:
    """Runs a tree's chatflow on chats; returns seconds of CPU and the most megabytes in memory."""
    python = [sys.executable, "-m", "chatflow"]
    if profile:
        python = [sys.executable, "-c", PROFILE, profile]
    with tempfile.TemporaryDirectory(prefix="chatflow-bench-") as output:
        flags = ["--input", str(chats), "--output", output, "--model", model, "--summary=json"]
        process = subprocess.Popen(
            [*python, "run", *flags],
            env={**os.environ, "PYTHONPATH": str(tree)},
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    counts = json.loads(said[-1])
    assert process.returncode == 0
    assert counts["analysed"] == counts["chats_read"]
    assert counts["lost"] == counts["dead_letters"] == 0
    return {"cpu": used.ru_utime + used.ru_stime, "mb": used.ru_maxrss / 1024}


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Checks a revision out beside this tree, for the time of the context."""
    with tempfile.TemporaryDirectory(prefix="chatflow-before-") as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", folder, revision], check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def shares(path: str, chats: int) -> dict[str, float]:
    """Returns milliseconds a chat by stage, of a profile."""
    import pstats

    stats: Any = pstats.Stats(path)
    found = dict.fromkeys(STAGES, 0.0)
    for (file, _, function), (_, _, _, seconds, _) in stats.stats.items():
        for stage, (known, name) in STAGES.items():
            if name == function and Path(file).name == known:
                found[stage] += seconds
    whole = sum(
        seconds
        for (_, _, function), (_, _, _, seconds, _) in stats.stats.items()
        if function == "process_encoded"
    )
    found["the rest, nearly all Beam's"] = whole - sum(found.values())
    return {stage: seconds / chats * 1000 for stage, seconds in found.items()}


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", default=BEFORE, help="the revision to compare with")
    parser.add_argument("--chats", type=int, default=4500)
    parser.add_argument("--runs", type=int, default=3, help="of each side; the least counts")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chatflow-bench-") as scratch:
        folder = Path(scratch)
        few, many, model = folder / "few.jsonl", folder / "many.jsonl", write_script(folder)
        write_chats(few, FEW)
        write_chats(many, flags.chats)
        with worktree(flags.before) as before:
            sides = {"before": before, "now": ROOT}
            cpu: dict[tuple[str, Path], float] = {}
            for number in range(flags.runs):
                for (name, tree), chats in [(s, c) for c in (few, many) for s in sides.items()]:
                    took = run(tree, chats, model)["cpu"]
                    cpu[name, chats] = min(took, cpu.get((name, chats), took))
                    print(f"run {number + 1}, {name}: {took:.2f} s", file=sys.stderr)
            stages = {}
            for name, tree in sides.items():
                run(tree, many, model, str(folder / name))
                stages[name] = shares(str(folder / name), flags.chats)
    table = Table(title=f"{flags.chats:,} chats of five messages, scripted model, CPU time")
    for column in ("", "before", "now", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    starts = [cpu[name, few] for name in sides]
    each = [(cpu[name, many] - cpu[name, few]) / (flags.chats - FEW) * 1000 for name in sides]
    for title, unit, (was, now) in (("start", "s", starts), ("a chat", "ms", each)):
        table.add_row(title, f"{was:.2f} {unit}", f"{now:.2f} {unit}", f"{was / now:.1f}")
    profile = Table(title="A chat by stage, under a profiler, which makes everything slower")
    for column in ("", "before", "now"):
        profile.add_column(column, justify="left" if not column else "right")
    for stage in stages["now"]:
        profile.add_row(stage, *(f"{stages[name][stage]:.2f} ms" for name in sides))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(profile)


if __name__ == "__main__":
    bench()
