"""Measures the remote path and Beam's own handlers, with the same stand-in service on loopback.

    python bench/remote.py            # all parts, seven minutes
    python bench/remote.py --quick    # tries the script itself

The stand-in (tests/fakes) runs in a separate process and answers after 200 ms. Each side is a
Beam pipeline of `RunInference` on the same runner, timed as a whole after a first one of two
prompts. Both sides use the real google-genai and aiplatform. Beam's handlers run in the way that
returns right results: one prompt per call (a batch is one call, whose answers are those to its
first prompt, or are lost), with `with_exception_handling`. Parts:

- throughput without faults, and with 429 for 10 % of calls and a Retry-After of one second;
- what is lost of 64 prompts under single faults, also with Beam's batches of eight;
- a quota of 40 calls a second: how much of it is used, and how much is refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import google.auth
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from google.auth.credentials import AnonymousCredentials
from google.oauth2.credentials import Credentials
from rich.console import Console
from rich.table import Table

from chatflow.models.remote.handler import RemoteLanguageModelHandler
from chatflow.models.requests import Failure, Part, Request
from chatflow.options import RemoteSettings
from chatflow.running.runner import LOCAL_RUNNER

ROOT = Path(__file__).parent.parent
ENDPOINT = "projects/p/locations/us-central1/endpoints/1001"
GEMINI = "gemini-2.5-flash"
IN_FLIGHT = 64
LATENCY = 0.2
TOKENS = 64


class StandIn:
    """The stand-in in a separate process."""

    def __enter__(self) -> StandIn:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes"], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.address = json.loads(self._process.stdout.readline())["address"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def behave(self, **behaviour: Any) -> None:
        self._control({"latency": LATENCY, **behaviour})

    def stats(self, since: float = 0, until: float = 1e9) -> dict[str, Any]:
        found: dict[str, Any] = self._control(None, f"?since={since}&until={until}")
        return found

    def _control(self, content: Any, query: str = "") -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/_control{query}", data, headers)
        with urllib.request.urlopen(request) as response:
            return json.loads(response.read())


@contextlib.contextmanager
def beams_handlers_at(address: str) -> Iterator[None]:
    """Makes Beam's unchanged handlers call the stand-in, without credentials."""
    from google.cloud import aiplatform

    os.environ["GOOGLE_VERTEX_BASE_URL"] = address
    aiplatform.init(
        project="p",
        location="us-central1",
        credentials=AnonymousCredentials(),
        api_endpoint=address,
        api_transport="rest",
    )
    before = google.auth.default
    google.auth.default = lambda *_, **__: (Credentials(token="none"), "p")
    yield
    google.auth.default = before


# A side returns a handler, and a function from a prompt's number to its element.


def ours(name: str, address: str) -> tuple[Any, Callable[[int], Any]]:
    settings = RemoteSettings(
        project="p", location="us-central1", api_endpoint=address, max_in_flight=IN_FLIGHT
    )

    def element(number: int) -> Request:
        part = Part(field=None, prompt=prompt(number), max_tokens=TOKENS)
        return Request(str(number), "analysis", str(number), "c", (part,))

    return RemoteLanguageModelHandler(name, settings), element


def beams_gemini(batch: int = 1) -> tuple[Any, Callable[[int], Any]]:
    from apache_beam.ml.inference.gemini_inference import (
        GeminiModelHandler,
        generate_from_string,
    )

    handler = GeminiModelHandler(
        GEMINI, generate_from_string, project="p", location="us-central1",
        min_batch_size=batch, max_batch_size=batch,
    )  # fmt: skip
    return handler, prompt


def beams_vertex(batch: int = 1) -> tuple[Any, Callable[[int], Any]]:
    from apache_beam.ml.inference.vertex_ai_inference import VertexAIModelHandlerJSON

    def element(number: int) -> dict[str, Any]:
        limits = {"max_tokens": TOKENS, "temperature": 0}
        if batch > 1:  # a chat completion is one call
            return {"prompt": prompt(number), **limits}
        message = {"role": "user", "content": prompt(number)}
        return {"@requestFormat": "chatCompletions", "messages": [message], **limits}

    handler = VertexAIModelHandlerJSON(
        "1001", "p", "us-central1", min_batch_size=batch, max_batch_size=batch
    )
    return handler, element


