"""Reads WhatsApp's "Export chat": a text of one chat, with dates as the phone writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from typing import NamedTuple

from chatflow.sources.formats.common import Ours

TITLE = "a chat of WhatsApp"

_MARKS = re.compile("[\u200e\u200f\u202a-\u202e\ufeff]")
_LINE = re.compile(
    r"\[?(?P<a>\d{1,4})[./-](?P<b>\d{1,2})[./-](?P<c>\d{2,4}),?\s+"
    r"(?P<hour>\d{1,2})[:.](?P<minute>\d{2})(?:[:.](?P<second>\d{2}))?"
    r"\s*(?P<half>[AaPp]\.?\s?[Mm]\.?)?(?:\]\s*|\s+-\s+)(?P<rest>.*)",
    re.DOTALL,
)


class _Line(NamedTuple):
    numbers: tuple[int, int, int]
    clock: time
    author: str
    texts: list[str]


def fits(head: str) -> bool:
    """Returns whether a file begins like an export; `head` is its first lines."""
    lines = [line for line in head.splitlines()[:20] if line.strip()]
    matching = [line for line in lines if _LINE.fullmatch(_MARKS.sub("", line).strip())]
    return bool(lines) and len(matching) * 2 > len(lines) and bool(_LINE.match(_plain(lines[0])))


def _plain(line: str) -> str:
    return _MARKS.sub("", line).strip("\r\n")


def read(lines: Iterable[str], name: str) -> Iterator[Ours]:
    """Yields the chat. Times are left out if the dates fit several orders of day and month.

    Nobody in it has a role, so the first author counts as the customer.
    """
    found: list[_Line] = []
    for line in map(_plain, lines):
        if (begins := _LINE.fullmatch(line)) and (parsed := _parsed(begins)):
            found.append(parsed)
        elif found and line.strip():  # a message of several lines
            found[-1].texts.append(line)
    order = _order([line.numbers for line in found])
    messages = []
    for one in found:
        message: Ours = {"user_id": one.author or "system", "text": "\n".join(one.texts)}
        if not one.author:  # "Messages and calls are end-to-end encrypted."
            message["role"] = "system"
        if order and (day := _date(order, one.numbers)):
            message["sent_at"] = datetime.combine(day, one.clock).isoformat()
        messages.append(message)
    folder, slash, last = name.rpartition("/")
    last = re.sub(r"^WhatsApp Chat (?:with|-) |^_chat$", "", last).strip() or "whatsapp"
    yield {
        "chat_id": f"{folder}{slash}{last}",
        "messages": messages,
        "attributes": {"channel": "whatsapp"},
    }


def _parsed(found: re.Match[str]) -> _Line | None:
    hour = int(found["hour"])
    if found["half"]:
        hour = hour % 12 + (12 if found["half"][0] in "pP" else 0)
    author, colon, text = found["rest"].partition(": ")
    if not colon or len(author) > 100:
        author, text = "", found["rest"]
    numbers = (int(found["a"]), int(found["b"]), int(found["c"]))
    try:
        clock = time(hour, int(found["minute"]), int(found["second"] or 0))
    except ValueError:  # not a time, so not a new message
        return None
    return _Line(numbers, clock, author, [text])


def _order(dates: list[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """Returns the positions of year, month and day, if only one order fits all dates."""
    fitting = [
        order
        for order in ((0, 1, 2), (2, 1, 0), (2, 0, 1))
        if all(_date(order, numbers) for numbers in dates)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _date(order: tuple[int, int, int], numbers: tuple[int, int, int]) -> date | None:
    """Returns the date that numbers mean in an order, or None if they cannot be a date."""
    year, month, day = (numbers[at] for at in order)
    if order[0] == 0 and year <= 31:  # a year at the front has four digits
        return None
    try:
        return date(year + (2000 if year < 100 else 0), month, day)
    except ValueError:
        return None
