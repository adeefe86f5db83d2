"""Reads and writes conversations of Google's CX Insights (CCAI Insights), one per file.

https://cloud.google.com/contact-center/insights/docs/conversation-data-format
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from chatflow.records import EPOCH, Chat
from chatflow.sources.formats.common import (
    Ours,
    Value,
    attributes,
    dicts,
    own_id,
    part,
    since_1970,
    without_none,
)


def fits(value: Value) -> bool:
    first: Any = next(dicts(value.get("entries")), None)
    return first is not None and "text" in first and ("role" in first or "user_id" in first)


def read(value: Value, name: str) -> Iterator[Ours]:
    categories = dicts(part(value.get("conversation_info")).get("categories"))
    yield {
        "chat_id": own_id(value, "conversation_id", "name", name=name),
        "messages": [
            without_none(
                user_id=entry.get("user_id"),
                role=entry.get("role"),
                text=entry.get("text"),
                sent_at=since_1970(entry.get("start_timestamp_usec"), 1e6),
            )
            for entry in dicts(value["entries"])
        ],
        "attributes": attributes(
            categories=[category.get("display_name") for category in categories],
            agent=value.get("agent_id"),
        ),
    }


ROLES = {"customer": "CUSTOMER", "agent": "AGENT", "bot": "AUTOMATED_AGENT"}
"""Google's word for each of our roles."""


def write(chat: Chat) -> Value | None:
    """Returns what was said in a chat in this format; None if nothing was said.

    The format requires a number for each participant and a time for each message. A user id that is
    not a number becomes its hash, the same in all chats. A message without a time gets its position
    in the chat, in seconds since 1970, as in Google's example; `read` treats that as no time. A
    user without a known role is a customer if the chat asks for their tone, else an agent.
    """
    customers = chat.users()
    entries = [
        {
            "text": message.text,
            "user_id": _number(message.user_id),
            "role": ROLES.get(message.role or "")
            or ("CUSTOMER" if message.user_id in customers else "AGENT"),
            "start_timestamp_usec": (message.sent_at - EPOCH) // timedelta(microseconds=1)
            if message.sent_at
            else place * 1_000_000,
        }
        for place, message in enumerate(chat.said, 1)
    ]
    names = filter(None, chat.attributes.get("categories", "").split(", "))
    categories = [{"display_name": name} for name in names]
    made = without_none(
        conversation_id=chat.chat_id,
        conversation_info={"categories": categories} if categories else None,
        agent_id=chat.attributes.get("agent"),
        entries=entries,
    )
    return made if entries else None


_LARGEST = 1 << 52
"""Smaller numbers stay as ids; twice this is the largest number that all JSON readers keep."""


def _number(user_id: str) -> int:
    number = int(user_id) if re.fullmatch(r"0|[1-9][0-9]{,15}", user_id) else _LARGEST
    if number < _LARGEST:
        return number
    return _LARGEST + int(hashlib.sha256(user_id.encode()).hexdigest()[:13], 16)


def file_name(chat_id: str) -> str:
    """Returns the name of a chat's file: its id, or a hash if the id cannot be a file name."""
    name = urllib.parse.quote(chat_id, safe=" @+=,")
    if name.startswith(".") or name == "manifest" or len(name) > 200:
        name = hashlib.sha256(chat_id.encode()).hexdigest()[:32]
    return f"{name}.json"
