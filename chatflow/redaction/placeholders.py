"""Placeholders such as `[EMAIL_1]`: what stands in a text for something that was redacted."""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def placeholders_in(text: str) -> list[str]:
    """Returns the placeholders of a text, each once."""
    return list(dict.fromkeys(found[0] for found in PLACEHOLDER.finditer(text)))
