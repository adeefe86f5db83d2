"""OpenDeadLetters: reads dead letters, so that their content can be tried again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)

from chatflow.dead_letters import WRITE, DeadLettered, Outcome, dead_letter, join
from chatflow.errors import BadInputError
from chatflow.options import MAX_LINE_BYTES
from chatflow.records import (
    AnalysedChat,
    Analysis,
    Arrival,
    Chat,
    DeadLetter,
    Draft,
    Range,
    Record,
    load_object,
    open_record,
    validate,
)
from chatflow.sources.chats import USUAL, Customs
from chatflow.sources.lines import read_lines

if TYPE_CHECKING:
    from chatflow.redaction import Redactor


class Replayed(NamedTuple):
    """The contents of dead letters.

    `arrivals` must be read again; `analysed` still need a draft; `analyses` and `drafts` were
    refused by a sink; `dead_letters` cannot be opened.
    """

    arrivals: beam.PCollection
    analysed: beam.PCollection
    analyses: beam.PCollection
    drafts: beam.PCollection
    dead_letters: beam.PCollection


@dataclasses.dataclass
class OpenDeadLetters(beam.PTransform):
    """Turns arriving dead letters into their contents.

    Attributes:
      max_line_bytes: a longer line in a file that a letter names is a fault again.
      customs: the format of such files.
      redactor: replaces the personal data in the letters.
    """

    max_line_bytes: int = MAX_LINE_BYTES
    customs: Customs = USUAL
    redactor: Redactor | None = None

    def expand(self, arrivals: beam.PCollection) -> Replayed:
        opened, failed = arrivals | "OpenLetter" >> DeadLettered("replay", open_letter)
        whole, parts = opened | "ByPart" >> beam.Partition(_is_part, 2)
        joined, unjoined = parts | "JoinParts" >> JoinParts()
        letters = (whole, joined) | "WithJoined" >> beam.Flatten()
        if self.redactor:
            letters = letters | "Redact" >> beam.Map(self.redactor.letter)
            letters.element_type = DeadLetter
        held, undrafted, unwritten = letters | "ByStage" >> beam.Partition(_by_stage, 3)
        analysed, unread = undrafted | "OpenAnalysis" >> DeadLettered(
            "replay", open_analysis, AnalysedChat
        )
        refused, unknown = unwritten | "OpenRecord" >> DeadLettered("replay", open_refused, Record)
        analyses, drafts = refused | "ByKind" >> beam.Partition(_is_draft, 2)
        analyses.element_type, drafts.element_type = Analysis, Draft
        unpack = functools.partial(held_arrivals, self.max_line_bytes, self.customs)
        again, unpacked = held | "Payload" >> DeadLettered("replay", unpack, Arrival)
        dead_letters = (failed, unjoined, unread, unknown, unpacked) | beam.Flatten()
        return Replayed(again, analysed, analyses, drafts, dead_letters)


@dataclasses.dataclass
class JoinParts(beam.PTransform):
    """Joins the parts of letters, which arrive in any order and can be repeated.

    Outputs:
      `ok`: the letters.
      `dead_letters`: unchanged parts. `part_missing`: other parts of the letter are still missing
        when the input ends or the stream is drained; together with them, the parts can be replayed
        again. `bad_parts`: the parts do not make a letter.
    """

    def expand(self, parts: beam.PCollection[DeadLetter]) -> Outcome:
        outputs = (
            parts
            | "ByLetter" >> beam.Map(_keyed).with_output_types(tuple[str, DeadLetter])
            | "Join" >> beam.ParDo(_JoinDoFn()).with_outputs(_UNJOINED, main="ok")
        )
        outputs["ok"].element_type = outputs[_UNJOINED].element_type = DeadLetter
        return Outcome(outputs["ok"], outputs[_UNJOINED])


_UNJOINED = "unjoined"


def _keyed(part: DeadLetter) -> tuple[str, DeadLetter]:
    return f"{part.whole_id} {part.parts}", part


class _JoinDoFn(beam.DoFn):
    """Keeps the parts of a letter until all have arrived.

    `JOINED` is the newest `failed_at` of the parts that were joined. A part that is not newer is a
    repeated one; a newer part belongs to a letter that failed again.
    """

    PARTS = BagStateSpec("parts", BytesCoder())
    JOINED = ReadModifyWriteStateSpec("joined", BytesCoder())
    END = TimerSpec("end", beam.TimeDomain.WATERMARK)

    def process(
        self,
        keyed: tuple[str, DeadLetter],
        window: Any = beam.DoFn.WindowParam,
        parts: Any = beam.DoFn.StateParam(PARTS),
        joined: Any = beam.DoFn.StateParam(JOINED),
        end: Any = beam.DoFn.TimerParam(END),
    ) -> Iterator[Any]:
        _, part = keyed
        before = joined.read()
        if before is not None and part.failed_at <= datetime.fromisoformat(before.decode()):
            return
        known = {**_by_number(parts.read()), part.part: part}
        if len(known) < (part.parts or 0):
            parts.add(part.to_json().encode())
            end.set(window.end)
            return
        parts.clear()
        end.clear()
        joined.write(max(one.failed_at for one in known.values()).isoformat().encode())
        try:
            yield join(known.values())
        except Exception as error:  # any error concerns only these parts
            yield from _unjoined(known.values(), error)

    @on_timer(END)
    def give_up(self, parts: Any = beam.DoFn.StateParam(PARTS)) -> Iterator[Any]:
        waiting = _by_number(parts.read()).values()
        parts.clear()
        for part in waiting:
            said = f"only {len(waiting)} of {part.parts} parts are there; replay it with the others"
            yield from _unjoined([part], BadInputError("part_missing", said))


def _by_number(lines: Iterable[bytes]) -> dict[int | None, DeadLetter]:
    read = [DeadLetter.model_validate_json(line) for line in lines]
    return {part.part: part for part in sorted(read, key=lambda part: part.failed_at)}


def _unjoined(parts: Iterable[DeadLetter], error: Exception) -> Iterator[Any]:
    for part in parts:
        yield beam.pvalue.TaggedOutput(_UNJOINED, dead_letter("replay", part, error))


def open_letter(arrival: Arrival) -> Iterable[DeadLetter]:
    yield validate(DeadLetter, load_object(arrival.read()))


def held_arrivals(most: int, customs: Customs, letter: DeadLetter) -> Iterable[Arrival]:
    """Yields the contents of a letter, or the lines of the part of a file that it names.

    A line of more than `most` bytes becomes a fault.
    """
    if letter.payload_encoding != "file":
        yield Arrival(letter.payload_bytes(), letter.attributes or {})
        return
    try:
        part = Range.parse(letter.payload)
    except ValueError:
        said = f"the payload is not a part of a file: {letter.payload[:200]!r}"
        raise BadInputError("bad_payload", said) from None
    yield from read_lines(part, most, customs=customs)


def open_analysis(letter: DeadLetter) -> Iterable[AnalysedChat]:
    value = load_object(letter.payload_bytes())
    yield AnalysedChat(validate(Chat, value.get("chat")), validate(Analysis, value.get("analysis")))


def open_refused(letter: DeadLetter) -> Iterable[Record]:
    record = open_record(letter.payload_bytes())
    if not isinstance(record, (Analysis, Draft)):
        raise BadInputError("wrong_shape", "the letter holds neither an analysis nor a draft")
    yield record


def _is_part(letter: DeadLetter, _: int) -> int:
    return int(letter.part is not None)


def _by_stage(letter: DeadLetter, _: int) -> int:
    return 2 if letter.stage == WRITE else int(letter.stage.startswith("draft"))


def _is_draft(record: Record, _: int) -> int:
    return int(isinstance(record, Draft))
