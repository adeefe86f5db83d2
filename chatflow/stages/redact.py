"""RedactChats: replaces personal data with placeholders before any model gets a chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import apache_beam as beam

from chatflow import metrics
from chatflow.records import Chat, RawChat
from chatflow.redaction.logs import redact_logs

if TYPE_CHECKING:
    from chatflow.redaction import Redactor


class RedactedChats(NamedTuple):
    chats: beam.PCollection
    raw: beam.PCollection


@beam.typehints.with_input_types(Chat)
@dataclasses.dataclass
class RedactChats(beam.PTransform):
    """Redacts chats; the originals are in `raw`, so that they can be stored if wanted.

    If the redacting service fails, the bundle fails too, so that the runner tries it again. A dead
    letter would contain personal data.

    Outputs:
      `chats`: without personal data.
      `raw`: a `RawChat` per chat that was not redacted before.
    """

    redactor: Redactor

    def expand(self, chats: beam.PCollection[Chat]) -> RedactedChats:
        outputs = chats | "Redact" >> beam.ParDo(_RedactDoFn(self.redactor)).with_outputs(
            _RAW, main="chats"
        )
        outputs["chats"].element_type, outputs[_RAW].element_type = Chat, RawChat
        return RedactedChats(outputs["chats"], outputs[_RAW])


_RAW = "raw"


class _RedactDoFn(beam.DoFn):
    def __init__(self, redactor: Redactor):
        self.redactor = redactor

    def setup(self) -> None:
        redact_logs(self.redactor.line)

    def process(self, chat: Chat) -> Iterable[Any]:
        redacted = self.redactor.chat(chat)
        metrics.count("chats_redacted", bool(redacted.counts))
        for kind, count in redacted.counts.items():
            metrics.count(f"redacted/{kind}", count)
        yield redacted.chat
        if redacted.raw is not None:
            yield beam.pvalue.TaggedOutput(_RAW, redacted.raw)


class RedactLogs(beam.DoFn):
    """Passes all elements on; once it is set up, no log line of its process has personal data.

    It stands in each stage that has chats as they came, because stages may run in other processes.
    """

    def __init__(self, redactor: Redactor):
        self.redactor = redactor

    def setup(self) -> None:
        redact_logs(self.redactor.line)

    def process(self, element: Any) -> Iterable[Any]:
        yield element
