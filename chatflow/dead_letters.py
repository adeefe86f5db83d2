"""Turns elements that fail in any stage into dead letters, which can be tried again."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import apache_beam as beam

from chatflow import metrics
from chatflow.chat_text import encodable
from chatflow.coders import register
from chatflow.errors import BadInputError, ElementError
from chatflow.records import (
    AnalysedChat,
    Analysis,
    Arrival,
    Chat,
    DeadLetter,
    Draft,
    Event,
    RawChat,
    Record,
    Response,
    load_object,
    now,
    validate,
)

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

_log = logging.getLogger(__name__)

register(Analysis, Chat, DeadLetter, Draft, Event, RawChat, Response)

WRITE = "write"
"""The stage of dead letters for records that a sink refused."""


class Outcome(NamedTuple):
    """The outputs of a step: its results, and a dead letter for each element that failed."""

    ok: beam.PCollection
    dead_letters: beam.PCollection


@dataclasses.dataclass
class DeadLettered(beam.PTransform, Generic[InputT, OutputT]):
    """Runs a plain function as a step: its results go on, its errors become dead letters.

    Attributes:
      stage: the name of the step in dead letters and counters.
      function: takes an element, and the side input if there is one; returns its results.
      output_type: the type of one result, for Beam's type checks.
    """

    stage: str
    function: Callable[..., Iterable[OutputT]]
    output_type: Any = Any
    side: beam.pvalue.AsSideInput | None = None

    def expand(self, elements: beam.PCollection) -> Outcome:
        outputs = elements | "Try" >> beam.ParDo(
            _DeadLetteredDoFn(self.stage, self.function), *filter(None, [self.side])
        ).with_outputs(_FAILED, main="ok")
        ok, failed = outputs["ok"], outputs[_FAILED]
        ok.element_type, failed.element_type = self.output_type, DeadLetter
        return Outcome(ok, failed)


_FAILED = "dead_letters"


class _DeadLetteredDoFn(beam.DoFn, Generic[InputT, OutputT]):
    def __init__(self, stage: str, function: Callable[..., Iterable[OutputT]]):
        self.stage, self.function = stage, function

    def process(self, element: InputT, side: Any = None) -> Iterable[Any]:
        try:
            beside = () if side is None else (side,)
            outputs = list(self.function(element, *beside))
        except Exception as error:  # any error concerns only this element
            yield beam.pvalue.TaggedOutput(_FAILED, dead_letter(self.stage, element, error))
        else:
            yield from outputs


def dead_letter(stage: str, element: Any, error: Exception) -> DeadLetter:
    """Returns the dead letter of a failed element and counts it by stage and reason.

    It never raises an error, because the element could then stop a stream.
    """
    if isinstance(error, ElementError):
        reason, answer = error.reason, error.answer
    else:
        reason, answer = f"internal_{type(error).__name__}", None
        _log.exception("%s: unexpected error; the element is dead-lettered", stage, exc_info=error)
    metrics.count(f"dead_letters/{stage}/{reason}")
    try:
        payload = payload_of(element)
    except Exception as problem:  # an unknown type, or text that is not Unicode
        _log.warning("%s: the dead letter holds the element as Python shows it: %s", stage, problem)
        payload = {"payload": encodable(repr(element))}
    return DeadLetter(
        stage=stage,
        reason=reason,
        error=encodable(str(error))[:2000] or reason,
        answer=None if answer is None else encodable(answer),
        failed_at=now(),
        **payload,
    )


def refused(record: Record, error: Exception) -> DeadLetter:
    """Returns the dead letter of a record that a sink refuses.

    Raises the error if the record is itself a dead letter, which cannot go anywhere else.
    """
    if isinstance(record, DeadLetter):
        raise error
    return dead_letter(WRITE, record, error)


def check_size(record: Record, size: int, limit: int) -> None:
    """Raises `ElementError`: `too_large`, if a record has more bytes than its sink takes."""
    if size > limit:
        kind = type(record).__name__
        said = f"the {kind} has {size:,} bytes; its destination takes at most {limit:,}"
        raise ElementError("too_large", said)


def fitted(letter: DeadLetter, limit: int, part_bytes: int = 0) -> list[DeadLetter]:
    """Returns a dead letter as letters of at most `limit` bytes of JSON; nothing is cut.

    That is the letter itself, the letter with its payload compressed, or parts to `join`. If the
    letter is made again, with another `failed_at`, its parts are the same.

    Args:
      part_bytes: the bytes in a part, if not `PART_BYTES`; base64 adds a third.
    """
    if len(letter.to_json().encode()) <= limit:
        return [letter]
    packed = base64.b64encode(gzip.compress(letter.payload_bytes(), mtime=0)).decode()
    compressed = letter.model_copy(update={"payload": packed, "payload_encoding": "gzip"})
    if len(compressed.to_json().encode()) <= limit:
        return [compressed]
    content = letter.model_dump_json(exclude={"failed_at"}, exclude_none=True).encode()
    whole = gzip.compress(content, mtime=0)
    size = part_bytes or PART_BYTES
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    return [
        DeadLetter(
            stage=letter.stage,
            reason=letter.reason,
            error=letter.error[:2000],
            payload=base64.b64encode(piece).decode(),
            payload_encoding="base64",
            chat_id=letter.chat_id if len(letter.chat_id or "") <= ID_CHARACTERS else None,
            failed_at=letter.failed_at,
            part=number,
            parts=len(pieces),
            whole_id=_hash(whole),
        )
        for number, piece in enumerate(pieces, 1)
    ]


PART_BYTES = 6_000_000
"""The most bytes of a part before base64; with it, a part is small enough for every sink."""

ID_CHARACTERS = 1024
"""The longest chat id that a part repeats; the whole letter always has it."""


def join(parts: Iterable[DeadLetter]) -> DeadLetter:
    """Returns the letter that these parts, in any order, make up.

    The payloads, one after the other, are the letter's JSON without `failed_at`, compressed.

    Raises:
      BadInputError: `bad_parts`.
    """
    first, *others = sorted(parts, key=lambda letter: letter.part or 0)
    whole = b"".join(letter.payload_bytes() for letter in (first, *others))
    if _hash(whole) != first.whole_id:
        raise BadInputError("bad_parts", "the parts are not those of one letter")
    content = load_object(gzip.decompress(whole))
    return validate(DeadLetter, {**content, "failed_at": first.failed_at})


def _hash(whole: bytes) -> str:
    return hashlib.sha256(whole).hexdigest()[:32]


@functools.singledispatch
def payload_of(element: Any) -> dict[str, Any]:
    """Returns the `DeadLetter` fields that hold the element, so that `replay` can send it again."""
    raise TypeError(f"no payload is known for {type(element).__name__}")


@payload_of.register
def _line_payload(line: bytes) -> dict[str, Any]:
    try:
        return {"payload": line.decode(), "chat_id": _chat_id_in(line)}
    except UnicodeDecodeError:
        return {"payload": base64.b64encode(line).decode(), "payload_encoding": "base64"}


@payload_of.register
def _arrival_payload(arrival: Arrival) -> dict[str, Any]:
    if arrival.fault is not None:
        return {"payload": str(arrival.fault.part), "payload_encoding": "file"}
    return {**payload_of(arrival.line), "attributes": dict(arrival.attributes) or None}


@payload_of.register
def _chat_payload(chat: Chat) -> dict[str, Any]:
    return {"payload": chat.to_json(), "chat_id": chat.chat_id}


@payload_of.register
def _event_payload(event: Event) -> dict[str, Any]:
    return {"payload": event.to_line(), "chat_id": event.chat_id}


@payload_of.register(tuple)
def _pair_payload(pair: tuple[Any, ...]) -> dict[str, Any]:
    if isinstance(pair, AnalysedChat):
        return {"payload": pair.to_json(), "chat_id": pair.chat.chat_id}
    return payload_of(pair[0])  # (question, answer) or (chat, user)


@payload_of.register(Analysis)
@payload_of.register(Draft)
@payload_of.register(Response)
def _record_payload(record: Record) -> dict[str, Any]:
    return {"payload": record.to_json(), "chat_id": getattr(record, "chat_id", None)}


@payload_of.register
def _raw_payload(raw: RawChat) -> dict[str, Any]:
    """Returns the ids alone, because a raw chat must not leave the place where it is kept."""
    fields = {"chat_id": raw.chat_id, "revision": raw.revision}
    return {"payload": json.dumps(fields), "chat_id": raw.chat_id}


def _chat_id_in(line: bytes) -> str | None:
    try:
        found = load_object(line).get("chat_id")
    except BadInputError:
        return None
    return str(found) if isinstance(found, (str, int)) and found != "" else None


@payload_of.register
def _letter_payload(letter: DeadLetter) -> dict[str, Any]:
    if letter.part is not None:  # it waits for its other parts
        kept = ("payload", "payload_encoding", "chat_id", "part", "parts", "whole_id")
        return {name: getattr(letter, name) for name in kept}
    return {"payload": letter.to_json(), "chat_id": letter.chat_id}
