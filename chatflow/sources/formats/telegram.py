"""Reads Telegram's `result.json`: one chat, or all chats of an account.

https://core.telegram.org/import-export
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chatflow.sources.formats.common import Ours, Value, attributes, dicts, own_id, part


def fits(value: Value) -> bool:
    if any("messages" in chat for chat in _listed(value)):
        return True
    first: Any = next(dicts(value.get("messages")), None)
    return (
        first is not None
        and first.get("type") in ("message", "service")
        and ("from_id" in first or "actor_id" in first)
    )


def read(value: Value, name: str) -> Iterator[Ours]:
    for chat in _listed(value) or [value]:
        yield {
            "chat_id": own_id(chat, "id", "name", name=name),
            "messages": [_message(message) for message in dicts(chat.get("messages"))],
            "attributes": attributes(name=chat.get("name"), channel="telegram"),
        }


def _listed(value: Value) -> list[Value]:
    """Returns the chats of an account, including those that it has left."""
    return [
        chat for key in ("chats", "left_chats") for chat in dicts(part(value.get(key)).get("list"))
    ]


def _message(message: Value) -> Ours:
    author = message.get("from_id") or message.get("actor_id") or message.get("from") or "deleted"
    found: Ours = {"user_id": author, "text": _text(message)}
    if message.get("type") == "service":
        found["role"] = "service"
        found["text"] = found["text"] or str(message.get("action") or "service")
    if message.get("id") is not None:
        found["message_id"] = message["id"]
    if at := message.get("date_unixtime") or message.get("date"):
        found["sent_at"] = at
    return found


def _text(message: Value) -> str:
    """Returns the text; links and bold words are separate parts of it."""
    text = message.get("text")
    pieces = text if isinstance(text, list) else [text]
    words = (str(one.get("text") or "") if isinstance(one, dict) else one for one in pieces)
    said = "".join(word for word in words if isinstance(word, str))
    return said or ("[attachment]" if "file" in message or "photo" in message else "")
