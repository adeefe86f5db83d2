"""Measures how fast events pass the pipeline, and how long a chat waits for its analysis.

The model is scripted, so this measures everything but the model. All parts in one run:

    python bench/stream.py                # events a second, latency; Beam's runner beside ours
    python bench/stream.py --soak 600     # ten minutes at a steady rate, with memory
    python bench/stream.py --profile      # where the time of the bounded run goes
    python bench/stream.py --waits 0,0.2,1 --model gemma3-270m --rate 1  # the real model

Needs the Pub/Sub emulator, as `chatflow stream` does. `--json` prints the figures as a
line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chatflow.cli import main
from chatflow.commands import publish
from chatflow.console.dashboard import percentiles
from chatflow.records import Chat, Message
from chatflow.running.emulator import emulator, make_topics, subscription_of
from chatflow.sources.puller import follow

BEAM = "apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner"
RULES = [
    {"task": "analysis", "match": "late", "answer": {"sentiment": -1, "summary": "It is late."}},
    {"task": "analysis", "answer": {"sentiment": 0, "summary": "The customer asks something."}},
    {"task": "apology", "answer": "We are sorry that it is late."},
]
MESSAGES = 5  # of a chat; its end is one event more
SAMPLES = Path(__file__).parent.parent / "samples" / "chats.jsonl"


def chats(count: int) -> list[Chat]:
    """Returns chats of five messages; one in four is angry."""
    return [
        Chat(
            chat_id=f"chat-{number}",
            messages=tuple(
                Message(
                    user_id=("c", "a")[n % 2],
                    role=("customer", "agent")[n % 2],
                    text=f"{'my parcel is late' if number % 4 == 0 else 'where can I see it'} {n}",
                )
                for n in range(MESSAGES)
            ),
        )
        for number in range(count)
    ]


def bounded(folder: Path, model: str, count: int, profile: bool = False) -> dict[str, Any]:
    """Measures the whole pipeline on FnApiRunner, with events from a file."""
    path = folder / "events.jsonl"
    lines = [line.data for line in publish.Replay(chats(count), at_once=50)]
    path.write_bytes(b"\n".join(lines))
    arguments = ["run", "--input", str(path), "--output", str(folder / "out")]
    profiler = cProfile.Profile()
    started = time.monotonic()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        if profile:
            threading.setprofile(lambda *_: profiler.enable())
        assert main([*arguments, "--model", model, "--summary=json"]) == 0
    seconds = time.monotonic() - started
    if profile:
        profiler.disable()
        threading.setprofile(None)
        print_profile(profiler)
    return {"events": len(lines), "seconds": seconds, "events_per_second": len(lines) / seconds}


def print_profile(profiler: cProfile.Profile) -> None:
    """Prints the time by package and module, without the time of what they call."""
    by_module: dict[str, float] = {}
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        parts = Path(file).parts
        where = function if file == "~" else "/".join(parts[-2:])
        by_module[where] = by_module.get(where, 0) + own
    total = sum(by_module.values())
    table = Table(title="Own time by module, bounded run")
    for column in ("module", "share"):
        table.add_column(column)
    for where, own in sorted(by_module.items(), key=lambda item: -item[1])[:20]:
        table.add_row(where, f"{own / total:.1%}")
    Console(stderr=True).print(table)


class Pipeline:
    """`chatflow run` with separate topics, in a separate process."""

    def __init__(self, name: str, *flags: str):
        base = f"projects/chatflow-bench/topics/{name}"
        self.events, self.results = f"{base}-events", f"{base}-results"
        make_topics((self.events, self.results))
        command = [
            sys.executable, "-m", "chatflow", "run", "--input", subscription_of(self.events),
            "--analyses", self.results, "--drafts", self.results, "--dead_letters", self.results,
            "--summary=json", *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(kilobytes.split()[1]) / 1024

    def stop(self) -> dict[str, Any]:
        """Drains it; returns its counts if it prints them in time."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, IndexError):
            counts: dict[str, Any] = json.loads(
                self.process.communicate(timeout=30)[0].splitlines()[-1]
            )
            return counts
        self.process.kill()
        return {}


@contextlib.contextmanager
def running(name: str, *flags: str) -> Iterator[tuple[Pipeline, Any]]:
    pipeline = Pipeline(name, *flags)
    try:
        with follow([pipeline.results]) as arrived:
            yield pipeline, arrived
    finally:
        pipeline.process.kill()


