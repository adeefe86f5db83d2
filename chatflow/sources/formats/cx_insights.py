"""Conversations of Google's CX Insights (CCAI Insights), one a file.

https://cloud.google.com/contact-center/insights/docs/conversation-data-format
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
