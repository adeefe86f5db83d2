"""Recognises messages that are only for staff, by the fields that help desks use for this."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

PRIVATE_KINDS = frozenset(
    "note private private_note internal internal_note internal_comment internal_only whisper "
    "agent_only agents_only staff_only admin_note".split()
)
_PRIVATE = frozenset(
    "private isprivate privatenote isprivatenote internal isinternal internalnote isinternalnote "
    "internalonly isnote staffonly agentonly agentsonly".split()
)
_PUBLIC = frozenset("public ispublic published ispublished visibletocustomer".split())
_KINDS = frozenset(
    "type parttype messagetype notetype commenttype kind visibility privacy scope audience "
    "role".split()
)
TRUE, FALSE = ("true", "1", "yes", "t", "y", "on"), ("false", "0", "no", "f", "n", "off")
"""How systems write booleans in texts; PostgreSQL's exports have t and f."""


def is_private(value: Mapping[str, Any]) -> bool:
    """Returns whether a message is only for staff, by the fields of many help desks.

    These are Chatwoot's and Freshdesk's `private`, Zendesk's `public`, Front's `is_internal`,
    Intercom's `part_type` "note", and similar ones, on the message or in its attributes.
    """
    beside = value.get("attributes")
    for fields in (value, beside if isinstance(beside, dict) else {}):
        for key, found in fields.items():
            means = _meaning(key) if isinstance(key, str) and len(key) < 100 else ""
            if not means or found is None:
                continue
            if means == "kind":
                if word(found) in PRIVATE_KINDS:
                    return True
            elif _yes_or_no(found) in (TRUE if means == "private" else FALSE):
                return True
    return False


def tells_privacy(name: str) -> bool:
    """Returns whether a field of this name says if a message is only for staff."""
    return _meaning(name) in ("private", "public")


def may_mark(name: str) -> bool:
    """Returns whether `is_private` looks at a field of this name."""
    return name == "attributes" or bool(_meaning(name))


def _yes_or_no(value: Any) -> str:
    return str(value)[:10].strip().casefold().removesuffix(".0")  # from a column with gaps


@functools.lru_cache(maxsize=1000)
def _meaning(key: str) -> str:
    """Returns what a field's name says about privacy: `private`, `public`, `kind` or ""."""
    name = re.sub(r"[\W_]+", "", key.casefold())
    if name in _PRIVATE:
        return "private"
    if name in _PUBLIC:
        return "public"
    return "kind" if name in _KINDS else ""


def word(value: Any) -> str:
    """Returns a short text in lower case with underscores, to compare roles and kinds."""
    return _word(value) if isinstance(value, str) and len(value) < 100 else ""


@functools.lru_cache(maxsize=1000)
def _word(text: str) -> str:
    return re.sub(r"[\s-]+", "_", text.strip().casefold())
