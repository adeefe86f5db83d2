"""Makes labelled chats of the written ones, for `chatflow tune` and `chatflow evaluate`.

    python tuning/generate.py --output chats.jsonl
    python tuning/generate.py --part eval --output tuning/eval.jsonl

Each written chat comes `--variants` times, each time with other wordings where it has some,
other names, and at times typed otherwise. The same seed makes the same file. Some chats are
held back from what is learned from: by them `make eval` sees whether answers stay as good.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TONES = {"angry": -1, "neutral": 0, "happy": 1}
CHATS = Path(__file__).parent / "chats"

_LINE = re.compile(r"([A-E]): (.*\S)")
_WORDINGS = re.compile(r"\{([^{}]*)\}")
_SERVES = ("agent", "support", "assistant", "service", "bot", "helpdesk")
_NAMES = (
    "Ada Aisha Alma Amir Ana Anton Aya Bea Ben Carla Chen Clara Dana David Diego Ebba Elif Emil "
    "Eva Farid Femi Finn Gia Greta Hana Hugo Ines Ivan Jana Jin Joao Jonas Kaya Kofi Lara Leo "
    "Lin Lou Luca Maja Marek Mei Milo Mona Nadia Nils Nora Olga Omar Otto Pia Priya Raj Rita Rob "
    "Sam Sara Selim Sofia Tara Tim Tom Una Uma Vera Viktor Wanda Yara Yusuf Zoe"
).split()


@dataclasses.dataclass(frozen=True)
class Written:
    """A chat as it was written.

    Attributes:
      kind: the name of the file.
      lines: who speaks, and the text with its wordings.
    """

    kind: str
    tone: str
    tags: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.lines).encode()).hexdigest()

    @property
    def is_plain(self) -> bool:
        """Whether adapters learn from it to answer chats of other people; see README.md."""
        return self.kind.startswith("plain") and "hard" not in self.tags


def read(path: Path) -> Iterator[Written]:
    """Yields the chats of a file.

    Raises:
      ValueError: a line is none of a chat; with its number.
    """
    head: list[str] = []
    lines: list[tuple[str, str]] = []
    begin = 0
    for number, line in enumerate([*path.read_text().splitlines(), "## end"], 1):
        line = line.strip()
        if line.startswith("##"):
            if lines:
                if "C" not in {who for who, _ in lines}:
                    raise ValueError(f"{path}:{begin}: C says nothing")
                yield Written(path.stem, head[0], tuple(head[1:]), tuple(lines))
            head, lines, begin = line[2:].replace(",", " ").split(), [], number
            if head != ["end"] and (not head or head[0] not in TONES):
                raise ValueError(f"{path}:{number}: the head has no tone: {line!r}")
        elif found := _LINE.fullmatch(line):
            if found[2].count("{") != found[2].count("}"):
                raise ValueError(f"{path}:{number}: unbalanced braces")
            lines.append((found[1], found[2]))
        elif line:
            raise ValueError(f"{path}:{number}: neither a head nor a message: {line!r}")


def divided(written: Sequence[Written]) -> dict[str, list[Written]]:
    """Divides chats into those to learn from (`train`) and about a thirtieth (`eval`).

    By their text alone, so that a chat stays where it is when others are added.
    """
    parts: dict[str, list[Written]] = {"train": [], "eval": []}
    for chat in written:
        parts["eval" if int(chat.digest, 16) % 32 == 0 else "train"].append(chat)
    return parts


def variants(written: Written, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields different chats made of a written one, at most `count`."""
    made = set()
    for number in range(count):
        texts = [_WORDINGS.sub(lambda m: rng.choice(m[1].split("|")), t) for _, t in written.lines]
        typed = _typing(rng)
        texts = [typed(text) for text in texts]
        if tuple(texts) in made:
            continue
        made.add(tuple(texts))
        names = _names({who for who, _ in written.lines}, rng)
        yield {
            "chat_id": f"{written.kind}-{written.digest[:8]}-{number}",
            "user_id": names["C"],
            "messages": [
                {"user_id": names[who], "text": text}
                for (who, _), text in zip(written.lines, texts, strict=True)
            ],
            "sentiment": TONES[written.tone],
            "source": written.kind,
        }


def _names(speakers: set[str], rng: random.Random) -> dict[str, str]:
    """Names, numbered users or mere roles."""
    letters = sorted(speakers)
    style = rng.random()
    if style < 0.5:
        chosen = rng.sample(_NAMES, len(letters))
    else:
        kind = rng.choice(("user_", "user_", "u", "guest-", "customer "))
        chosen = [f"{kind}{number}" for number in rng.sample(range(1, 1000), len(letters))]
    names = dict(zip(letters, chosen, strict=True))
    if "A" in names and rng.random() < 0.7:
        names["A"] = rng.choice(_SERVES)
    return names


def _typing(rng: random.Random) -> Any:
    """Returns how somebody types: mostly as it was written."""
    style = rng.random()
    if style < 0.1:
        return str.lower
    if style < 0.18:
        return lambda text: text.rstrip(".")
    if style < 0.24:
        return lambda text: text.replace("'", "").replace(",", "")
    if style < 0.32:
        return lambda text: _mistyped(text, rng)
    return str


def _mistyped(text: str, rng: random.Random) -> str:
    """Swaps two letters of longer words."""
    words = text.split(" ")
    for at in rng.sample(range(len(words)), min(len(words) // 8 + 1, len(words))):
        word = words[at]
        if len(word) > 4 and word.isalpha():
            swap = rng.randrange(1, len(word) - 2)
            words[at] = word[:swap] + word[swap + 1] + word[swap] + word[swap + 2 :]
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="", help="a file; default: standard output")
    parser.add_argument("--variants", type=int, default=2, help="of each chat (default: 2)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--all", action="store_true", help="also the subtle ones, and those with the tag hard"
    )
    parser.add_argument(
        "--part",
        choices=("train", "eval"),
        default="train",
        help="eval: those that are never learned from, all of them, once (default: train)",
    )
    parsed = parser.parse_args(arguments)
    written = divided([chat for path in sorted(CHATS.glob("*.txt")) for chat in read(path)])
    chats = written[parsed.part]
    if parsed.part == "train":
        chats = [chat for chat in chats if parsed.all or chat.is_plain]
        rng = random.Random(parsed.seed)
        made = [chat for each in chats for chat in variants(each, parsed.variants, rng)]
        rng.shuffle(made)
    else:  # each on its own, so that none changes when others are added
        chats.sort(key=lambda chat: chat.digest)
        made = [chat for each in chats for chat in variants(each, 1, random.Random(each.digest))]
    text = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in made)
    if parsed.output:
        Path(parsed.output).write_text(text)
    else:
        sys.stdout.write(text)
    tones = collections.Counter(chat.tone for chat in chats)
    tags = collections.Counter(tag for chat in chats for tag in chat.tags)
    print(
        f"{len(made)} chats of {len(chats)} written ones: {dict(tones)}; {dict(tags)}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
