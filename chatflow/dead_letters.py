"""One idiom for failure in every stage: a failed element becomes a dead letter to try again."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import apache_beam as beam

from chatflow import metrics
from chatflow.errors import BadInputError, ElementError
from chatflow.records import (
    AnalysedChat,
    Analysis,
    Arrival,
    Chat,
    DeadLetter,
    Draft,
    Event,
    Record,
    Response,
    load_object,
    now,
)

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

_log = logging.getLogger(__name__)

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
      stage: names the step in dead letters and counters.
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
    """Returns the dead letter of a failed element and counts it by stage and reason."""
    if isinstance(error, ElementError):
        reason, answer = error.reason, error.answer
    else:
        reason, answer = f"internal_{type(error).__name__}", None
        _log.exception("%s: unexpected error; the element is dead-lettered", stage, exc_info=error)
    metrics.count(f"dead_letters/{stage}/{reason}")
    return DeadLetter(
        stage=stage,
        reason=reason,
        error=str(error)[:2000] or reason,
        answer=answer,
        failed_at=now(),
        **payload_of(element),
    )


def shortened(letter: DeadLetter, limit: int) -> DeadLetter:
    """Shrinks a dead letter to at most `limit` bytes: compresses its payload or else cuts it."""
    packed = base64.b64encode(gzip.compress(letter.payload_bytes(), mtime=0)).decode()
    if len(packed) > limit - 100_000:
        metrics.count("cut_dead_letters")
        start = letter.payload[: limit // 8]
        note = f"{letter.error} (its payload of {len(letter.payload)} characters was cut)"
        return letter.model_copy(update={"payload": start, "error": note, "answer": None})
    return letter.model_copy(update={"payload": packed, "payload_encoding": "gzip"})


@functools.singledispatch
def payload_of(element: Any) -> dict[str, Any]:
    """Returns the `DeadLetter` fields with the element, so that `replay` can send it again."""
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


def _chat_id_in(line: bytes) -> str | None:
    try:
        found = load_object(line).get("chat_id")
    except BadInputError:
        return None
    return str(found) if isinstance(found, (str, int)) and found != "" else None


@payload_of.register
def _letter_payload(letter: DeadLetter) -> dict[str, Any]:
    return {"payload": letter.to_json(), "chat_id": letter.chat_id}
