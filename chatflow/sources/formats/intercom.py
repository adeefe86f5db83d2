"""Reads conversations of Intercom with their parts, and lists of them.

https://developers.intercom.com/docs/references/rest-api/api.intercom.io/conversations
"""

from __future__ import annotations

from collections.abc import Iterator

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

_SAID = ("comment", "open", "close", "quick_reply", "away_mode_assignment", "message")


def fits(value: Value) -> bool:
    listed = next(dicts(value.get("conversations")), None)
    return _is_conversation(listed if listed is not None else value)


def _is_conversation(value: Value) -> bool:
    return "conversation_parts" in value and "author" in part(value.get("source"))


def read(value: Value, name: str) -> Iterator[Ours]:
    for one in [*dicts(value.get("conversations"))] or [value]:
        yield _chat(one)


def _chat(value: Value) -> Ours:
    source = part(value.get("source"))
    first = {**source, "part_type": "comment", "created_at": value.get("created_at")}
    parts = value.get("conversation_parts")
    parts = parts.get("conversation_parts") if isinstance(parts, dict) else parts
    rating = part(value.get("conversation_rating"))
    return {
        "chat_id": own_id(value, "id"),
        "messages": [_message(item) for item in (first, *dicts(parts)) if item.get("body")],
        "attributes": attributes(
            subject=source.get("subject"),
            source_url=source.get("url"),
            channel=source.get("type"),
            state=value.get("state"),
            rating=rating.get("rating"),
            tags=[tag.get("name") for tag in dicts(part(value.get("tags")).get("tags"))],
        ),
    }


def _message(item: Value) -> Ours:
    author = part(item.get("author"))
    kind = str(author.get("type") or "user")
    by_machine = author.get("from_ai_agent") or author.get("is_ai_answer")
    role = "bot" if by_machine else "agent" if kind == "team" else kind
    return without_none(
        message_id=item.get("id"),
        user_id=author.get("id") or kind,
        role=role,
        text=item.get("body"),
        sent_at=since_1970(item.get("created_at")),
        private=True if item.get("part_type") not in _SAID else None,
    )
