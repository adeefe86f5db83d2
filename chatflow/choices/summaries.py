"""Composes a chat's summary from its own sentences: the matter, the answer, the ending."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chatflow.choices.sentences import (
    AGENT,
    BOT,
    CORRECTION,
    CUSTOMER,
    FILLER,
    JUNK,
    MONEY,
    WHEN,
    Sentence,
    content_words,
)

NONE, MATTER, ANSWER, ENDING = range(4)
"""What a sentence is for a summary; the columns of their probabilities."""


LONG = 24
"""Messages from which a chat is long."""


class Quoted(NamedTuple):
    """Sentences of one message that a summary quotes, as indices into the chat's sentences."""

    message: int
    sentences: tuple[int, ...]


def composed(
    sentences: Sequence[Sentence],
    parts: np.ndarray,
    limit: int,
    opening: str = "",
    names: Mapping[str, str] | None = None,
) -> tuple[str, tuple[Quoted, ...]]:
    """Returns a summary of at most `limit` characters, and what it quotes; "" without sentences.

    Args:
      parts: the probabilities of `NONE`, `MATTER`, `ANSWER` and `ENDING`, `[sentences, 4]`.
      opening: a sentence before the quotations, "Solved."
      names: of the speakers, in the chat's language.
    """
    if not sentences:
        return "", ()
    chosen = chosen_sentences(sentences, parts, limit - len(opening) - 1)
    quoted = _by_message(sentences, chosen)
    text = _text(sentences, quoted, opening, names or {})
    while len(text) > limit and len(chosen) > 1:
        weakest = min(chosen[1:], key=lambda at: 1 - parts[at, NONE])
        chosen = [at for at in chosen if at != weakest]
        quoted = _by_message(sentences, chosen)
        text = _text(sentences, quoted, opening, names or {})
    if len(text) > limit:  # one sentence alone is too long
        cut = text[: limit - 2].rsplit(" ", 1)[0].rstrip(" ,;:")
        text = f"{cut}…”"
    return text, quoted


def chosen_sentences(sentences: Sequence[Sentence], parts: np.ndarray, limit: int) -> list[int]:
    """Returns which sentences to quote, in the order of the chat."""
    worth = 1 - parts[:, NONE].astype(float)
    usable = np.array([_usable(s) for s in sentences])
    if not usable.any():
        usable[:] = True
    worth = np.where(usable, worth, -1.0)
    cost = [_cost(s) for s in sentences]
    chosen: list[int] = []
    used = 0

    def add(at: int) -> bool:
        nonlocal used
        together = [a for a in _with_needed(at, sentences, parts, usable) if a not in chosen]
        price = sum(cost[a] for a in together)
        if not together or used + price > limit:
            if used + cost[at] > limit or at in chosen:
                return False
            together, price = [at], cost[at]
        chosen.extend(together)
        used += price
        return True

    columns = np.where(usable[:, None], parts, -1.0)
    first = int(np.argmax(columns[:, MATTER]))
    if not add(first):
        return [first]
    for part in (ENDING, ANSWER):
        best = int(np.argmax(columns[:, part]))
        if columns[best, part] > 0.25:
            add(best)
    if sentences[-1].message - sentences[0].message >= LONG:
        # Late sentences tell how a long chat stands; earlier ones may no longer be true.
        late = [at for at, s in enumerate(sentences) if 5 * s.message >= 4 * sentences[-1].message]
        said = [at for at in late if sentences[at].speaker != CUSTOMER and worth[at] > 0.1]
        if said:
            add(max(said, key=lambda at: worth[at]))
        places = np.array([s.message for s in sentences]) / max(1, sentences[-1].message)
        worth = np.where(worth > 0, worth * (0.75 + 0.4 * places), worth)
    for at in np.argsort(-worth, kind="stable"):
        if worth[at] < (0.22 if len(chosen) >= 2 else 0.0) or len(chosen) >= 8:
            break
        add(int(at))
    return sorted(set(_corrected(chosen, sentences, parts, usable, limit)))


def _cost(sentence: Sentence) -> int:
    return len(sentence.text) + 5


def _usable(sentence: Sentence) -> bool:
    """Returns whether a sentence says something: not a footer, a bare greeting or filler."""
    text = sentence.text
    if JUNK.search(text) or len(text) > 420:
        return False
    words = content_words(text)
    if FILLER.search(text) and len(words) < 9 and not MONEY.search(text):
        return sentence.speaker == CUSTOMER and len(words) > 3
    return bool(words) or "?" in text or sentence.speaker == CUSTOMER


_DEPENDENT = re.compile(
    r"^(?:it|its|it['’]s|this|that|that['’]s|they|he|she|them|which|because|those|these|same|neither|"
    r"both|and|but|so|or|then|also|still|again)\b",
    re.IGNORECASE,
)


