"""Defines the records that pass through chatflow, and their JSON.

Records are immutable. On the wire, a record is one JSON object in UTF-8; ids are strings (integers
are accepted); times are RFC 3339 in UTC.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from chatflow.errors import BadInputError

SUMMARY_CHARACTERS = 512
"""The longest summary of an `Analysis`; the prompt of the talk asks for the same."""


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

LARGEST_INTEGER = 2**63 - 1
"""The largest signed integer of 64 bits, which databases can hold."""


class Sentiment(IntEnum):
    """How a customer feels."""

    ANGRY = -1
    NEUTRAL = 0
    HAPPY = 1


def _id(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _utc(value: datetime) -> datetime:
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as error:  # 0001-01-01 in a time zone
        raise ValueError(str(error)) from None


def _rfc3339(value: datetime) -> str:
    return _utc(value).isoformat().replace("+00:00", "Z")


LONGEST_ID = 1024
Id = Annotated[str, BeforeValidator(_id), Field(min_length=1, max_length=LONGEST_ID)]
Time = Annotated[
    datetime,
    AfterValidator(_utc),
    PlainSerializer(_rfc3339, return_type=str, when_used="json"),
]

SYSTEM = "system"
"""The role of messages that nobody said, such as "Dana joined the chat"."""


class Record(BaseModel):
    """The base of all records: immutable, ignores unknown fields, reads and writes JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_enum_values=False)

    def to_json(self) -> str:
        """Returns one line of JSON without the fields that are None."""
        return self.model_dump_json(exclude_none=True)


class Message(Record):
    """One message of a chat; a single message in a stream also has the `chat_id`, see `Event`.

    Attributes:
      text: the words of its author; "" if it has none, e.g. an image.
      role: `customer`, `agent`, `bot` or `system`, or another system's word.
      private: a note for staff, which the customer does not see.
      original: the text as it arrived, if `text` is only a part of it; see `sources.said`.
    """

    user_id: Id
    text: str
    message_id: Id | None = None
    role: str | None = None
    sent_at: Time | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    private: bool | None = None
    original: str | None = None

    @property
    def is_said(self) -> bool:
        """Returns whether somebody said it in the chat; prompts hold only such messages."""
        return bool(self.text) and not self.private and self.role != SYSTEM


class Redaction(Record):
    """The position of a placeholder: the message, from 0, and the start and end in its text."""

    message: int
    start: int
    end: int
    kind: str


class Chat(Record):
    """A whole chat; `user_id`, if given, is the user whose tone is asked for.

    A newer revision has a greater number; see `newest_revision`. `redacted` lists the positions of
    placeholders, if personal data was looked for; see `--redact`.
    """

    chat_id: Id
    messages: tuple[Message, ...]
    user_id: Id | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    revision: int = Field(default=0, ge=0, le=LARGEST_INTEGER)
    redacted: tuple[Redaction, ...] | None = None

    def users(self) -> tuple[str, ...]:
        """Returns `user_id` if set, else all customers; if nobody has a role, the first author."""
        if self.user_id is not None:
            return (self.user_id,)
        said = self.said
        customers = [m.user_id for m in said if m.role == "customer"]
        if customers or any(m.role for m in said):
            return tuple(dict.fromkeys(customers))
        return (said[0].user_id,) if said else ()

    @property
    def said(self) -> tuple[Message, ...]:
        """Returns the messages without private notes, system messages, and those without words."""
        return tuple(message for message in self.messages if message.is_said)

    def texts_of(self, user_id: str) -> list[str]:
        """Returns the texts of what a user said."""
        return [m.text for m in self.messages if m.user_id == user_id and m.is_said]

    def content(self) -> str:
        """Returns a hash of who said what, which tells apart different chats with the same id."""
        content = [
            (m.user_id, m.role, bool(m.private), m.original or m.text) for m in self.messages
        ]
        return hashlib.sha256(pydantic_core.to_json(content)).hexdigest()[:32]


class RawChat(Record):
    """An original chat, for `--keep_raw`, and what the placeholders in the redacted one stand for.

    `chat_id` is that of the redacted chat.
    """

    chat_id: Id
    revision: int
    chat: Chat
    placeholders: dict[str, str]


