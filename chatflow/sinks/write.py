"""Writes records to files, topics, BigQuery, databases and webhooks, by URI."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError
from chatflow.options import SinkSettings
from chatflow.records import DeadLetter, Record
from chatflow.sinks.files import Files
from chatflow.sinks.sink import Sink

SCHEMES: tuple[Sink, ...] = tuple(
    getattr(importlib.import_module(f"chatflow.sinks.{module}"), name)()
    for module, name in (
        ("pubsub", "PubSub"),
        ("bigquery", "BigQuery"),
        ("database", "Database"),
        ("webhooks", "Webhook"),
        ("files", "Files"),
    )
)
"""The kinds of destinations; the first that accepts a URI is used."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteRecords(beam.PTransform):
    """Writes records to all `destinations` (see `split_destinations`).

    Outputs a `DeadLetter` per record that a destination refuses permanently; returns None if no
    destination refuses records. A refused dead letter fails its bundle, so that the runner retries.
    """

    destinations: Sequence[str] = dataclasses.field(repr=False)  # they may contain secrets
    settings: SinkSettings = dataclasses.field(default_factory=SinkSettings, repr=False)

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter] | None:
        written = [
            records | f"Write{number or ''}" >> sink_of(uri).write(uri, self.settings)
            for number, uri in enumerate(self.destinations)
        ]
        refused = [letters for letters in written if _are_letters(letters)]
        return refused | "Refused" >> beam.Flatten() if refused else None


def _are_letters(output: Any) -> bool:
    return isinstance(output, beam.PCollection) and output.element_type is DeadLetter


def split_destinations(kind: str, own: str, output: str, database: str = "") -> tuple[str, ...]:
    """Returns a kind of record's destinations; raises `UsageError` for none or a wrong one.

    Args:
      own: the kind's own destinations, separated by commas; default: a file in the folder `output`.
      database: an additional destination of all kinds.
    """
    destinations = tuple(filter(None, (uri.strip() for uri in own.split(","))))
    if not destinations and output:
        destinations = (str(FileSystems.join(output, kind)),)
    if database and database not in destinations:
        destinations += (database,)
    if not destinations:
        raise UsageError(
            f"--output is missing, and so is --{kind}: one of them says where {kind} go"
        )
    try:
        for uri in destinations:
            sink_of(uri).check_uri(uri)
    except UsageError as error:
        raise UsageError(f"--{kind}: {error}") from None
    return destinations


def by_sink(destinations: Mapping[str, Sequence[str]]) -> dict[Sink, dict[str, list[str]]]:
    """Groups the URIs of kinds of records by sink, in the order of `SCHEMES`."""
    found: dict[Sink, dict[str, list[str]]] = {sink: {} for sink in SCHEMES}
    for kind, uris in destinations.items():
        for uri in uris:
            found[sink_of(uri)].setdefault(uri, []).append(kind)
    return {sink: uris for sink, uris in found.items() if uris}


def sink_of(uri: str) -> Sink:
    """Returns the kind of destination of a URI; raises `UsageError` for an unknown one."""
    for sink in SCHEMES:
        if sink.takes(uri):
            return sink
    *most, last = (sink.example for sink in (SCHEMES[-1], *SCHEMES[:-1]))
    raise UsageError(f"nothing writes to {uri!r}; known are {', '.join(most)}, and {last}")


def is_file(uri: str) -> bool:
    """Returns whether a destination is a file prefix."""
    return isinstance(sink_of(uri), Files)


def shown(text: str) -> str:
    """Returns a text without possible secrets in the destinations in it."""
    for sink in SCHEMES:
        text = sink.shown(text)
    return text