def live(
    name: str, talk: list[Chat], rate: float, most: float, *flags: str, soak: bool = False
) -> dict[str, Any]:
    """Sends chats at a steady rate of events a second; returns seconds from message to analysis."""
    sent: dict[tuple[str, int], float] = {}
    seen: dict[str, float] = {}
    memory: list[tuple[float, float]] = []

    def note(chat_id: str, revision: int, at: float) -> None:
        sent[chat_id, revision] = at

    with running(name, *flags) as (pipeline, arrived):

        def attend() -> None:
            for message in arrived():
                value = json.loads(message.data)
                at = sent.get((value.get("chat_id", ""), value.get("revision", 0)))
                if "summary" in value and at is not None:
                    seen.setdefault(value["analysis_id"], message.publish_time.timestamp() - at)

        warm = chats(1)[0].model_copy(update={"chat_id": "warm-up"})
        publish.send(publish.Replay([warm], sent=note), pipeline.events)
        give_up = time.monotonic() + most
        while not seen and time.monotonic() < give_up:
            attend()
        warmed = len(seen)
        seen.clear()
        started = time.monotonic()
        replay = publish.Replay(talk, at_once=20, sent=note)
        sender = threading.Thread(target=publish.send, args=(replay, pipeline.events, rate))
        sender.start()
        while len(seen) < len(talk) and time.monotonic() - started < most:
            attend()
            now = time.monotonic() - started
            if soak and (not memory or now - memory[-1][0] >= 30):
                memory.append((now, pipeline.memory_mb()))
                Console(stderr=True).print(
                    f"{now:5.0f} s: {len(seen)} analyses, {memory[-1][1]:.0f} MB", highlight=False
                )
        seconds = time.monotonic() - started
        sender.join()
        counts = pipeline.stop() if warmed else {}
    events = sum(len(chat.messages) + 1 for chat in talk)
    values = sorted(seen.values()) or [float("nan")]
    p50, p95 = percentiles(values)
    return {
        "events": events,
        "analysed": len(seen),
        "of": len(talk),
        "seconds": seconds,
        "events_per_second": events / seconds,
        "p50": p50,
        "p95": p95,
        "worst": values[-1],
        "memory_mb": [round(mb) for _, mb in memory],
        "batch_size": counts.get("batch_size", {}),
        "lost": counts.get("lost"),
    }


def samples() -> list[Chat]:
    return publish.chats_of(publish.read_lines(str(SAMPLES)))[0]


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chats", type=int, default=2000, help="chats to run, or to replay")
    parser.add_argument("--rate", type=float, default=50, help="events a second, live")
    parser.add_argument("--soak", type=float, default=0, help="seconds at the rate")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--waits", default="", help="values of --max_batch_duration_secs")
    parser.add_argument("--model", default="", help="instead of the scripted one, with --waits")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="chatflow-bench-") as scratch:
        folder = Path(scratch)
        script = folder / "script.jsonl"
        script.write_text("\n".join(map(json.dumps, RULES)))
        model = f"scripted:{script}"
        if options.profile:
            figures["bounded"] = bounded(folder, model, options.chats, profile=True)
        elif options.waits:
            with emulator():
                talk = samples()[: options.chats]
                for wait in options.waits.split(","):
                    figures[f"wait {wait} s"] = live(
                        f"wait-{wait}".replace(".", "-"), talk, options.rate, 900,
                        f"--model={options.model or model}", f"--max_batch_duration_secs={wait}",
                    )  # fmt: skip
        elif options.soak:
            count = int(options.soak * options.rate / (MESSAGES + 1))
            with emulator():
                figures["soak"] = live(
                    "soak", chats(count), options.rate, options.soak + 120, f"--model={model}",
                    "--retention_hours=0.05", soak=True,
                )  # fmt: skip
        else:
            figures["files, FnApiRunner"] = bounded(folder, model, options.chats)
            with emulator():
                burst, steady = chats(options.chats), chats(600)
                at_once = live("burst", burst, 0, 300, f"--model={model}")
                figures["Pub/Sub, all at once, chatflow"] = at_once
                figures[f"Pub/Sub, {options.rate:.0f} events/s, chatflow"] = live(
                    "steady", steady, options.rate, 200, f"--model={model}"
                )
                figures[f"Pub/Sub, {options.rate:.0f} events/s, Beam's runner"] = live(
                    "beam", steady, options.rate, 200, f"--model={model}", f"--runner={BEAM}"
                )
    if options.json:
        print(json.dumps(figures))
        return
    show(figures)


def show(figures: dict[str, Any]) -> None:
    table = Table()
    for column in ("", "events", "analysed", "events/s", "p50", "p95", "worst", "batch", "memory"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in figures.items():
        memory = row.get("memory_mb") or []
        table.add_row(
            name,
            f"{row['events']:,}",
            f"{row['analysed']} of {row['of']}" if "of" in row else "all",
            f"{row['events_per_second']:,.0f}",
            *(f"{row[key]:.2f} s" if key in row else "" for key in ("p50", "p95", "worst")),
            str(row.get("batch_size", {}).get("mean", "")),
            f"{memory[1]} to {memory[-1]} MB" if len(memory) > 1 else "",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    sides = [row for name, row in figures.items() if "events/s," in name]
    if len(sides) == 2:
        ours, beams = sides
        print(
            f"Beam's runner to ours: p50 {beams['p50'] / ours['p50']:.1f}, "
            f"p95 {beams['p95'] / ours['p95']:.1f}, worst {beams['worst'] / ours['worst']:.1f}"
        )


if __name__ == "__main__":
    bench()
