"""Shows characters that a reader cannot see, and that change what others look like."""

from __future__ import annotations

import re

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u180e\u200b\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
"""Controls of text direction, blanks without width and others; not what scripts and emojis need."""


def visible(text: str | None) -> str | None:
    """Returns a text with the code points of invisible characters in their place."""
    return None if text is None else _INVISIBLE.sub(lambda found: f"⟨{code(found[0])}⟩", text)


def controls_in(text: str | None) -> list[str]:
    """Returns the code points of a text's invisible characters."""
    return sorted({code(found) for found in _INVISIBLE.findall(text or "")})


def code(character: str) -> str:
    return f"U+{ord(character):04X}"
