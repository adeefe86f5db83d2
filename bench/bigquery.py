"""Measures how long rows take to be stored, by chatflow's connection and by Google's writer.

  python bench/bigquery.py

Both append the same bundles, one after another, to the same stand-in for BigQuery's Storage Write
API on loopback, as a worker's thread does: each bundle waits for its answer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from google.cloud.bigquery_storage_v1 import types as bq
from google.cloud.bigquery_storage_v1.writer import AppendRowsStream
from rich.console import Console
from rich.table import Table as Shown

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fakes.bigquery import FakeBigQuery, Table

from chatflow.records import Analysis, now
from chatflow.sinks import bigquery

URI = "bigquery://p.d.analyses"
Append = Callable[[Sequence[bytes]], None]


def ours(client: Any, stream: str) -> Append:
    return bigquery.Connection(client, stream, bigquery.descriptor(Analysis)).append


def googles(client: Any, stream: str) -> Append:
    """Appends as in Google's samples: a stream that is kept open, and a future for each request."""
    schema = bq.ProtoSchema(proto_descriptor=bigquery.descriptor(Analysis))
    data = bq.AppendRowsRequest.ProtoData(writer_schema=schema)
    writer = AppendRowsStream(client, bq.AppendRowsRequest(write_stream=stream, proto_rows=data))

    def append(rows: Sequence[bytes]) -> None:
        data = bq.AppendRowsRequest.ProtoData(rows=bq.ProtoRows(serialized_rows=rows))
        writer.send(bq.AppendRowsRequest(proto_rows=data)).result(timeout=60)

    return append


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", type=int, default=30)
    parser.add_argument("--rows", type=int, default=10, help="in a bundle")
    parsed = parser.parse_args()
    analysis = Analysis(
        analysis_id="0", chat_id="7", user_id="c", revision=1, sentiment=-1, summary="Late. " * 20,
        model="m", prompt_version="v", analysed_at=now(),
    )  # fmt: skip
    shown = Shown("", "median ms", "worst ms", "ratio", title=f"{parsed.rows} rows a bundle")
    medians = []
    for name, side in (("google-cloud-bigquery-storage's writer", googles), ("chatflow", ours)):
        with FakeBigQuery() as fake:
            fake.tables["p.d.analyses"] = Table(bigquery.columns(Analysis), "analysis_id")
            os.environ[bigquery.HOST_VARIABLE] = fake.host
            append = side(bigquery.write_client(), bigquery.stream_of(URI))
            seconds = []
            for bundle in range(parsed.bundles + 1):
                rows = [
                    row
                    for i in range(parsed.rows)
                    for row in bigquery.to_rows(
                        analysis.model_copy(update={"analysis_id": f"{bundle}-{i}"})
                    )
                ]
                began = time.perf_counter()
                append(rows)
                seconds.append(time.perf_counter() - began)
            assert len(fake.tables["p.d.analyses"].rows) == (parsed.bundles + 1) * parsed.rows
        seconds = seconds[1:]  # the first one connects
        medians.append(statistics.median(seconds))
        shown.add_row(
            name, f"{medians[-1] * 1000:.2f}", f"{max(seconds) * 1000:.2f}",
            f"{medians[0] / medians[-1]:.0f}",
        )  # fmt: skip
    Console().print(shown)
    os._exit(0)  # the writer's threads would keep the process


if __name__ == "__main__":
    main()
