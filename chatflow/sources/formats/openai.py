"""Reads conversations in the form of OpenAI's API: `messages` with a role and a content.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chatflow.sources.formats.common import Ours, Value, dicts, own_id, without_none

_LISTS = ("messages", "traj")


def fits(value: Value) -> bool:
    return any(
        "role" in first and "content" in first and "text" not in first
        for name in _LISTS
        if (first := next(dicts(value.get(name)), None)) is not None
    )


def read(value: Value, name: str) -> Iterator[Ours]:
    listed = next(value[key] for key in _LISTS if next(dicts(value.get(key)), None) is not None)
    kept = ("user_id", "attributes", "revision")  # fields of chatflow's own chats
    yield {
        **{key: value[key] for key in kept if key in value},
        "chat_id": own_id(value, "chat_id", "id", "conversation_id", "task_id"),
        "messages": [_message(message) for message in dicts(listed)],
    }


def _message(message: Value) -> Ours:
    role = message.get("role")
    return without_none(
        message_id=message.get("id"),
        user_id=message.get("name") or role,
        role=role,
        text=_text(message),
        sent_at=message.get("created_at") or message.get("timestamp"),
    )


def _text(message: Value) -> str:
    content: Any = message.get("content")
    if isinstance(content, list):
        texts = (str(item.get("text") or "") for item in dicts(content))
        return "\n".join(text for text in texts if text)
    return content if isinstance(content, str) else ""
