"""OpenDeadLetters: reads dead letters, so that their content can be tried again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import apache_beam as beam

from chatflow.dead_letters import WRITE, DeadLettered
from chatflow.errors import BadInputError
from chatflow.records import (
    AnalysedChat,
    Analysis,
    Arrival,
    Chat,
    DeadLetter,
    Draft,
    Record,
    load_object,
    open_record,
    validate,
)


class Replayed(NamedTuple):
    """The contents of dead letters.

    `arrivals` are to be read again, `analysed` still need a draft, a sink refused `analyses` and
    `drafts`, and `dead_letters` cannot be opened.
    """

    arrivals: beam.PCollection
    analysed: beam.PCollection
    analyses: beam.PCollection
    drafts: beam.PCollection
    dead_letters: beam.PCollection


@dataclasses.dataclass
class OpenDeadLetters(beam.PTransform):
    """Turns arriving dead letters into their contents."""

    def expand(self, arrivals: beam.PCollection) -> Replayed:
        letters, failed = arrivals | "OpenLetter" >> DeadLettered("replay", open_letter)
        held, undrafted, unwritten = letters | "ByStage" >> beam.Partition(_by_stage, 3)
        analysed, unread = undrafted | "OpenAnalysis" >> DeadLettered(
            "replay", open_analysis, AnalysedChat
        )
        refused, unknown = unwritten | "OpenRecord" >> DeadLettered("replay", open_refused, Record)
        analyses, drafts = refused | "ByKind" >> beam.Partition(_is_draft, 2)
        again = held | "Payload" >> beam.Map(held_arrival).with_output_types(Arrival)
        dead_letters = (failed, unread, unknown) | beam.Flatten()
        return Replayed(again, analysed, analyses, drafts, dead_letters)


def open_letter(arrival: Arrival) -> Iterable[DeadLetter]:
    yield validate(DeadLetter, load_object(arrival.line))


def held_arrival(letter: DeadLetter) -> Arrival:
    return Arrival(letter.payload_bytes(), letter.attributes or {})


def open_analysis(letter: DeadLetter) -> Iterable[AnalysedChat]:
    value = load_object(letter.payload_bytes())
    yield AnalysedChat(validate(Chat, value.get("chat")), validate(Analysis, value.get("analysis")))


def open_refused(letter: DeadLetter) -> Iterable[Record]:
    record = open_record(letter.payload_bytes())
    if not isinstance(record, (Analysis, Draft)):
        raise BadInputError("wrong_shape", "the letter holds neither an analysis nor a draft")
    yield record


def _by_stage(letter: DeadLetter, _: int) -> int:
    return 2 if letter.stage == WRITE else int(letter.stage.startswith("draft"))


def _is_draft(record: Record, _: int) -> int:
    return int(isinstance(record, Draft))
