"""Reads ShareGPT's `conversations`, in which `from` says who spoke, and `value` what."""

from __future__ import annotations

from collections.abc import Iterator

from chatflow.sources.formats.common import Ours, Value, dicts, own_id


def fits(value: Value) -> bool:
    first = next(dicts(value.get("conversations")), None)
    return first is not None and "from" in first and "value" in first


def read(value: Value, name: str) -> Iterator[Ours]:
    yield {
        "chat_id": own_id(value, "id", "conversation_id"),
        "messages": [
            {"user_id": turn.get("from"), "role": turn.get("from"), "text": turn.get("value")}
            for turn in dicts(value["conversations"])
        ],
    }
