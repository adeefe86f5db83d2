"""The records that pass through chatflow, and their JSON.

Records are immutable. On the wire, a record is one JSON object in UTF-8; ids are strings (integers
are accepted); times are RFC 3339 in UTC.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import zlib
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
"""The longest summary of an `Analysis`, as the talk's prompt asks for."""


LARGEST_INTEGER = 2**63 - 1
"""The largest signed integer of 64 bits, as databases have them."""


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
    """The base of all records: immutable, ignores unknown fields, reads and writes JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_enum_values=False)

    def to_json(self) -> str:
        """Returns one line of JSON without the fields that are None."""
        return self.model_dump_json(exclude_none=True)


class Message(Record):
    """One message of a chat; a single message in a stream also has the `chat_id`, see `Event`."""

    user_id: Id
    text: str
    message_id: Id | None = None
    role: Role | None = None
    sent_at: Time | None = None
    attributes: dict[str, str] = Field(default_factory=dict)


class Chat(Record):
    """A whole chat; `user_id`, if given, is the user whose tone is asked for."""

    chat_id: Id
    messages: tuple[Message, ...]
    user_id: Id | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    revision: int = Field(default=0, ge=0, le=LARGEST_INTEGER)

    def users(self) -> tuple[str, ...]:
        """Returns `user_id` if set, else all customers, or without any roles the first author."""
        if self.user_id is not None:
            return (self.user_id,)
        customers = [m.user_id for m in self.messages if m.role == "customer"]
        if customers or any(m.role for m in self.messages):
            return tuple(dict.fromkeys(customers))
        return (self.messages[0].user_id,)

    def texts_of(self, user_id: str) -> list[str]:
        """Returns the texts of a user's messages."""
        return [m.text for m in self.messages if m.user_id == user_id]


class Arrival(NamedTuple):
    """A line of JSON as it arrived; the other fields are the Pub/Sub message's, empty for files."""

    line: bytes
    attributes: Mapping[str, str] = {}
    message_id: str | None = None
    published_at: datetime | None = None


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


class Analysis(Record):
    """How one user of one chat feels, and what the chat is about.

    Attributes:
      summary_source: `model`, or `extract`: the user's words instead of an ungrounded summary.
      tone_scores: log-probability of each tone word, before `tone_bias`; for models that score it.
      confidence: probability of the sentiment from (scores - bias) / `tone_temperature`.
      dropped_messages: oldest messages left out of the prompt to keep its token budget.
      cut_messages: messages of which the prompt has only the end.
      repairs: what was repaired in the model's answer: `json`, `summary_cut`, `control_tokens`.
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
    """An apology for support staff to review, or a flag, so that a person has to write it.

    chatflow never sends it. It has either a text or a flag, because a bad draft is worse than none.

    Attributes:
      flag: why a customer who seems angry has no text. `low_confidence`: the model is not sure
        enough of the anger. `ungrounded`: it wrote of what the customer did not. `refused_phrase`:
        it wrote what no draft may say. `accuses_customer`: it says of the customer what the
        customer says of us. `failed`: in databases only; a dead letter says what went wrong.
      model: the one that wrote the text, or would have written it.
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
    """A text that a person approved to be sent to a customer; the console's event.

    `reply_id` is the id of the draft, which has at most one reply; `edited` means that the text is
    not the model's.
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
    `message_id` and `attributes` are the Pub/Sub message's. `finish_reason` is `stop`, or `length`
    if the response was cut at its limit.
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
      stage: where it failed: `read`; `assemble` (messages to a chat); `prompt`, `model` or `answer`
        of an analysis; `draft_prompt`, `draft_model` or `draft_answer`; `write` (a sink refused a
        record); `replay` (of a dead letter).
      reason: a short code, e.g. `not_json`.
      payload: the element as it came; `base64` if it is not UTF-8; `gzip`, compressed and then
        base64, if it is too large for its sink.
      attributes: the Pub/Sub message's.
      answer: the model's raw answer, if any.
      part: from 1 to `parts`, if the letter is a part of one that is too large even if compressed;
        the payload is then a part of that letter, see `dead_letters.join`.
      whole_id: the same in all parts of a letter.
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
    part: int | None = Field(default=None, ge=1, le=LARGEST_INTEGER)
    parts: int | None = Field(default=None, ge=1, le=LARGEST_INTEGER)
    whole_id: str | None = None

    @model_validator(mode="after")
    def _is_whole_or_part(self) -> Self:
        if len({self.part is None, self.parts is None, self.whole_id is None}) > 1:
            raise ValueError("part, parts and whole_id belong together")
        return self

    def payload_bytes(self) -> bytes:
        """Returns the payload as it came; raises `BadInputError`: `bad_payload`."""
        if self.payload_encoding == "utf-8":
            return self.payload.encode()
        try:
            raw = base64.b64decode(self.payload, validate=True)
            return gzip.decompress(raw) if self.payload_encoding == "gzip" else raw
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise BadInputError(
                "bad_payload", f"the payload is not {self.payload_encoding}: {error}"
            ) from None


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
    """A chat with its analysis."""

    chat: Chat
    analysis: Analysis

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


class Reading(NamedTuple):
    """A chat as it was read, and how many of its messages were left out."""

    chat: Chat
    empty_messages: int
    duplicate_messages: int


def read_chat(value: dict[str, Any]) -> Reading:
    """Reads a chat from its JSON without messages that have no text or a repeated message id.

    Raises:
      BadInputError: `wrong_shape`, `no_messages`, or an error of `check_chat`.
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
    """Returns the chat or raises `BadInputError`: `no_text`, or `no_customer` to ask about."""
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
    """What an id is made from; the same input always has the same id."""

    chat_id: str
    user_id: str
    revision: int
    prompt_version: str
    model: str

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:32]


def now() -> datetime:
    return datetime.now(UTC)
