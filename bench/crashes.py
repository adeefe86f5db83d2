"""Kills runs at random moments, and checks by id whether anything is missing afterwards.

  python bench/crashes.py --kills 200

Half of the runs are batches into a folder that has results of an earlier run; half are a stream
that writes files, on Pub/Sub's emulator. The signal is SIGKILL, so that no run can clean up.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from chatflow.running.emulator import emulator, make_topics
from chatflow.sinks.files import result_files

SCRIPT = (
    {"task": "apology", "answer": "We are sorry that your parcel is late."},
    {"match": "late", "answer": {"sentiment": -1, "summary": "The parcel is late."}},
    {"answer": {"sentiment": 0, "summary": "The customer asks a question."}},
)
KINDS = ("analyses", "drafts", "dead_letters")


def chat(number: int) -> str:
    text = "My parcel is late!" if number % 2 else "Where is it?"
    messages = [{"user_id": "c", "role": "customer", "text": f"{text} {number}"}]
    return json.dumps({"chat_id": str(number), "messages": messages})


def start(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chatflow", "run", f"--model=scripted:{folder}/script.jsonl"]
    with open(folder / "errors.txt", "ab") as errors:
        return subprocess.Popen(
            [*command, *flags, "--summary=json"],
            stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kills a process and its children; returns whether it was still running."""
    ran = process.poll() is None
    if ran:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ran


def ids(folder: Path) -> set[tuple[str, str]]:
    """Returns the kind and id of each result; half a line raises an error."""
    found = set()
    for kind in KINDS:
        for path in result_files(f"{folder}/{kind}"):
            for line in Path(path).read_text().splitlines():
                value = json.loads(line)
                id = value.get("draft_id") or value.get("analysis_id") or value["payload"]
                found.add((kind, id))
    return found


def batches(folder: Path, kills: int, chance: random.Random) -> collections.Counter[str]:
    """Runs batches into one folder, each with more chats, and kills them."""
    counts: collections.Counter[str] = collections.Counter()
    results, source = folder / "results", folder / "chats.jsonl"
    flags = f"--input={source}", f"--output={results}"
    chats = 300
    source.write_text("".join(chat(number) + "\n" for number in range(chats)) + "bad\n")
    began = time.monotonic()
    assert start(folder, *flags).wait() == 0
    takes = time.monotonic() - began
    known = ids(results)
    for _ in progress(range(kills), "batches"):
        chats += 1
        with source.open("a") as file:
            file.write(chat(chats) + "\n")
        process = start(folder, *flags)
        # A run spends most time starting; so half of the kills wait until results are written.
        time.sleep(chance.uniform(*chance.choice([(0, takes), (0.75 * takes, 1.1 * takes)])))
        counts["killed" if kill(process) else "ended before"] += 1
        found = ids(results)
        counts["missing"] += len(known - found)
        known |= found
    assert start(folder, *flags).wait() == 0
    counts["missing"] += len(known - ids(results))
    counts["left over"] = len([p for p in results.iterdir() if ".chatflow-new" in p.name])
    return counts


def streams(folder: Path, kills: int, chance: random.Random) -> collections.Counter[str]:
    """Publishes chats to a stream that is killed again and again, and drains it at the end."""
    from google.cloud import pubsub_v1

    counts: collections.Counter[str] = collections.Counter()
    results = folder / "streamed"
    with emulator():
        project = "projects/crashes"
        make_topics([f"{project}/topics/events"])
        subscription = f"{project}/subscriptions/events"
        publisher = pubsub_v1.PublisherClient()
        published = 0
        flags = f"--input={subscription}", f"--output={results}"

        def publish(count: int) -> None:
            nonlocal published
            sent = []
            for number in range(published, published + count):
                sent.append(publisher.publish(f"{project}/topics/events", chat(number).encode()))
            for future in sent:
                future.result()
            published += count

        for _ in progress(range(kills), "streams"):
            process = start(folder, *flags)
            until = time.monotonic() + chance.uniform(3, 9)
            while time.monotonic() < until:
                publish(5)
                time.sleep(0.2)
            counts["killed" if kill(process) else "ended before"] += 1
        process = start(folder, *flags)
        analysed: set[str] = set()
        give_up = time.monotonic() + 180
        while len(analysed) < published and time.monotonic() < give_up:
            time.sleep(5)
            analysed = {
                json.loads(line)["chat_id"]
                for path in result_files(f"{results}/analyses")
                for line in Path(path).read_text().splitlines()
            }
        process.send_signal(signal.SIGTERM)
        process.wait()
        lines = [
            json.loads(line)
            for path in result_files(f"{results}/analyses")
            for line in Path(path).read_text().splitlines()
        ]
    counts["published"] = published
    counts["missing"] = published - len({line["chat_id"] for line in lines})
    counts["written again"] = len(lines) - len({line["analysis_id"] for line in lines})
    counts["left over"] = len(list(results.glob("*.part")))
    return counts


def progress(numbers: range, what: str) -> Iterable[int]:
    for number in numbers:
        print(f"\r{what}: {number + 1} of {len(numbers)}", end="", file=sys.stderr, flush=True)
        yield number
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    chance = random.Random(parsed.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.jsonl").write_text("".join(json.dumps(rule) + "\n" for rule in SCRIPT))
        for kind in (batches, streams):
            counts = kind(folder, parsed.kills // 2, chance)
            print(kind.__name__, json.dumps(counts))
        errors = (folder / "errors.txt").read_text()
    print("tracebacks", errors.count("Traceback"))
    sys.exit(int("Traceback" in errors))


if __name__ == "__main__":
    main()
