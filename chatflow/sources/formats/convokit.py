"""Reads corpora of ConvoKit: utterances in any order, and files about speakers and conversations.

https://convokit.cornell.edu/documentation/data_format.html
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from chatflow.errors import one_line
from chatflow.sources.formats.common import (
    Ours,
    Value,
    attributes,
    part,
    since_1970,
    without_none,
)
from chatflow.sources.formats.tables import grouping
from chatflow.sources.privacy import is_private

TITLE = "a corpus of ConvoKit"

UTTERANCES = ("utterances.jsonl", "utterances.json")
_CONVERSATIONS, _SPEAKERS = ("conversations.json",), ("speakers.json", "users.json")
BESIDE = (*_CONVERSATIONS, *_SPEAKERS, "corpus.json", "index.json")
"""Files in the folder of the utterances that contain no messages."""

_ROLES = ("role", "speaker_role", "author_role", "speaker_type", "user_type")


def fits(value: Any) -> bool:
    """Returns whether an object is an utterance; earlier versions used `root` and `user`."""
    value = part(value)
    return (
        {"id", "text"} <= value.keys()
        and not value.keys().isdisjoint(("speaker", "user"))
        and not value.keys().isdisjoint(("conversation_id", "root"))
        and value.keys().isdisjoint(("chat_id", "messages"))
    )


def without_beside(paths: Sequence[str]) -> list[str]:
    """Returns the files without those in `BESIDE` that have utterances in the same folder."""
    corpora = {path.rpartition("/")[0] for path in paths if _last(path) in UTTERANCES}
    return [
        path
        for path in paths
        if _last(path) not in BESIDE or path.rpartition("/")[0] not in corpora
    ]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def read(
    lines: Iterable[tuple[int, bytes]], beside: Callable[[str], Iterator[tuple[str, Any]]]
) -> Iterator[tuple[int, Ours]]:
    """Yields the conversations, each with the number of its first utterance.

    An utterance that cannot be read is yielded unchanged, at once, so that it becomes a dead
    letter.

    Args:
      lines: the utterances, each with its number.
      beside: yields the names and values of a file in the same folder; nothing if it is missing.

    Raises the first error of a file in the same folder, after all conversations.
    """
    fault = None
    with grouping() as groups:
        for kind, names in (("conversation", _CONVERSATIONS), ("speaker", _SPEAKERS)):
            for name in names:
                try:
                    for key, value in beside(name):
                        known = part(value)
                        meta = part(known["meta"]) if "meta" in known else known
                        groups.note(kind, key, attributes(**meta))
                except Exception as error:  # damaged, or not JSON
                    fault = fault or ValueError(f"{name}: {one_line(error)}")
        for number, line in lines:
            value, key, wrong = _utterance(line)
            if wrong:
                yield number, {"chat_id": None, "row": value, "error": wrong}
            else:
                groups.add(number, key, _message(value), {})
        for first, chat in groups.chats():
            roles = {
                author: _role(groups.noted("speaker", author))
                for author in {message["user_id"] for message in chat["messages"]}
            }
            for message in chat["messages"]:
                if "role" not in message and (role := roles[message["user_id"]]):
                    message["role"] = role
            chat["messages"] = _in_order(chat["messages"])
            chat["attributes"] = groups.noted("conversation", chat["chat_id"])
            yield first, chat
    if fault is not None:
        raise fault


def _utterance(line: bytes) -> tuple[Value, str, str]:
    """Returns an utterance, the id of its conversation, and what is wrong with it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"line": line.decode("utf-8", "replace")}, "", one_line(error)
    if not isinstance(value, dict):
        return {"line": value}, "", "it is not an object"
    for name in ("conversation_id", "root"):
        found = value.get(name)
        if isinstance(found, (str, int)) and not isinstance(found, bool) and found != "":
            return value, str(found), ""
    return value, "", "there is no conversation_id"


def _message(value: Value) -> Ours:
    meta = part(value.get("meta"))
    speaker = value.get("speaker", value.get("user"))
    return without_none(
        message_id=value.get("id"),
        user_id="unknown" if speaker is None or speaker == "" else str(speaker),
        role=_role(meta),
        text=value.get("text"),
        sent_at=_time(value.get("timestamp")),
        private=True if is_private(value) or is_private(meta) else None,
        attributes=attributes(**meta) or None,
        reply_to=value.get("reply_to", value.get("reply-to")),
    )


def _role(meta: Value) -> str | None:
    return next((str(meta[name]) for name in _ROLES if isinstance(meta.get(name), str)), None)


def _time(value: Any) -> Any:
    """Returns a time; None for "None", and for seconds since the start of a recording."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return since_1970(float(value))
    return value if isinstance(value, str) and value[:4].isdecimal() else None


def _in_order(messages: list[Ours]) -> list[Ours]:
    """Returns messages; if they have no times, each after the message that it replies to."""
    if any("sent_at" in message for message in messages):
        return messages
    waiting: dict[str, list[Ours]] = {}
    ids = {str(message.get("message_id")) for message in messages}
    first: list[Ours] = []
    found: list[Ours] = []
    for message in messages:
        to = str(message.pop("reply_to", None))
        (waiting.setdefault(to, []) if to in ids else first).append(message)
    while first:
        message = first.pop(0)
        found.append(message)
        first[:0] = waiting.pop(str(message.get("message_id")), [])
    return found + [message for rest in waiting.values() for message in rest]
