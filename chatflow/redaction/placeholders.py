"""Placeholders such as `[EMAIL_1]`: what stands in a text for something that was redacted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PLACEHOLDER = re.compile(r"\[([A-Z][A-Z0-9_]{1,60})_(\d{1,9})\]")
"""A placeholder: its kind in capital letters, and its number in the chat, from 1."""


def fill(text: str, values: Mapping[str, str]) -> str:
    """Returns a text with what its placeholders stand for; those not in `values` stay."""
    return PLACEHOLDER.sub(lambda found: values.get(found[0], found[0]), text)


def hide(text: str, values: Mapping[str, str]) -> str:
    """Returns a text with the placeholders of what `values` holds: the opposite of `fill`."""
    for placeholder, value in sorted(values.items(), key=lambda pair: -len(pair[1])):
        if value:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", placeholder, text)
    return text


def like_placeholders(text: str, known: Iterable[str]) -> list[str]:
    """Returns what a text has that looks like one of the known placeholders, or is one.

    That is also `[Email_1]`, `[EMAIL 1]` or `EMAIL_1`, as models and people may write it.
    """
    kinds = sorted({found[1] for one in known if (found := PLACEHOLDER.fullmatch(one))})
    if not kinds:
        return []
    any_of = "|".join(map(re.escape, kinds))
    like = rf"\[\s*(?:{any_of})[ _-]?\d+\s*\]|\b(?:{any_of})_\d+\b"
    return list(dict.fromkeys(found[0] for found in re.finditer(like, text, re.IGNORECASE)))


def placeholders_in(text: str) -> list[str]:
    """Returns the placeholders of a text, each once."""
    return list(dict.fromkeys(found[0] for found in PLACEHOLDER.finditer(text)))
