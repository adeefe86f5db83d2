"""Writes records to BigQuery tables, upserted by id through the Storage Write API."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import queue
import re
import threading
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from typing import Any, ClassVar

import apache_beam as beam
import pydantic_core
from apache_beam.utils.windowed_value import WindowedValue

from chatflow.dead_letters import check_size, fitted, refused
from chatflow.errors import ElementError, UsageError
from chatflow.network import NO_LIMITS, attempts
from chatflow.options import SinkSettings
from chatflow.records import KINDS, DeadLetter, Record, record_id
from chatflow.sinks.google import check_each
from chatflow.sinks.sink import Sink, Uris

TABLE = re.compile(r"bigquery://(?P<table>.+\.\w+\.[\w-]+?)(?:\?upsert=(?P<upsert>true|false))?")
"""`bigquery://PROJECT.DATASET.TABLE`; with `?upsert=false`, rows are only appended."""

HOST_VARIABLE = "BIGQUERY_STORAGE_EMULATOR_HOST"
"""The variable with the address of a stand-in for the API (HOST:PORT, gRPC without TLS)."""

APPEND_BYTES = 9_000_000
"""The most bytes of rows in a request; the service accepts requests of 10 MB."""

APPEND_SECONDS = 600.0
"""How long to retry appending rows before their bundle fails and the runner retries it."""

ANSWER_SECONDS = 60.0
"""How long one request may take before it is sent again."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class WriteRows(beam.PTransform):
    """Writes records as rows of a BigQuery table (`uri`: see `TABLE`), through its default stream.

    Rows are upserted by the record's id (change data capture): a repeated bundle, a replay or a
    backfill writes each row once. The table's primary key must be that id; see `columns`.
    A dead letter that is too large for a request is compressed or becomes several rows. Any other
    record that is too large becomes a dead letter, and so does a row that the service refuses.

    Beam's own Storage Write API sink is written in Java and needs Docker in local runs.
    """

    uri: str

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter]:
        upsert = not self.uri.endswith("?upsert=false")
        append = beam.ParDo(_AppendRowsDoFn(stream_of(self.uri), upsert))
        return records | "AppendRows" >> append.with_output_types(DeadLetter)


