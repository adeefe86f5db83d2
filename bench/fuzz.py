"""Runs random lines and random files through `chatflow run`, and counts what comes out.

  python bench/fuzz.py --lines 1000000 --files 10000

Lines are chats and messages with any JSON value in any field, broken JSON and random bytes. Files
are lines, arrays and tables, compressed and encoded in many ways, cut off and damaged. Each line
and each file must come out as an analysis or a dead letter, without a traceback.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import gzip
import json
import lzma
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORDS = "late thanks where is my parcel broken refund ü 漢字 <p> &nbsp; \u200b > \x00".split(" ")
FIELDS = (
    "chat_id", "messages", "user_id", "text", "role", "sent_at", "attributes", "message_id",
    "revision", "private", "event", "type", "original",
)  # fmt: skip


def value(chance: random.Random, depth: int = 0) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: chance.random() < 0.5,
        lambda: chance.randint(-(2**70), 2**70),
        lambda: chance.uniform(-1e300, 1e300),
        lambda: " ".join(chance.choices(WORDS, k=chance.randint(0, 12))),
        lambda: "".join(chr(chance.choice((chance.randint(0, 127), chance.randint(0, 0xD7FF))))
                        for _ in range(chance.randint(0, 8))),
        lambda: chance.choice(("", " ", "closed", "message", "customer", "agent", "system",
                               "0001-01-01T00:00:00+02:00", "2026-03-01T10:00:00Z", "\ud800")),
    ]  # fmt: skip
    if depth < 3:
        kinds.append(lambda: [value(chance, depth + 1) for _ in range(chance.randint(0, 3))])
        kinds.append(
            lambda: {
                chance.choice(FIELDS): value(chance, depth + 1) for _ in range(chance.randint(0, 4))
            }
        )
    return chance.choice(kinds)()


def line(chance: random.Random, number: int) -> bytes:
    said = {"user_id": "c", "role": "customer", "text": " ".join(chance.choices(WORDS, k=6))}
    whole: dict[str, Any] = {"chat_id": str(number)}
    whole |= said if chance.random() < 0.1 else {"messages": [dict(said) for _ in range(3)]}
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        place = whole
        if isinstance(whole.get("messages"), list) and whole["messages"] and chance.random() < 0.6:
            place = chance.choice(whole["messages"])
        if isinstance(place, dict):
            place[chance.choice(FIELDS)] = value(chance)
    raw = bytearray(json.dumps(whole).encode())
    if chance.random() < 0.1:
        for _ in range(chance.randint(1, 5)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif chance.random() < 0.05:
        raw = raw[: chance.randrange(len(raw))] or raw
    return bytes(raw).replace(b"\n", b" ").replace(b"\r", b" ") or b"x"


def file(chance: random.Random, number: int) -> bytes:
    lines = [line(chance, 10 * number + i) for i in range(chance.randint(0, 5))]
    content = chance.choice((b"\n", b"\r\n", b"\n\n")).join(lines)
    text = content.decode("utf-8", "replace")
    content = chance.choice(
        (
            lambda: content,
            lambda: b"[" + b",".join(lines) + b"]",
            lambda: json.dumps([value(chance) for _ in range(3)], indent=2).encode(),
            lambda: text.encode(chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig"))),
            lambda: chance.randbytes(chance.randint(0, 500)),
            lambda: b"a,b,c\n" + b"1,2,3\n" * chance.randint(0, 9),
            lambda: b"{" * chance.randint(1, 5000),
        )
    )()
    pack: Callable[[bytes], bytes] = chance.choice(
        (bytes, bytes, gzip.compress, bz2.compress, lzma.compress)
    )
    content = pack(content)
    if content and chance.random() < 0.3:
        content = content[: chance.randrange(len(content))]
    if content and chance.random() < 0.2:
        at = chance.randrange(len(content))
        content = content[:at] + chance.randbytes(3) + content[at:]
    return content


SCRIPT = (
    {"task": "apology", "answer": "We are sorry that your parcel is late."},
    {"match": "late", "answer": {"sentiment": -1, "summary": "The parcel is late."}},
    {"answer": {"sentiment": 0, "summary": "The customer asks a question."}},
)


def run(folder: Path, source: str) -> tuple[dict[str, Any], str]:
    """Returns the counts of a run; raises `AssertionError` for a traceback or a lost element."""
    done = subprocess.run(
        [sys.executable, "-m", "chatflow", "run", f"--input={source}", f"--output={folder}/out",
         f"--model=scripted:{folder}/script.jsonl", "--summary=json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    counts: dict[str, Any] = json.loads(done.stdout)
    assert counts["lost"] == 0, counts
    internal = [reason for reason in counts["dead_letters_by_reason"] if "internal" in reason]
    assert not internal, internal
    return counts, done.stderr


def parts(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
        print(f"\r{min(start + size, total):,} of {total:,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    chance = random.Random(parsed.seed)
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.jsonl").write_text("".join(json.dumps(rule) + "\n" for rule in SCRIPT))
        for numbers in parts(parsed.lines, 20_000):
            source = folder / "lines.jsonl"
            with source.open("wb") as lines:
                lines.writelines(line(chance, number) + b"\n" for number in numbers)
            counts, _ = run(folder, str(source))
            assert counts["lines_read"] == len(numbers), counts
            total.update(lines=len(numbers), analysed=counts["analysed"])
            total.update(counts["dead_letters_by_reason"])
        print("lines", json.dumps(total))
        total.clear()
        for numbers in parts(parsed.files, 500):
            places = folder / f"files-{numbers.start}"
            places.mkdir()
            (places / "good.jsonl").write_bytes(b'{"chat_id":"0","user_id":"c","text":"late"}')
            for number in numbers:
                (places / f"{number}.jsonl").write_bytes(file(chance, number))
            counts, _ = run(folder, f"{places}/*")
            total.update(files=len(numbers), lines=counts["lines_read"])
            total.update(analysed=counts["analysed"], **counts["dead_letters_by_reason"])
        print("files", json.dumps(total))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"the largest run took {peak:,.0f} MB")


if __name__ == "__main__":
    main()
