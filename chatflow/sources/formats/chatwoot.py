"""Reads Chatwoot's webhooks, and its conversations with their messages.

https://www.chatwoot.com/hc/user-guide/articles/1677693021-how-to-use-webhooks
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
    without_none,
)

_ROLES = {
    0: "incoming", 1: "outgoing", 2: "activity", 3: "bot",
    "incoming": "incoming", "outgoing": "outgoing", "activity": "activity", "template": "bot",
}  # fmt: skip

_CLOSES = ("conversation_status_changed", "conversation_resolved")


def fits(value: Value) -> bool:
    event = value.get("event")
    if isinstance(event, str) and event.startswith(("message_", "conversation_")):
        return "conversation" in value or "inbox_id" in value or "account" in value
    first = next(dicts(value.get("messages") or value.get("payload")), None)
    return first is not None and "content" in first and "message_type" in first


def read(value: Value, name: str) -> Iterator[Ours]:
    event = value.get("event")
    if event is None:
        yield _chat(value, name)
    elif event == "message_created":
        conversation = part(value.get("conversation"))
        channel = conversation.get("channel")
        yield {
            "chat_id": own_id(conversation, "id"),
            **_message(value),
            "attributes": attributes(channel=channel, inbox=part(value.get("inbox")).get("name")),
        }
    elif event in _CLOSES and value.get("status") in ("resolved", 1):
        yield {"chat_id": own_id(value, "id"), "event": "closed"}
    # Other events are not needed, e.g. of an updated message or a new conversation.


def _chat(value: Value, name: str) -> Ours:
    messages = [*dicts(value.get("messages") or value.get("payload"))]
    meta = part(value.get("meta"))
    first = messages[0].get("conversation_id")
    return {
        "chat_id": own_id({**value, "conversation_id": first}, "id", "conversation_id", name=name),
        "messages": [_message(message) for message in messages],
        "attributes": attributes(
            status=value.get("status"), channel=meta.get("channel"), labels=value.get("labels")
        ),
    }


def _message(message: Value) -> Ours:
    sender = part(message.get("sender"))
    role = _ROLES.get(message.get("message_type") or 0, "incoming")
    # Newer versions do not say in webhooks that a sender is a contact.
    kind = str(sender.get("type") or ("contact" if role == "incoming" else "")).lower()
    if kind == "agent_bot":
        role = "bot"
    return without_none(
        message_id=message.get("id"),
        user_id=f"{kind}-{sender['id']}" if kind and sender.get("id") else sender.get("id") or role,
        role=role,
        text=message.get("content") or "",
        sent_at=message.get("created_at"),
        private=True if message.get("private") else None,
    )
