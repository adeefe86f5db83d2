"""A stand-in for BigQuery's Storage Write API on loopback (gRPC), for Google's own client.

It keeps the rows of tables' default streams, upserts by primary key if rows ask for it, and
refuses what the service refuses: unknown tables and fields, upserts without a primary key.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import grpc
from google.cloud.bigquery_storage_v1 import types as bq
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

SERVICE = "google.cloud.bigquery.storage.v1.BigQueryWrite"
FIELD = descriptor_pb2.FieldDescriptorProto
WIRE = {
    "STRING": FIELD.TYPE_STRING, "JSON": FIELD.TYPE_STRING,
    "INTEGER": FIELD.TYPE_INT64, "TIMESTAMP": FIELD.TYPE_INT64, "FLOAT": FIELD.TYPE_DOUBLE,
    "BOOLEAN": FIELD.TYPE_BOOL,
}  # fmt: skip
TYPES = {
    "STRING": "STRING",
    "INTEGER": "INT64",
    "TIMESTAMP": "TIMESTAMP",
    "JSON": "JSON",
    "FLOAT": "DOUBLE",
    "BOOLEAN": "BOOL",
}


class Table:
    def __init__(self, columns: Sequence[Mapping[str, Any]], key: str = ""):
        self.columns = {column["name"]: column for column in columns}
        self.key = key
        self.rows: list[dict[str, Any]] = []

    def fits(self, schema: descriptor_pb2.DescriptorProto) -> str:
        """Returns why rows of this form are refused, or an empty text."""
        for field in schema.field:
            if field.name == "_CHANGE_TYPE":
                if not self.key:
                    return "_CHANGE_TYPE needs a primary key"
            elif field.name not in self.columns:
                return f"there is no column {field.name}"
            elif WIRE[self.columns[field.name]["type"]] != field.type:
                return f"column {field.name} is of another type"
        return ""

    def refuses(self, row: dict[str, Any]) -> str:
        """Returns why the row is refused, or an empty text."""
        for name, column in self.columns.items():
            if column["mode"] == "REQUIRED" and name not in row:
                return f"field {name} is required"
            if len(str(row.get(name, ""))) > int(column.get("maxLength", 1 << 62)):
                return f"field {name} is too long"
        return ""

    def add(self, row: dict[str, Any]) -> None:
        if row.pop("_CHANGE_TYPE", None) == "UPSERT":
            self.rows = [kept for kept in self.rows if kept[self.key] != row[self.key]]
        self.rows.append(row)


class FakeBigQuery:
    """Starts on a free port; use as a context manager.

    Attributes:
      tables: by `PROJECT.DATASET.TABLE`.
      faults: what happens to the next appends, one after another: a status code before the
        rows are taken; "lost": they are taken, then the connection breaks; "hang".
    """

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.faults: collections.deque[Any] = collections.deque()
        self.appends = self.connections = 0
        self._lock = threading.Lock()

    def __enter__(self) -> FakeBigQuery:
        self._server = grpc.server(
            futures.ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", -1)]
        )
        handlers = {
            "AppendRows": grpc.stream_stream_rpc_method_handler(
                self._append,
                bq.AppendRowsRequest.deserialize,
                bq.AppendRowsResponse.serialize,
            ),
            "GetWriteStream": grpc.unary_unary_rpc_method_handler(
                self._get, bq.GetWriteStreamRequest.deserialize, bq.WriteStream.serialize
            ),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((handler,))
        self.host = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None)

    def _table(self, stream: str, context: grpc.ServicerContext) -> Table:
        _, project, _, dataset, _, table, *_ = stream.split("/")
        found = self.tables.get(f"{project}.{dataset}.{table}")
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{stream} does not exist")
        return found

    def _get(self, request: Any, context: grpc.ServicerContext) -> Any:
        fields = [
            bq.TableFieldSchema(
                name=column["name"],
                type_=bq.TableFieldSchema.Type[TYPES[column["type"]]],
                mode=bq.TableFieldSchema.Mode[column["mode"]],
            )
            for column in self._table(request.name, context).columns.values()
        ]
        return bq.WriteStream(name=request.name, table_schema=bq.TableSchema(fields=fields))

    def _append(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        table, row_class = None, None
        self.connections += 1
        for request in requests:
            if len(bq.AppendRowsRequest.serialize(request)) > 10_000_000:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is too large")
            if row_class is None:
                table = self._table(request.write_stream, context)
                schema = request.proto_rows.writer_schema.proto_descriptor
                if refused := table.fits(schema):
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, refused)
                row_class = _row_class(schema)
            with self._lock:
                fault = self.faults.popleft() if self.faults else None
                while fault == "hang" and context.is_active():
                    time.sleep(0.01)
                if isinstance(fault, grpc.StatusCode):
                    context.abort(fault, "as the test wants it")
                rows = [
                    json_format.MessageToDict(
                        row_class.FromString(row), preserving_proto_field_name=True
                    )
                    for row in request.proto_rows.rows.serialized_rows
                ]
                errors = list(map(table.refuses, rows))
                for row in rows if not any(errors) else []:
                    table.add(row)
                self.appends += 1
            if fault == "lost":
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            if any(errors):
                yield bq.AppendRowsResponse(
                    error={"code": 3, "message": next(filter(None, errors))},
                    row_errors=[bq.RowError(index=i, message=e) for i, e in enumerate(errors) if e],
                )
            else:
                yield bq.AppendRowsResponse(append_result=bq.AppendRowsResponse.AppendResult())


def _row_class(schema: Any) -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="row.proto", package="fake")
    file.message_type.append(schema)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"fake.{schema.name}"))
