"""Reads Slack's export: a zip of channels, each a folder of days; a thread is a chat.

https://slack.com/help/articles/220556107-How-to-read-Slack-data-exports
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator

from chatflow import metrics
from chatflow.errors import one_line
from chatflow.sources.formats.common import Ours, Value, dicts, part
from chatflow.sources.formats.tables import grouping

TITLE = "a Slack export"

_DAY = re.compile(r"(?:.*/)?(?P<channel>[^/]+)/\d{4}-\d{2}-\d{2}\.json")
_SAID = (None, "bot_message", "thread_broadcast", "file_share", "me_message")


def fits(names: list[str]) -> bool:
    """Returns whether an archive with these files is an export of Slack."""
    has_users = any(name.rsplit("/", 1)[-1] == "users.json" for name in names)
    return has_users and any(map(_DAY.fullmatch, names))


def read(archive: zipfile.ZipFile) -> Iterator[tuple[int, Ours]]:
    """Yields the threads, each with a number; a single message is a thread.

    Raises the first error of a file that cannot be read, after the messages of all others.
    """
    names = archive.namelist()
    users: dict[str, Value] = {}
    for name in names:
        if name.rsplit("/", 1)[-1] == "users.json":
            users |= {str(u.get("id")): u for u in dicts(json.loads(archive.read(name)))}
    number, fault = 0, None
    with grouping() as groups:
        for name in sorted(names):
            if (day := _DAY.fullmatch(name)) is None:
                continue
            channel = day["channel"]
            try:
                messages = [*dicts(json.loads(archive.read(name)))]
            except Exception as error:  # damaged, encrypted, or not JSON
                fault = fault or ValueError(f"{name}: {one_line(error)}")
                continue
            for message in messages:
                number += 1
                thread = message.get("thread_ts") or message.get("ts")
                others = {"channel": channel, "source": "slack"}
                groups.add(number, f"{channel}-{thread}", _message(message, users), others)
        for first, chat in groups.chats():
            if any(message.get("role") != "system" for message in chat["messages"]):
                yield first, _with_roles(chat)
            else:
                metrics.count("input/system_messages", len(chat["messages"]))
    if fault is not None:
        raise fault


def _with_roles(chat: Ours) -> Ours:
    """Makes the person who begins a thread the customer, and other people in it agents."""
    people = [message for message in chat["messages"] if "role" not in message]
    for message in people:
        asked = message["user_id"] == people[0]["user_id"]
        message["role"] = "customer" if asked else "agent"
    return chat


def _message(message: Value, users: dict[str, Value]) -> Ours:
    author = str(message.get("user") or message.get("bot_id") or "unknown")
    found: Ours = {
        "message_id": message.get("client_msg_id") or f"{author}-{message.get('ts')}",
        "user_id": author,
        "text": _words(str(message.get("text") or ""), users),
        "sent_at": message.get("ts"),
    }
    if not found["text"] and message.get("files"):
        found["text"] = "[attachment]"
    if message.get("subtype") not in _SAID:  # "has joined the channel"
        found["role"] = "system"
    elif message.get("bot_id") or part(users.get(author)).get("is_bot"):
        found["role"] = "bot"
    return found


def _words(text: str, users: dict[str, Value]) -> str:
    """Returns a text with names instead of ids, and links as people see them."""

    def seen(found: re.Match[str]) -> str:
        target, _, label = found[1].partition("|")
        if target.startswith("@"):
            known = part(users.get(target[1:]))
            return f"@{label or known.get('real_name') or known.get('name') or 'someone'}"
        if target.startswith(("#", "!")):
            return f"{target[0].replace('!', '@')}{label or target[1:]}"
        return label or target.removeprefix("mailto:")

    text = re.sub(r"<([^<>\s][^<>]*)>", seen, text)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