def prompt(number: int) -> str:
    return f"prompt {number} of a customer who says: thank you, that was quick"


RESULTS: collections.Counter[tuple[str, int]] = collections.Counter()


def note(keyed: tuple[int, Any]) -> None:
    number, result = keyed
    text = result.inference
    failed = isinstance(text, Failure)
    text = json.dumps(text, default=str) if not hasattr(text, "text") else text.text or ""
    RESULTS["failed" if failed else "answered", number] += 1


def note_dead(item: Any) -> None:
    elements, _ = item
    for number, _ in elements:
        RESULTS["failed", number] += 1


def run(
    handler: Any, element: Callable[[int], Any], count: int, threads: int = 1
) -> dict[str, Any]:
    """Runs one pipeline; returns how many were answered, failed, lost and doubled, and seconds."""
    RESULTS.clear()
    infer: Any = RunInference(KeyedModelHandler(handler))
    beams = not isinstance(handler, RemoteLanguageModelHandler)
    flags = [f"--runner={LOCAL_RUNNER}", f"--direct_num_workers={threads}"]
    if threads > 1:
        flags.append("--direct_running_mode=multi_threading")
    started = time.monotonic()
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        elements = (
            pipeline
            | beam.Create(range(count))
            | beam.Reshuffle()
            | beam.Map(lambda number: (number, element(number)))
        )
        if beams:
            good, bad = elements | infer.with_exception_handling()
            bad.failed_inferences | beam.Map(note_dead)
        else:
            good = elements | infer
        good | "Note" >> beam.Map(note)
    seconds = time.monotonic() - started
    answered = {number for kind, number in RESULTS if kind == "answered"}
    failed = {number for kind, number in RESULTS if kind == "failed"}
    return {
        "asked": count,
        "answered": len(answered),
        "failed": len(failed - answered),
        "lost": count - len(answered | failed),
        "doubled": sum(times > 1 for times in RESULTS.values()),
        "seconds": round(seconds, 2),
        "a_second": round(len(answered) / seconds, 2),
    }