def _with_needed(
    at: int, sentences: Sequence[Sentence], parts: np.ndarray, usable: np.ndarray
) -> list[int]:
    """Returns a sentence with the one before it in its message, if it depends on that one.

    A short answer comes with its question.
    """
    sentence = sentences[at]
    needed = [at]
    before = at - 1
    if (
        sentence.number
        and before >= 0
        and usable[before]
        and _DEPENDENT.match(sentence.text)
        and parts[before, NONE] < 0.93
    ):
        needed.insert(0, before)
    asks = max((i for i in range(at) if sentences[i].message < sentence.message), default=None)
    if (
        asks is not None
        and sentence.number == 0
        and sentences[asks].message == sentence.message - 1
        and sentences[asks].text.endswith("?")
        and len(content_words(sentence.text)) <= 2
        and usable[asks]
    ):
        needed.insert(0, asks)
    return needed


def _corrected(
    chosen: list[int],
    sentences: Sequence[Sentence],
    parts: np.ndarray,
    usable: np.ndarray,
    limit: int,
) -> list[int]:
    """Replaces a sentence that a later one takes back, or adds the later one to it."""
    kept = list(chosen)
    for at in sorted(chosen):
        later = taken_back_by(at, sentences, parts, usable)
        if later is None or later in kept:
            continue
        without = [a for a in kept if a != at]
        price = sum(_cost(sentences[a]) for a in without) + _cost(sentences[later])
        if sentences[at].speaker == CUSTOMER and price + _cost(sentences[at]) <= limit:
            kept.append(later)  # what the customer came with stays
        elif price <= limit:
            kept = [*without, later]
        else:
            kept = without or kept
    return kept


def taken_back_by(
    at: int, sentences: Sequence[Sentence], parts: np.ndarray, usable: np.ndarray
) -> int | None:
    """Returns the later sentence that changes a date or an amount of this one, or None."""
    mine = figures(sentences[at].text)
    if not mine:
        return None
    about = set(content_words(sentences[at].text)) - set().union(*mine.values())
    found: list[tuple[float, int]] = []
    for later in range(at + 1, len(sentences)):
        other = sentences[later]
        if other.message == sentences[at].message or other.speaker == BOT or not usable[later]:
            continue
        theirs = figures(other.text)
        same = [kind for kind in mine if kind in theirs]
        if not same or any(mine[kind] & theirs[kind] for kind in same):
            continue
        cue = bool(CORRECTION.search(other.text))
        shared = bool(about & set(content_words(other.text)))
        by_them = other.speaker in (AGENT, sentences[at].speaker)
        if (cue and (shared or by_them)) or (shared and parts[later, NONE] < 0.6):
            found.append((1 - float(parts[later, NONE]) + 0.2 * cue + 0.02 * later, later))
    return max(found)[1] if found else None


_AMOUNT = re.compile(r"(?:[£$€¥₹]\s?)?(\d[\d,]*(?:[.,]\d\d)?)(?:\s?[£$€¥₹])?")


def figures(text: str) -> dict[str, set[str]]:
    """Returns the dates, times and amounts of a text, by kind."""
    found: dict[str, set[str]] = {}
    for match in WHEN.finditer(text):
        word = match[0].lower()
        if word == "may" and match[0] != "May":
            continue
        kind = "time" if re.search(r"\d[:.]\d\d|am\b|pm\b|uhr|clock|\dh", word) else "day"
        found.setdefault(kind, set()).add(re.sub(r"\s", "", word)[:3] if word.isalpha() else word)
    if MONEY.search(text):
        amounts = {m[1].rstrip(".,") for m in _AMOUNT.finditer(text)}
        found["amount"] = {amount.removesuffix(".00") for amount in amounts}
    return found


def _by_message(sentences: Sequence[Sentence], chosen: Sequence[int]) -> tuple[Quoted, ...]:
    groups: dict[int, list[int]] = {}
    for at in sorted(chosen):
        groups.setdefault(sentences[at].message, []).append(at)
    return tuple(Quoted(message, tuple(some)) for message, some in groups.items())


def _text(
    sentences: Sequence[Sentence],
    quoted: Sequence[Quoted],
    opening: str,
    names: Mapping[str, str],
) -> str:
    parts = [opening] if opening else []
    said_by = ""
    for quote in quoted:
        words = ""
        for at in quote.sentences:
            text = " ".join(sentences[at].text.split()).replace("“", '"').replace("”", '"')
            if words:
                words += " " if at - 1 in quote.sentences else " … "
            words += text
        speaker = sentences[quote.sentences[0]].speaker
        who = names.get(speaker, speaker)
        parts.append(f"“{words}”" if who == said_by else f"{who}: “{words}”")
        said_by = who
    return " ".join(parts)
