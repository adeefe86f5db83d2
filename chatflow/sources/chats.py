"""Reads chats and messages as other systems write them; only ids and texts must be right.

Any other field that is null, empty or of a wrong type is converted or left out, and counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import pydantic_core
from apache_beam.io.filesystems import FileSystems
from pydantic import Field, TypeAdapter, ValidationError

from chatflow.errors import BadInputError, UsageError, one_line
from chatflow.options import Options
from chatflow.records import (
    LARGEST_INTEGER,
    LONGEST_ID,
    SYSTEM,
    Chat,
    Message,
    check_chat,
    newest_revision,
    validate,
)
from chatflow.sources.formats.common import pairs_of
from chatflow.sources.formats.objects import ALL
from chatflow.sources.formats.tables import given_columns
from chatflow.sources.privacy import PRIVATE_KINDS, is_private, word
from chatflow.sources.said import PLACEHOLDERS, placeholder, said

ROLES: Mapping[str, str] = {
    name: role
    for role, names in {
        "customer": "customer user end_user enduser visitor contact client guest lead consumer "
        "buyer requester caller external human member subscriber shopper incoming inbound",
        "agent": "agent operator admin administrator staff support support_agent representative "
        "rep employee advisor teammate moderator human_agent live_agent owner outgoing outbound",
        "bot": "bot assistant automated_agent ai ai_agent chatbot chat_bot agent_bot virtual_agent "
        "virtual_assistant robot model gpt",
        SYSTEM: "system activity event service notification tool function developer info",
    }.items()
    for name in names.split()
}
"""Our role for each role of other systems, in lower case with underscores."""


@dataclasses.dataclass(frozen=True)
class Customs:
    """What differs between the systems that chats come from.

    Attributes:
      roles: our role for each of theirs; other roles stay as they are.
      placeholders: texts that stand for something without words, as `said.placeholder` writes them.
      format: how the system writes chats; see `formats.objects`.
      columns: the column of each field in a table; see `formats.tables`.
    """

    roles: Mapping[str, str] = dataclasses.field(default_factory=lambda: ROLES)
    placeholders: frozenset[str] = PLACEHOLDERS
    format: str = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


USUAL = Customs()


OURS = ("customer", "agent", "bot", SYSTEM)


def customs_by(options: Options) -> Customs:
    """Returns the customs that the flags of a run describe; raises `UsageError`."""
    return customs_of(options.roles, options.placeholders, options.input_format, options.columns)


def customs_of(roles: str, placeholders: str, format: str = "auto", columns: str = "") -> Customs:
    """Returns the customs of `--roles`, `--placeholders`, `--input_format` and `--columns`.

    Raises `UsageError` for a wrong value.
    """
    if format not in ALL:
        raise UsageError(f"--input_format={format}: must be one of {', '.join(ALL)}")
    given = pairs_of("--roles", roles, "THEIRS=OURS", OURS, last=True)
    own = {word(theirs): ours for ours, theirs in given}
    texts: list[str] = []
    if placeholders:
        try:
            with FileSystems.open(placeholders) as file:
                texts = file.read().decode("utf-8-sig").splitlines()
        except Exception as error:  # each filesystem raises its own errors
            raise UsageError(
                f"--placeholders: {placeholders!r} cannot be read: {one_line(error)}"
            ) from None
    known = PLACEHOLDERS | {*filter(None, map(placeholder, texts))}
    return Customs({**ROLES, **own}, known, format, given_columns(columns))


def read_chat(
    value: Mapping[str, Any], customs: Customs = USUAL, counts: Counter[str] | None = None
) -> Chat:
    """Reads a chat from its JSON: messages in order of time, without empty and repeated ones.

    A chat without a `revision` gets the one that its messages would get if they arrived one by one.

    Args:
      counts: counts what was converted or left out, by name.

    Raises:
      BadInputError: `wrong_shape`, `no_messages`, or an error of `check_chat`.
    """
    counts = Counter() if counts is None else counts
    listed = value.get("messages")
    if listed is None:
        listed = []
    if not isinstance(listed, list):
        raise BadInputError("wrong_shape", f"messages: a list is needed, found {_kind(listed)}")
    if not listed:
        raise BadInputError("no_messages", f"chat {value.get('chat_id')} has no list of messages")
    fields: list[dict[str, Any]] = []
    for number, item in enumerate(listed):
        if item is None:
            counts["empty_messages"] += 1
        elif isinstance(item, dict):
            try:
                fields.append(message_fields(item, customs, counts))
            except BadInputError as error:
                raise BadInputError(error.reason, f"messages.{number}.{error}") from None
        else:
            raise BadInputError(
                "wrong_shape", f"messages.{number}: an object is needed, found {_kind(item)}"
            )
    whole = {"chat_id": as_id(value.get("chat_id")), "messages": fields}
    for name, read in (("user_id", _side_id), ("attributes", _attributes), ("revision", _revision)):
        if (found := read(value.get(name), counts)) is not None:
            whole[name] = found
    chat = validate(Chat, whole)
    messages = _in_order(_first_of_each_id(_with_text(chat.messages, counts), counts), counts)
    revision = chat.revision if "revision" in whole else newest_revision(messages)
    update: dict[str, Any] = {"messages": messages, "revision": revision}
    if isinstance(value.get("redacted"), list):  # of a dead letter; where, is found anew
        update["redacted"] = ()
    return check_chat(chat.model_copy(update=update))


def message_fields(
    value: Mapping[str, Any], customs: Customs, counts: Counter[str]
) -> dict[str, Any]:
    """Returns the fields of a `Message` from its JSON; raises `BadInputError` (`wrong_shape`)."""
    found: dict[str, Any] = {}
    private = is_private(value)
    role = _role(value, customs, counts)
    author = value.get("user_id")
    if author is None or author == "":
        if role is None and not private:
            raise BadInputError("wrong_shape", "user_id: it is missing, and so is the role")
        found["user_id"] = role or "private"
    else:
        found["user_id"] = as_id(author)
    text = value.get("text")
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = _json(text)
        counts["input/fields_coerced"] += 1
    if text is not None and not isinstance(text, str):
        raise BadInputError("wrong_shape", f"text: a string is needed, found {_kind(text)}")
    found |= _words(text or "", value.get("original"), customs, counts)
    for name, read in (("message_id", _side_id), ("sent_at", time), ("attributes", _attributes)):
        if (side := read(value.get(name), counts)) is not None:
            found[name] = side
    if role is not None:
        found["role"] = role
    if private:
        found["private"] = True
        counts["input/private_notes"] += 1
    elif role == SYSTEM:
        counts["input/system_messages"] += 1
    return found


def _words(text: str, original: Any, customs: Customs, counts: Counter[str]) -> dict[str, str]:
    """Returns the text as its author wrote it, and the original text if that differs."""
    if isinstance(original, str) and said(original, customs.placeholders).text == text:
        return {"text": text, "original": original}  # chatflow has read this chat before
    words, left_out = said(text, customs.placeholders)
    counts.update(f"input/{name}" for name in left_out)
    return {"text": words, "original": text} if left_out else {"text": text}


def _role(value: Mapping[str, Any], customs: Customs, counts: Counter[str]) -> str | None:
    if not _KIND_FIELDS.isdisjoint(value):
        kinds = {word(value.get(name)) for name in _KIND_FIELDS}
        if kinds & _SYSTEM_KINDS or value.get("message_type") == 2:
            return SYSTEM
    found = value.get("role")
    if found is None or found == "" or isinstance(found, (list, dict, bool)):
        if found not in (None, ""):
            counts["input/fields_dropped"] += 1
        return None
    name = word(str(found))
    if name in customs.roles:
        return customs.roles[name]
    if name in PRIVATE_KINDS:
        return name
    counts["input/unknown_roles"] += 1
    return str(found)[:100]


_KIND_FIELDS = frozenset(("type", "message_type", "event_type", "subtype"))

_SYSTEM_KINDS = frozenset(("activity", "system", "event", "service", "notification"))


def as_id(value: Any) -> Any:
    """Returns 7 for 7.0, because tables turn ids into such numbers; else the value."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _side_id(value: Any, counts: Counter[str]) -> str | None:
    value = as_id(value)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = _json(value)
    if isinstance(value, str) and len(value) <= LONGEST_ID:
        return value
    counts["input/fields_dropped"] += 1
    return None


