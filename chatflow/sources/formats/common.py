"""Reads ids, times and attributes of objects whose fields may be missing; shared by all formats."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatflow.errors import UsageError

Value = Mapping[str, Any]
Ours = dict[str, Any]
"""A chat or an event as in chatflow's own JSON; see `sources.chats`."""

_FIRST_YEAR = 31_536_000  # seconds: 1971; a smaller number is an offset, not a time


COMPRESSIONS = {"gz": "gzip", "bz2": "bzip2", "xz": "xz"}
"""Compressions by the ending of a file's name."""
COMPRESSED = rf"(?:\.(?:{'|'.join(COMPRESSIONS)}))?"
"""A pattern for these endings, or none."""

_ENDING = re.compile(rf"\.(?:json|txt|zip){COMPRESSED}$", re.IGNORECASE)

WINDOWS = "chatflow.windows"
"""The name of an error handler that decodes bytes that are not UTF-8 as cp1252, like Windows."""


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(WINDOWS, _as_windows)


def pairs_of(
    flag: str, given: str, form: str, known: Sequence[str], last: bool = False
) -> Iterator[tuple[str, str]]:
    """Yields the pairs of a flag like `--columns=FIELD=COLUMN,…`, the known word first.

    Args:
      form: e.g. "FIELD=COLUMN", for the message.
      known: the words that each pair may begin with, or with `last`, end with.

    Raises `UsageError`.
    """
    for pair in filter(None, map(str.strip, given.split(","))):
        words = pair.rpartition("=") if last else pair.partition("=")
        ours, theirs = (words[2 if last else 0].strip(), words[0 if last else 2].strip())
        if ours not in known or not theirs:
            name = form.split("=")[-1 if last else 0]
            raise UsageError(
                f"{flag}: {pair!r} must be {form}, with {name} one of {', '.join(known)}"
            )
        yield ours, theirs


def name_in(path: str) -> str:
    """Returns the name of a file without its ending."""
    return _ENDING.sub("", path.rpartition("/")[2])


_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


def as_line(value: Any) -> bytes:
    """Returns a value as JSON; values of types that JSON does not have become texts."""
    return _encode(value).encode("utf-8", "replace")


def dicts(value: Any) -> Iterator[Value]:
    """Yields the objects of a list and skips everything else."""
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def part(value: Any) -> Value:
    """Returns the value if it is an object, else an empty object."""
    return value if isinstance(value, dict) else {}


def own_id(value: Value, *names: str, name: str = "") -> str:
    """Returns the first id that is set; else the file's name; else a hash of the content."""
    for key in names:
        found = value.get(key)
        if isinstance(found, (str, int)) and not isinstance(found, bool) and found != "":
            return str(found)
    if name:
        return name
    text = json.dumps(value, sort_keys=True, default=str)
    return f"chat-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def since_1970(value: Any, unit: float = 1.0) -> float | None:
    """Returns seconds since 1970; None if it is not a number, or an offset in a recording."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value / unit if value / unit >= _FIRST_YEAR else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def attributes(**values: Any) -> dict[str, str]:
    """Returns the values that are set as attributes: texts, numbers, and lists of them."""
    found = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = ", ".join(str(item) for item in value if isinstance(item, (str, int)))
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "":
            found[key] = str(value)
    return found


def without_none(**fields: Any) -> Ours:
    return {key: value for key, value in fields.items() if value is not None}