class _AppendRowsDoFn(beam.DoFn):
    def __init__(self, stream: str, upsert: bool):
        self.stream, self.upsert = stream, upsert

    def start_bundle(self) -> None:
        self.rows: list[tuple[bytes, WindowedValue]] = []
        self.bytes = 0

    def process(
        self,
        record: Record,
        at: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[DeadLetter | WindowedValue]:
        try:
            rows = to_rows(record, self.upsert)
        except Exception as error:  # any error concerns only this record
            yield refused(record, error)
            return
        self.schema = descriptor(type(record), self.upsert)
        for row in rows:
            if self.bytes + len(row) > APPEND_BYTES:
                yield from self.finish_bundle()
            self.rows.append((row, WindowedValue(record, at, [window])))
            self.bytes += len(row)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Appends the waiting rows; yields a dead letter per row that the service refuses."""
        letters = []
        while self.rows:
            try:
                self.append([row for row, _ in self.rows])
            except RowsRefusedError as error:  # no row was stored, so the others are sent again
                for index, said in error.by_index.items():
                    found = self.rows[index][1]
                    fault = ElementError("bigquery_refused", said)
                    letters.append(found.with_value(refused(found.value, fault)))
                rows = enumerate(self.rows)
                self.rows = [row for index, row in rows if index not in error.by_index]
            else:
                self.rows = []
        self.bytes = 0
        yield from letters

    def append(self, rows: Sequence[bytes]) -> None:
        """Appends rows; retries on new connections for `APPEND_SECONDS`.

        Raises `RowsRefusedError`.
        """
        import tenacity
        from google.api_core.exceptions import GoogleAPIError

        passing = tenacity.retry_if_exception_type(GoogleAPIError)
        # The first fault is normal, because the service closes idle connections.
        for attempt in attempts(
            f"appending to {self.stream}", APPEND_SECONDS, passing, logging.INFO
        ):
            with attempt, Connection.lent(self.stream, self.schema) as connection:
                connection.append(rows)

    def teardown(self) -> None:
        Connection.close_idle(self.stream)


class RowsRefusedError(Exception):
    """The service refuses some rows of a request; `by_index` says why."""

    def __init__(self, by_index: Mapping[int, str]):
        super().__init__(f"{len(by_index)} rows were refused")
        self.by_index = by_index


class Connection:
    """A connection that appends rows of one kind to one stream.

    Connections are reused by the next bundle of any thread, because a project's number of
    connections is limited. The client's own `AppendRowsStream` polls for answers, which costs
    half a second a bundle (bench/bigquery.py).
    """

    _idle: ClassVar[collections.defaultdict[str, list[Connection]]] = collections.defaultdict(list)

    @classmethod
    @contextlib.contextmanager
    def lent(cls, stream: str, schema: Any) -> Iterator[Connection]:
        """Yields an idle connection or a new one; keeps it for reuse unless it fails."""
        try:
            connection = cls._idle[stream].pop()
        except IndexError:
            connection = cls(write_client(), stream, schema)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        cls._idle[stream].append(connection)

    @classmethod
    def close_idle(cls, stream: str) -> None:
        with contextlib.suppress(IndexError):
            while True:
                cls._idle[stream].pop().close()

    def __init__(self, client: Any, stream: str, schema: Any):
        self.opening = {"write_stream": stream, "schema": schema}
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers = client.transport.append_rows(
            iter(self.requests.get, None),
            metadata=[("x-goog-request-params", f"write_stream={stream}")],
        )

    def append(self, rows: Sequence[bytes]) -> None:
        """Sends rows and waits until they are stored.

        Raises:
          GoogleAPIError: they are not stored, or the answer takes longer than `ANSWER_SECONDS`.
          RowsRefusedError: the service refuses some of them.
        """
        import grpc
        from google.api_core import exceptions
        from google.cloud.bigquery_storage_v1 import types as bq

        data = bq.AppendRowsRequest.ProtoData(rows=bq.ProtoRows(serialized_rows=rows))
        request = bq.AppendRowsRequest(proto_rows=data)
        if opening := self.opening:  # only the first request names the stream and the schema
            request.write_stream = opening["write_stream"]
            data.writer_schema = bq.ProtoSchema(proto_descriptor=opening["schema"])
            request.proto_rows = data
            self.opening = {}
        self.requests.put(request)
        timer = threading.Timer(ANSWER_SECONDS, self.answers.cancel)
        timer.start()
        try:
            answer = next(self.answers, None)
        except grpc.RpcError as error:
            raise exceptions.from_grpc_error(error) from None
        finally:
            timer.cancel()
        if answer is None:
            raise exceptions.ServiceUnavailable("the service ended the connection")
        if answer.row_errors:
            raise RowsRefusedError({row.index: row.message for row in answer.row_errors})
        if answer.error.code:
            raise exceptions.from_grpc_status(answer.error.code, answer.error.message)

    def close(self) -> None:
        self.requests.put(None)
        self.answers.cancel()


def write_client() -> Any:
    """Returns this process's client of the service, or of the stand-in."""
    return _write_client(os.environ.get(HOST_VARIABLE, ""))


@functools.cache
def _write_client(host: str) -> Any:
    from google.cloud.bigquery_storage_v1 import BigQueryWriteClient
    from google.cloud.bigquery_storage_v1.services.big_query_write import transports

    if host:
        import grpc

        channel = grpc.insecure_channel(host, options=NO_LIMITS)
        return BigQueryWriteClient(transport=transports.BigQueryWriteGrpcTransport(channel=channel))
    return BigQueryWriteClient()


def stream_of(uri: str) -> str:
    """Returns the service's name of a table's default stream."""
    found = TABLE.fullmatch(uri)
    assert found is not None, uri
    project, dataset, table = found["table"].rsplit(".", 2)
    return f"projects/{project}/datasets/{dataset}/tables/{table}/streams/_default"


def columns(kind: type[Record]) -> list[dict[str, Any]]:
    """Returns the columns of a kind's table in the form of BigQuery's JSON schemas.

    >>> columns(Draft)[0]
    {'name': 'draft_id', 'type': 'STRING', 'mode': 'REQUIRED'}
    """
    key = {"name": id_column(kind), "type": "STRING", "mode": "REQUIRED"}
    made = [
        {"name": name, **_column(field.annotation, field.is_required())}
        for name, field in kind.model_fields.items()
    ]
    return made if key in made else [key, *made]


@functools.cache
def id_column(kind: type[Record]) -> str:
    """Returns the primary key of a kind's table, e.g. `dead_letter_id`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower() + "_id"


def _column(annotation: Any, required: bool) -> dict[str, str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (annotation,) = (a for a in arguments if a is not type(None))
        return _column(annotation, False)
    if origin is typing.Annotated:
        return _column(arguments[0], required)
    mode = "REQUIRED" if required else "NULLABLE"
    item = arguments[0] if origin is tuple else annotation
    if isinstance(item, type) and issubclass(item, Record):
        return {"type": "JSON", "mode": "NULLABLE"}
    if origin is tuple:
        return {"type": _TYPES[arguments[0]], "mode": "REPEATED"}
    if origin is dict:
        return {"type": "JSON", "mode": mode}
    if origin is typing.Literal:
        return {"type": "STRING", "mode": mode}
    if isinstance(annotation, type) and issubclass(annotation, IntEnum):
        return {"type": "INTEGER", "mode": mode}
    return {"type": _TYPES[annotation], "mode": mode}


_TYPES = {
    str: "STRING", int: "INTEGER", float: "FLOAT", bool: "BOOLEAN", datetime: "TIMESTAMP"
}  # fmt: skip

_CHANGE = "_CHANGE_TYPE"  # a pseudo-column of change data capture


@functools.cache
def descriptor(kind: type[Record], upsert: bool = True) -> Any:
    """Returns the descriptor of a kind's rows: times are microseconds since 1970, JSON is text.

    https://cloud.google.com/bigquery/docs/write-api#data_type_conversions
    """
    from google.protobuf.descriptor_pb2 import DescriptorProto
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

    numbers = {
        "INTEGER": Field.TYPE_INT64, "TIMESTAMP": Field.TYPE_INT64, "FLOAT": Field.TYPE_DOUBLE,
        "BOOLEAN": Field.TYPE_BOOL,
    }  # fmt: skip
    made = DescriptorProto(name=kind.__name__)
    change = {"name": _CHANGE, "type": "STRING", "mode": "NULLABLE"}
    everything = [*columns(kind), change] if upsert else columns(kind)
    for number, column in enumerate(everything, 1):
        repeated = column["mode"] == "REPEATED"
        made.field.add(
            name=column["name"],
            number=number,
            type=numbers.get(column["type"], Field.TYPE_STRING),
            label=Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL,
        )
    return made


@functools.cache
def message_class(kind: type[Record]) -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"{kind.__name__}.proto", package="chatflow")
    file.message_type.append(descriptor(kind))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName(f"chatflow.{kind.__name__}")
    return message_factory.GetMessageClass(found)


def to_rows(record: Record, upsert: bool = True) -> list[bytes]:
    """Returns a record as a serialized row, or a dead letter as several if it is too large for one.

    Raises `ElementError`: `too_large`, for any other record.
    """
    letters = fitted(record, APPEND_BYTES) if isinstance(record, DeadLetter) else [record]
    # A compressed letter keeps the id of the original letter.
    keys = [record_id(record)] if len(letters) == 1 else map(record_id, letters)
    made = message_class(type(record))
    rows = [
        bytes(made(**_values(letter, key, upsert)).SerializeToString())
        for letter, key in zip(letters, keys, strict=True)
    ]
    check_size(record, max(map(len, rows)), APPEND_BYTES)
    return rows


@functools.cache
def _json_columns(kind: type[Record]) -> frozenset[str]:
    return frozenset(c["name"] for c in columns(kind) if c["type"] == "JSON")


def _values(record: Record, key: str, upsert: bool) -> dict[str, Any]:
    values: dict[str, Any] = {id_column(type(record)): key}
    as_json = _json_columns(type(record))
    for name in type(record).model_fields:
        value = getattr(record, name)
        if isinstance(value, datetime):
            value = round(value.timestamp() * 1_000_000)
        elif name in as_json and value is not None:
            value = pydantic_core.to_json(value, inf_nan_mode="null").decode()
        if value is not None:
            values[name] = value
    return values | ({_CHANGE: "UPSERT"} if upsert else {})


class BigQuery(Sink):
    example = "bigquery://PROJECT.DATASET.TABLE"
    pattern = re.compile("bigquery:")

    def check_uri(self, uri: str) -> None:
        if not TABLE.fullmatch(uri):
            raise UsageError(f"{uri!r} is not a table; write {self.example}")

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:
        """Refuses a table that lacks a column, or requires one that records may omit."""
        from google.cloud.bigquery_storage_v1 import types as bq

        def ask(uri: str) -> None:
            request = bq.GetWriteStreamRequest(name=stream_of(uri), view=bq.WriteStreamView.FULL)
            found = write_client().get_write_stream(request, timeout=10, retry=None)
            there = {field.name: field.mode for field in found.table_schema.fields}
            for name in uris[uri]:
                wanted = {column["name"]: column["mode"] for column in columns(KINDS[name])}
                remedy = f"infra/terraform/schemas/{name}.json has the right schema"
                if lacking := [column for column in wanted if column not in there]:
                    raise UsageError(f"{uri} has no column {', '.join(lacking)}; {remedy}")
                # The table is older: the service would reject each row without a value.
                required = bq.TableFieldSchema.Mode.REQUIRED
                if strict := [
                    c for c, mode in wanted.items() if mode != "REQUIRED" and there[c] == required
                ]:
                    raise UsageError(f"{uri} requires column {', '.join(strict)}; {remedy}")

        check_each(uris, ask, "written to", local)

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        return WriteRows(uri)