def newest_revision(messages: Sequence[Message]) -> int:
    """Returns the revision of a chat: the time of its newest message plus the number of messages.

    The time is in milliseconds since 1970. So the same messages have the same revision, and one
    more message makes it greater, even if the message is late.
    """
    newest = max((m.sent_at for m in messages if m.sent_at), default=EPOCH)
    return revision_of((newest - EPOCH) // timedelta(microseconds=1), len(messages))


def revision_of(newest: int, messages: int) -> int:
    """Returns the revision of a chat from its newest time, in µs, and its number of messages."""
    return max(newest // 1000, 0) + messages


class Range(NamedTuple):
    """A part of a file: the lines that begin at the bytes from `start` to before `end`."""

    path: str
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        return f"{self.path}#{self.start}-{'' if self.end is None else self.end}"

    @classmethod
    def parse(cls, text: str) -> Range:
        """Reads what `str` writes; raises `ValueError`."""
        path, _, part = text.rpartition("#")
        start, _, end = part.partition("-")
        return cls(path, int(start), int(end) if end else None)


class Fault(NamedTuple):
    """Why a part of a file was not read: a short code, a message for people, and the part."""

    reason: str
    message: str
    part: Range


class Arrival(NamedTuple):
    """A line of JSON as it arrived.

    `attributes`, `message_id` and `published_at` come from the Pub/Sub message; they are empty for
    files. `source` is the file and the place of the line in it, and `number` is the line's number
    from 1, or 0 if it is not known. `name` is the name of the file, relative to the other inputs,
    if the file holds only this line. With a `fault`, the line is empty.
    """

    line: bytes
    attributes: Mapping[str, str] = {}
    message_id: str | None = None
    published_at: datetime | None = None
    source: str = ""
    number: int = 0
    name: str = ""
    fault: Fault | None = None

    def read(self) -> bytes:
        """Returns the line; raises `BadInputError` if there is a fault instead."""
        if self.fault is not None:
            raise BadInputError(self.fault.reason, self.fault.message)
        return self.line


class Event(Record):
    """A message of a chat, or, if `message` is None, the end of the chat (`"event": "closed"`).

    `at` is the event time; None if neither the event nor its source has one.
    """

    chat_id: Id
    message: Message | None = None
    at: Time | None = None

    def to_line(self) -> str:
        """Returns the JSON of the event."""
        wire: dict[str, Any] = {"chat_id": self.chat_id}
        if self.message is not None:
            wire |= self.message.model_dump(mode="json", exclude_none=True)
        else:
            wire |= {"event": "closed"} | ({"sent_at": self.at} if self.at else {})
        return pydantic_core.to_json(wire).decode()


class FieldValue(Record):
    """What was chosen for a chat: one value, or all that apply, and the probability of it."""

    value: str | tuple[str, ...]
    confidence: float | None = None


class Quotation(Record):
    """Words of a message that a text quotes; `message` is its place in the chat, from 0."""

    message: int
    text: str
    message_id: Id | None = None


class FirstOpinion(Record):
    """The answer of a model that was not sure enough, so that another model was asked."""

    sentiment: Sentiment
    confidence: float | None = None
    model: str


class Analysis(Record):
    """How one user of one chat feels, and what the chat is about.

    Attributes:
      summary_source: `model`, or `quotations` if the summary is composed of the chat's sentences.
      quotations: what a composed summary quotes.
      fields: what else was chosen, by name: `topic`, `resolved`, …; see `choices.toml`.
      language: the language of the user's words, in ISO 639-1, if it is known.
      unproven_language: true if the model was not measured in this language.
      tone_scores: log-probability of each tone word, before `tone_bias`; for models that score it.
      confidence: probability of the sentiment from (scores - bias) / `tone_temperature`.
      dropped_messages: oldest messages left out of the prompt to keep its token budget.
      cut_messages: messages of which the prompt has only the end.
      first: the first model's opinion, which this analysis replaces; see `--escalate_model`.
      redacted: the positions of placeholders in the chat; see `--redact`.
      repairs: what was repaired in the model's answer: `json`, `summary_cut`, `control_tokens`.
    """

    analysis_id: str
    chat_id: str
    user_id: str
    revision: int
    sentiment: Sentiment
    summary: str = Field(min_length=1, max_length=SUMMARY_CHARACTERS)
    summary_source: Literal["model", "quotations"] = "model"
    quotations: tuple[Quotation, ...] = ()
    fields: dict[str, FieldValue] = Field(default_factory=dict)
    language: str | None = None
    unproven_language: bool | None = None
    tone_scores: dict[str, float] | None = None
    confidence: float | None = None
    dropped_messages: int = 0
    cut_messages: int = 0
    first: FirstOpinion | None = None
    redacted: tuple[Redaction, ...] | None = None
    repairs: tuple[str, ...] = ()
    model: str
    prompt_version: str
    analysed_at: Time


Flag = Literal[
    "low_confidence", "third_party", "no_evidence", "unproven_language", "ungrounded",
    "refused_phrase", "accuses_customer", "failed",
]  # fmt: skip

FAILED: Flag = "failed"


class Draft(Record):
    """An apology for support staff to review, or a flag that says why a person has to write it.

    chatflow never sends it. It has either a text or a flag, because a bad draft is worse than none.

    Attributes:
      flag: why a customer who seems angry has no text. `low_confidence`: the model is not sure
        enough of the anger. `third_party`: the customer is angry at somebody else. `no_evidence`:
        nothing that the customer wrote can be quoted as evidence. `unproven_language`: see
        `Analysis`. `ungrounded`: the model wrote of something that the customer did not mention.
        `refused_phrase`: it wrote a phrase that no draft may contain. `accuses_customer`: it says
        of the customer what the customer says of us. `failed`: in databases only; a dead letter
        says what went wrong.
      grievances: what went wrong for the customer, the main one first, if that was chosen.
      evidence: the customer's words that a composed text quotes.
      confidence: the probability that the customer is angry, and that the company is the target.
      model: the model that wrote the text, or would have written it.
    """

    draft_id: str
    analysis_id: str
    chat_id: str
    user_id: str
    revision: int
    text: str | None = Field(default=None, min_length=1)
    flag: Flag | None = None
    grievances: tuple[str, ...] = ()
    evidence: tuple[Quotation, ...] = ()
    confidence: float | None = None
    repairs: tuple[str, ...] = ()
    model: str
    prompt_version: str
    drafted_at: Time

    @model_validator(mode="after")
    def _has_text_or_flag(self) -> Self:
        if (self.text is None) == (self.flag is None):
            raise ValueError("a draft has either a text or a flag")
        return self


class Reply(Record):
    """A text that a person approved to be sent to a customer; the console's event.

    `reply_id` is new for each approval, and the same whenever this reply is sent again; `edited`
    means that a person changed the model's text.
    """

    reply_id: str
    draft_id: str
    analysis_id: str
    chat_id: str
    user_id: str
    revision: int
    text: str = Field(min_length=1)
    edited: bool
    model: str
    prompt_version: str
    approved_by: str
    approved_at: Time


class Response(Record):
    """A model's response to a text that is not a chat; see `stages.respond`.

    The same Pub/Sub message, or the same text of a file, always has the same `response_id`.
    `message_id` and `attributes` come from the Pub/Sub message. `finish_reason` is `stop`, or
    `length` if the response was cut at its limit.
    """

    response_id: str
    text: str
    response: str
    message_id: str | None = None
    attributes: dict[str, str] | None = None
    finish_reason: str = "stop"
    model: str
    prompt_version: str
    responded_at: Time


class DeadLetter(Record):
    """An element that could not be handled, with everything needed to try it again.

    Attributes:
      stage: where it failed: `read`; `assemble` (messages to a chat); `identity` (chats that share
        an id); `prompt`, `model` or `answer` of an analysis; `draft_prompt`, `draft_model` or
        `draft_answer`; `write` (a sink refused a record); `replay` (of a dead letter).
      reason: a short code, e.g. `not_json`.
      payload: the original element.
      payload_encoding: `base64` if the payload is not UTF-8; `gzip` (compressed, then base64) if
        it is too large for its sink; or `file` if it names the part of a file that was not read,
        as `Range` writes it.
      attributes: those of the Pub/Sub message.
      answer: the model's raw answer, if any.
      part: from 1 to `parts`, if the letter is a part of one that is too large even if compressed.
        The payload is then a part of that letter; see `dead_letters.join`.
      whole_id: the same in all parts of a letter.
    """

    stage: str
    reason: str
    error: str
    payload: str
    payload_encoding: Literal["utf-8", "base64", "gzip", "file"] = "utf-8"
    attributes: dict[str, str] | None = None
    chat_id: str | None = None
    answer: str | None = None
    failed_at: Time
    part: int | None = Field(default=None, ge=1, le=LARGEST_INTEGER)
    parts: int | None = Field(default=None, ge=1, le=LARGEST_INTEGER)
    whole_id: str | None = None

    @model_validator(mode="after")
    def _is_whole_or_part(self) -> Self:
        if len({self.part is None, self.parts is None, self.whole_id is None}) > 1:
            raise ValueError("part, parts and whole_id belong together")
        return self

    def payload_bytes(self) -> bytes:
        """Returns the original payload; raises `BadInputError`: `bad_payload`."""
        return unpacked(self.payload, self.payload_encoding)


def unpacked(payload: str, encoding: str) -> bytes:
    """Returns what a dead letter's payload holds; raises `BadInputError`: `bad_payload`."""
    if encoding in ("utf-8", "file"):
        return payload.encode()
    try:
        raw = base64.b64decode(payload, validate=True)
        return gzip.decompress(raw) if encoding == "gzip" else raw
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise BadInputError("bad_payload", f"the payload is not {encoding}: {error}") from None


KINDS: Mapping[str, type[Record]] = {
    "analyses": Analysis,
    "drafts": Draft,
    "dead_letters": DeadLetter,
}
"""The kinds of results; each has a flag, a table and files of this name."""


def record_id(record: Record) -> str:
    """Returns the id of a record; for a dead letter, a hash of what failed and where."""
    if isinstance(record, Draft):
        return record.draft_id
    if isinstance(record, Analysis):
        return record.analysis_id
    if isinstance(record, Response):
        return record.response_id
    if isinstance(record, Reply):
        return record.reply_id
    assert isinstance(record, DeadLetter)
    part = (record.whole_id, str(record.part)) if record.whole_id else ()
    return digest(record.stage, record.reason, record.payload, record.answer or "", *part)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


class AnalysedChat(NamedTuple):
    """A chat with its analysis; `read` is what the model read and chose, if heads were used."""

    chat: Chat
    analysis: Analysis
    read: Any = None  # a `choices.heads.Read`, which stands above records

    def to_json(self) -> str:
        return f'{{"chat":{self.chat.to_json()},"analysis":{self.analysis.to_json()}}}'


RecordT = TypeVar("RecordT", bound=Record)


def parse_record(kind: type[RecordT], line: bytes) -> RecordT:
    """Reads one record from a line of JSON.

    Raises:
      BadInputError: `not_utf8`, `not_json`, `not_an_object`, or `wrong_shape` with wrong fields.
    """
    return validate(kind, load_object(line))


def load_object(line: bytes) -> dict[str, Any]:
    """Parses a line of JSON into a dictionary; raises the errors of `parse_record`."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError("not_utf8", f"the line is not UTF-8: {error}") from None
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise BadInputError("not_json", f"the line is not JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BadInputError("not_an_object", f"the line holds a JSON {kind}, not an object")
    return value


def validate(kind: type[RecordT], value: Any) -> RecordT:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg']}" for e in error.errors()[:5]
        ]
        if error.error_count() > 5:
            problems.append(f"and {error.error_count() - 5} more")
        raise BadInputError("wrong_shape", "; ".join(problems)) from None


def open_record(data: bytes) -> Record:
    """Reads a result of any kind from its JSON; raises `BadInputError` if it is not one."""
    value = load_object(data)
    kind: type[Record] = DeadLetter
    if "reply_id" in value:
        kind = Reply
    elif "draft_id" in value:
        kind = Draft
    elif "analysis_id" in value:
        kind = Analysis
    return validate(kind, value)


def check_chat(chat: Chat) -> Chat:
    """Returns the chat or raises `BadInputError`: `no_text`, or `no_customer` to ask about."""
    said = chat.said
    if not said:
        raise BadInputError("no_text", f"chat {chat.chat_id} has no message with words")
    users, authors = chat.users(), {m.user_id for m in said}
    if not users:
        raise BadInputError("no_customer", _why_no_customer(chat))
    if not authors.issuperset(users):
        missing = next(user for user in users if user not in authors)
        raise BadInputError(
            "no_customer", f"chat {chat.chat_id} asks for user {missing}, who wrote nothing in it"
        )
    return chat


def _why_no_customer(chat: Chat) -> str:
    if any(m.role == "customer" for m in chat.messages):
        return f"the customers of chat {chat.chat_id} wrote no words"
    roles = ", ".join(sorted({m.role for m in chat.messages if m.role})[:10])
    return (
        f"chat {chat.chat_id} has no message from a customer; its roles are {roles}; "
        "say with --roles=THEIRS=customer which role is the customer"
    )


class Identity(NamedTuple):
    """What an id is made from: the same input always has the same id, different input another.

    `content` is what `Chat.content` returns.
    """

    chat_id: str
    user_id: str
    revision: int
    content: str
    prompt_version: str
    model: str

    @classmethod
    def of(cls, chat: Chat, user_id: str, prompt_version: str, model: str) -> Self:
        return cls(chat.chat_id, user_id, chat.revision, chat.content(), prompt_version, model)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:32]


def now() -> datetime:
    return datetime.now(UTC)
