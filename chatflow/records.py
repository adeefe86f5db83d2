"""The records that pass through chatflow: what comes in, what goes out, their JSON.

Every record is immutable. On the wire a record is one JSON object in UTF-8; ids are
strings (integers are accepted); times are RFC 3339 in UTC.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
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
"""The longest summary that an `Analysis` holds, as the talk's prompt asks for."""


LARGEST_INTEGER = 2**63 - 1
"""Of 64 bits, as databases have them."""


class Sentiment(IntEnum):
    """How a customer feels."""

    ANGRY = -1
    NEUTRAL = 0
    HAPPY = 1


def _id(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _rfc3339(value: datetime) -> str:
    return _utc(value).isoformat().replace("+00:00", "Z")


Id = Annotated[str, BeforeValidator(_id), Field(min_length=1, max_length=1024)]
Time = Annotated[
    datetime,
    AfterValidator(_utc),
    PlainSerializer(_rfc3339, return_type=str, when_used="json"),
]
Role = Literal["customer", "agent", "bot"]


class Record(BaseModel):
    """What all records share: immutable, unknown fields ignored, JSON both ways."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_enum_values=False)

    def to_json(self) -> str:
        """One line of JSON; fields that are None are left out."""
        return self.model_dump_json(exclude_none=True)


class Message(Record):
    """One message of a chat. `role` says who wrote it, where that is known.

    On its own, as an event of a stream, it also has the `chat_id`; see `Event`.
    """

    user_id: Id
    text: str
    message_id: Id | None = None
    role: Role | None = None
    sent_at: Time | None = None
    attributes: dict[str, str] = Field(default_factory=dict)


class Chat(Record):
    """A whole chat. `user_id` names the user whose tone is asked for, if given."""

    chat_id: Id
    messages: tuple[Message, ...]
    user_id: Id | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    revision: int = Field(default=0, ge=0, le=LARGEST_INTEGER)

    def users(self) -> tuple[str, ...]:
        """Whose tone is asked: the named user, else every customer, else the first author."""
        if self.user_id is not None:
            return (self.user_id,)
        customers = [m.user_id for m in self.messages if m.role == "customer"]
        if customers or any(m.role for m in self.messages):
            return tuple(dict.fromkeys(customers))
        return (self.messages[0].user_id,)

    def texts_of(self, user_id: str) -> list[str]:
        """What a user wrote, message by message."""
        return [m.text for m in self.messages if m.user_id == user_id]


class Arrival(NamedTuple):
    """A line of JSON as it arrived, and what its source knows of it.

    Attributes:
      attributes, message_id, published_at: of the Pub/Sub message; empty for files.
    """

    line: bytes
    attributes: Mapping[str, str] = {}
    message_id: str | None = None
    published_at: datetime | None = None


class Event(Record):
    """Something that happened in a chat: a message, or its end.

    Attributes:
      message: None where the event is the end of the chat (`"event": "closed"`).
      at: event time; None where neither the event nor its source knows one.
    """

    chat_id: Id
    message: Message | None = None
    at: Time | None = None

    def to_line(self) -> str:
        """The event as it is on the wire."""
        wire: dict[str, Any] = {"chat_id": self.chat_id}
        if self.message is not None:
            wire |= self.message.model_dump(mode="json", exclude_none=True)
        else:
            wire |= {"event": "closed"} | ({"sent_at": self.at} if self.at else {})
        return pydantic_core.to_json(wire).decode()


class Analysis(Record):
    """How one user of one chat feels, and what the chat is about.

    Attributes:
      summary_source: `model` for the model's own words; `extract` where these were not
        grounded in the chat, and the user's own words stand in for them.
      tone_scores: log-probability of each tone word before `tone_bias` is taken off,
        for models whose tone is a scored choice.
      confidence: probability of the sentiment by these scores, less the bias, divided by the
        template's `tone_temperature`.
      dropped_messages: oldest messages left out of the prompt to keep its token budget.
      cut_messages: messages of which only the end went into the prompt.
      repairs: what was mended in the model's answer: `json`, `summary_cut`, `control_tokens`.
    """

    analysis_id: str
    chat_id: str
    user_id: str
    revision: int
    sentiment: Sentiment
    summary: str = Field(min_length=1, max_length=SUMMARY_CHARACTERS)
    summary_source: Literal["model", "extract"] = "model"
    tone_scores: dict[str, float] | None = None
    confidence: float | None = None
    dropped_messages: int = 0
    cut_messages: int = 0
    repairs: tuple[str, ...] = ()
    model: str
    prompt_version: str
    analysed_at: Time


Flag = Literal["low_confidence", "ungrounded", "refused_phrase", "accuses_customer", "failed"]

FAILED: Flag = "failed"


class Draft(Record):
    """An apology for support staff to review, or word that a person has to write it.

    Never sent by chatflow itself. It has a text or a flag, never both.

    Attributes:
      text: None where it is flagged: a bad draft is worse than none.
      flag: why there is no text, although this customer seems angry: `low_confidence` where
        the model was not sure enough of the anger to be asked for one; `ungrounded` where it
        wrote of what the customer did not; `refused_phrase` where it wrote what no draft may say;
        `accuses_customer` where it turned round what the customer says of us; `failed`, which is
        in databases only, where a dead letter says what went wrong.
      model: who wrote the text, or would have written it.
    """

    draft_id: str
    analysis_id: str
    chat_id: str
    user_id: str
    revision: int
    text: str | None = Field(default=None, min_length=1)
    flag: Flag | None = None
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
    """What a person approved to be sent to a customer; the console's event.

    Attributes:
      reply_id: of its draft, which has one reply at most.
      text: as it was approved.
      edited: it is not what the model wrote.
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
    """What a model said to a text that is no chat; see `chatflow.texts`.

    Attributes:
      response_id: deterministic: the same message, or the same text of a file, has the same.
      message_id, attributes: of the Pub/Sub message that the text came as.
      finish_reason: `stop`, or `length` where the response was cut at its limit.
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
    """An element that could not be handled, with all that is needed to try it again.

    Attributes:
      stage: where it failed: `read`; `assemble`, of messages to a chat; `prompt`, `model`
        or `answer` of an analysis; `draft_prompt`, `draft_model` or `draft_answer`;
        `write`, of a record that a sink refused; `replay`, of a letter itself.
      reason: a short code, e.g. `not_json`.
      payload: the element as it came; base64 of its bytes where these are not UTF-8 (or
        of these compressed, `gzip`, where it would be too large for Pub/Sub).
      attributes: those of the Pub/Sub message that it came as.
      answer: the model's raw answer, where there is one.
    """

    stage: str
    reason: str
    error: str
    payload: str
    payload_encoding: Literal["utf-8", "base64", "gzip"] = "utf-8"
    attributes: dict[str, str] | None = None
    chat_id: str | None = None
    answer: str | None = None
    failed_at: Time

    def payload_bytes(self) -> bytes:
        if self.payload_encoding == "utf-8":
            return self.payload.encode()
        raw = base64.b64decode(self.payload)
        return gzip.decompress(raw) if self.payload_encoding == "gzip" else raw


KINDS: Mapping[str, type[Record]] = {
    "analyses": Analysis,
    "drafts": Draft,
    "dead_letters": DeadLetter,
}
"""What comes out. Each kind has its flag, its table, and files of this name."""


def record_id(record: Record) -> str:
    """The id by which a record is known; of a dead letter, a hash of what failed and where."""
    if isinstance(record, Draft):
        return record.draft_id
    if isinstance(record, Analysis):
        return record.analysis_id
    if isinstance(record, Response):
        return record.response_id
    if isinstance(record, Reply):
        return record.reply_id
    assert isinstance(record, DeadLetter)
    return digest(record.stage, record.reason, record.payload, record.answer or "")


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


class AnalysedChat(NamedTuple):
    """An analysis beside the chat that it is about."""

    chat: Chat
    analysis: Analysis

    def to_json(self) -> str:
        return f'{{"chat":{self.chat.to_json()},"analysis":{self.analysis.to_json()}}}'


RecordT = TypeVar("RecordT", bound=Record)


def parse_record(kind: type[RecordT], line: bytes) -> RecordT:
    """Reads one record from a line of JSON.

    Raises:
      BadInputError: `not_utf8`, `not_json`, `not_an_object` or `wrong_shape`, with the
        fields that are wrong.
    """
    return validate(kind, load_object(line))


def load_object(line: bytes) -> dict[str, Any]:
    """A line of JSON as a dictionary; see `parse_record` for the errors."""
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
    """A result of any kind from its JSON.

    Raises:
      BadInputError: it is none.
    """
    value = load_object(data)
    kind: type[Record] = DeadLetter
    if "reply_id" in value:
        kind = Reply
    elif "draft_id" in value:
        kind = Draft
    elif "analysis_id" in value:
        kind = Analysis
    return validate(kind, value)


class Reading(NamedTuple):
    """A chat as it was read, and how many messages were left out of it."""

    chat: Chat
    empty_messages: int
    duplicate_messages: int


def read_chat(value: dict[str, Any]) -> Reading:
    """A chat from its JSON; leaves out messages without text and repeated message ids.

    Raises:
      BadInputError: `wrong_shape`, `no_messages`, or as `check_chat`.
    """
    chat = validate(Chat, value)
    if not chat.messages:
        raise BadInputError("no_messages", f"chat {chat.chat_id} has an empty list of messages")
    with_text = [m for m in chat.messages if m.text.strip()]
    kept = tuple(_first_of_each_id(with_text))
    empty = len(chat.messages) - len(with_text)
    chat = check_chat(chat.model_copy(update={"messages": kept}))
    return Reading(chat, empty, len(with_text) - len(kept))


def check_chat(chat: Chat) -> Chat:
    """The chat, where there is a user in it to ask about.

    Raises:
      BadInputError: `no_text` or `no_customer`.
    """
    if not chat.messages:
        raise BadInputError("no_text", f"chat {chat.chat_id} has no message with text")
    users, authors = chat.users(), {m.user_id for m in chat.messages}
    if not users:
        raise BadInputError("no_customer", f"chat {chat.chat_id} has no message of a customer")
    if not authors.issuperset(users):
        missing = next(user for user in users if user not in authors)
        raise BadInputError(
            "no_customer", f"chat {chat.chat_id} asks for user {missing}, who wrote nothing in it"
        )
    return chat


def _first_of_each_id(messages: Iterable[Message]) -> Iterable[Message]:
    seen = set()
    for message in messages:
        if message.message_id is None or message.message_id not in seen:
            seen.add(message.message_id)
            yield message


class Identity(NamedTuple):
    """What an id is made of: the same input twice gives the same id."""

    chat_id: str
    user_id: str
    revision: int
    prompt_version: str
    model: str

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:32]


def now() -> datetime:
    return datetime.now(UTC)