def throughput(stand_in: StandIn, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures by fault and side."""
    faults = {"no faults": {}, "10 % 429": {"rates": {"429": 0.1}, "retry_after": 1}}
    few, many = (6, 64) if options.quick else (120, 2000)
    figures: dict[str, Any] = {}
    for fault, behaviour in faults.items():
        sides: list[tuple[str, tuple[Any, Callable[[int], Any]], int, int]] = [
            ("chatflow, Gemini", ours(GEMINI, stand_in.address), many, 1),
            ("chatflow, endpoint", ours(ENDPOINT, stand_in.address), many, 1),
            ("Beam's GeminiModelHandler", beams_gemini(), few, 1),
            ("Beam's VertexAIModelHandlerJSON", beams_vertex(), few, 1),
            ("Beam's GeminiModelHandler, 16 threads", beams_gemini(), 4 * few, 16),
            ("Beam's VertexAIModelHandlerJSON, 16 threads", beams_vertex(), 4 * few, 16),
        ]
        for name, side, count, threads in sides:
            stand_in.behave()
            run(*side, 2, threads)
            stand_in.behave(**behaviour)
            row = run(*side, count, threads)
            saw = stand_in.stats()
            row |= {"calls": saw["calls"], "early": saw["before_retry_after"]}
            row["peak"] = saw["peak_in_flight"]
            figures.setdefault(fault, {})[name] = row
            print(f"{fault}: {name}: {row}", file=sys.stderr)
    return figures


LOSSES: dict[str, dict[str, Any]] = {
    "no fault": {},
    "one poison prompt (400)": {"match": {"prompt 7 ": "400"}},
    "one reset": {"script": ["ok", "reset"]},
    "one reply without predictions": {"script": ["ok", "empty"]},
    "one reply with one fewer": {"script": ["ok", "fewer"]},
    "one malformed reply": {"script": ["ok", "malformed"]},
    "one call that hangs": {"script": ["ok", "hang"]},
}


def losses(stand_in: StandIn, options: argparse.Namespace) -> dict[str, Any]:
    """Returns by fault and side what happened to 64 prompts."""
    count = 8 if options.quick else 64
    figures: dict[str, Any] = {}
    for fault, behaviour in LOSSES.items():
        sides = {
            "chatflow, Gemini": ours(GEMINI, stand_in.address),
            "chatflow, endpoint": ours(ENDPOINT, stand_in.address),
        }
        if fault != "one call that hangs":  # Beam's handlers have no time-out
            sides |= {
                "Beam, Gemini": beams_gemini(),
                "Beam, Vertex": beams_vertex(),
                "Beam, Gemini, batches of 8": beams_gemini(8),
                "Beam, Vertex, batches of 8": beams_vertex(8),
            }
        for name, (handler, element) in sides.items():
            if hasattr(handler, "settings"):
                handler.settings = dataclasses.replace(handler.settings, request_timeout=2.0)
            script = list(behaviour.get("script", ()))
            stand_in.behave(**{**behaviour, "script": script}, latency=0.01)
            figures.setdefault(fault, {})[name] = run(handler, element, count)
    return figures


def quota(stand_in: StandIn, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the share used of 40 calls a second, in half a minute after ten seconds."""
    figures = {}
    since, until, count = (1, 3, 120) if options.quick else (10, 40, 2000)
    for name, model in (("Gemini", GEMINI), ("endpoint", ENDPOINT)):
        side = ours(model, stand_in.address)
        stand_in.behave(quota=40, retry_after=1)
        row = run(*side, count)
        saw = stand_in.stats(since, until)
        refused = saw["faults"].get("429", 0)
        figures[name] = {
            **row,
            "used": round((saw["calls"] - refused) / saw["seconds"] / 40, 3),
            "refused": round(refused / saw["calls"], 3),
        }
    return figures


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    names = ("asked", "answered", "failed", "lost", "seconds", "a_second", "calls", "early", "peak")
    for fault, sides in figures.get("throughput", {}).items():
        table = Table(title=f"{LATENCY * 1000:.0f} ms, {fault}")
        table.add_column("")
        for column in (*names, "ratio"):
            table.add_column(column.replace("_", " "), justify="right")
        best = {"Gemini": sides["chatflow, Gemini"], "Vertex": sides["chatflow, endpoint"]}
        for name, row in sides.items():
            against = best["Gemini" if "Gemini" in name else "Vertex"]["a_second"]
            ratio = (
                "" if name.startswith("chatflow") else f"{against / max(row['a_second'], 1e-9):.1f}"
            )
            table.add_row(name, *(f"{row[column]:,}" for column in names), ratio)
        console.print(table)
    if "losses" in figures:
        table = Table(title="answered / failed / lost")
        rows = figures["losses"]
        sides = list(rows["no fault"])
        for column in ("", *sides):
            table.add_column(column)
        for fault, found in rows.items():
            cells = [
                "{answered} / {failed} / {lost}".format(**found[side]) if side in found else "-"
                for side in sides
            ]
            table.add_row(fault, *cells)
        console.print(table)
    for name, row in figures.get("quota", {}).items():
        console.print(
            f"a quota of 40 a second, {name}: {row['used']:.1%} used, {row['refused']:.1%} refused"
        )


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default="throughput,losses,quota")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    parts = {"throughput": throughput, "losses": losses, "quota": quota}
    figures: dict[str, Any] = {}
    with StandIn() as stand_in, beams_handlers_at(stand_in.address):
        for name in options.parts.split(","):
            figures[name] = parts[name](stand_in, options)
    print(json.dumps(figures)) if options.json else show(figures)


if __name__ == "__main__":
    # Beam copies the contents of the main module to its workers, also RESULTS.
    import remote

    remote.bench()