def _revision(value: Any, counts: Counter[str]) -> int | None:
    if value is None or value == "":
        return None
    try:
        return _REVISION.validate_python(value)
    except ValidationError:
        counts["input/fields_dropped"] += 1
        return None


def _attributes(value: Any, counts: Counter[str]) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        counts["input/fields_dropped"] += 1
        return None
    found = {}
    for name, item in value.items():
        if item is None:
            continue
        if not isinstance(item, str):
            item = _json(item)
            counts["input/fields_coerced"] += 1
        found[name] = item
    return found


def _json(value: Any) -> str:
    return pydantic_core.to_json(value).decode()


_REVISION = TypeAdapter(Annotated[int, Field(ge=0, le=LARGEST_INTEGER)])
_TIME: TypeAdapter[datetime] = TypeAdapter(datetime)
_FIRST, _LAST = datetime(1971, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)


def time(value: Any, counts: Counter[str]) -> datetime | None:
    """Returns a time from RFC 3339, or from s, ms, µs or ns since 1970; None if it is not one.

    Systems write "0001-01-01" and "1970-01-01" if they do not know the time.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = value.strip().removesuffix(" UTC")
    try:
        found = _TIME.validate_python(_seconds(value))
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValidationError, OverflowError, ValueError):
        counts["input/fields_dropped"] += 1
        return None
    if not _FIRST <= found < _LAST:
        counts["input/fields_dropped"] += 1
        return None
    return found


def _seconds(value: Any) -> Any:
    """Returns a number in seconds; its size shows in which unit it was."""
    if isinstance(value, str) and re.fullmatch(r"\d{9,20}(\.\d+)?", value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    for unit in (1e9, 1e6, 1e3):
        if value >= unit * 1e8:
            return value / unit
    return value


def _with_text(messages: Iterable[Message], counts: Counter[str]) -> Iterable[Message]:
    for message in messages:
        if message.text.strip() or message.original:
            yield message
        else:
            counts["empty_messages"] += 1


def _first_of_each_id(messages: Iterable[Message], counts: Counter[str]) -> Iterable[Message]:
    seen = set()
    for message in messages:
        if message.message_id is None or message.message_id not in seen:
            seen.add(message.message_id)
            yield message
        else:
            counts["duplicate_messages"] += 1


_OLDEST = datetime.min.replace(tzinfo=UTC)


def _in_order(messages: Iterable[Message], counts: Counter[str]) -> tuple[Message, ...]:
    """Sorts messages by time; one without a time stays after the message before it."""
    listed = tuple(messages)
    times: list[datetime] = []
    for message in listed:
        times.append(message.sent_at or (times[-1] if times else _OLDEST))
    order = sorted(range(len(listed)), key=times.__getitem__)
    if order == [*range(len(listed))]:
        return listed
    counts["input/chats_sorted"] += 1
    return tuple(listed[index] for index in order)


def _kind(value: Any) -> str:
    return {str: "a string", dict: "an object", list: "a list", bool: "true or false"}.get(
        type(value), "a number"
    )
