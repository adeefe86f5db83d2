"""Runs the pipeline of `chatflow run` and `replay`, after checking all that can be checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions
from apache_beam.pipeline import PipelineVisitor
from rich.console import Console

from chatflow.errors import FAILED, UsageError
from chatflow.options import Options
from chatflow.records import now
from chatflow.running.early import let_results_pass
from chatflow.running.runner import (
    beam_options,
    check_credentials,
    cloud_of,
    is_dataflow,
    is_local,
    quieten,
)
from chatflow.sinks.staging import Results, open_results

if TYPE_CHECKING:
    from chatflow.pipeline import Plan
    from chatflow.running.summary import Summary


class Prepared(NamedTuple):
    """A pipeline that was checked and built, and the files that it will write."""

    plan: Plan
    pipeline: beam.Pipeline
    results: Results
    inputs: list[str]


def execute(
    options: Options, flags: Sequence[str], replay: bool = False, drafts: bool = True
) -> Summary:
    """Checks everything, runs the pipeline to its end, and returns the counts.

    Files of an earlier run are replaced when this one has succeeded; otherwise they stay, also if
    no line of the input could be read.

    Raises:
      UsageError: before anything runs.
      SystemExit: with code 1, if the pipeline fails.
    """
    from chatflow.running import terminal
    from chatflow.running.manifest import Manifest, models_of, shown_flags
    from chatflow.running.summary import Summary

    console = Console(stderr=True)
    began = now()
    with prepare(options, flags, console, replay, drafts) as prepared:
        planned, pipeline, results, inputs = prepared
        manifest = Manifest(began, inputs, models_of(planned), shown_flags(options))
        started = time.monotonic()
        # Other runners keep counts in other processes, and show progress themselves.
        local = is_local(pipeline.options)
        shown = options.show > 0 and options.summary != "json"
        progress = terminal.progress(console, shown) if local else contextlib.nullcontext()
        in_process = pipeline.options.view_as(DirectOptions).direct_running_mode == "in_memory"
        ahead = planned.model.handler.ahead() if local and in_process else contextlib.nullcontext()
        with failures(planned), sigterm_interrupts():
            with progress, ahead:
                result = pipeline.run()
                finish(result, console)
            summary = Summary.of(result, time.monotonic() - started, planned)
            if summary.nothing_read and results.earlier:
                return dataclasses.replace(summary, kept_earlier=True)
            results.commit(lambda: manifest.content(summary.counts_only()))
        return summary


def start(options: Options, flags: Sequence[str], replay: bool = False) -> None:
    """Starts a pipeline on another runner and prints its job id; raises as `execute` does."""
    console = Console(stderr=True)
    with prepare(options, flags, console, replay) as prepared, failures(prepared.plan):
        result = prepared.pipeline.run()
    # A Flex Template's launcher only writes the job's description; there is no job id yet.
    job_id = result.job_id() if getattr(result, "has_job", False) else None
    if options.summary == "json":
        print(json.dumps({"job_id": job_id}))
    elif job_id:
        print(f"started: {job_id}")


@contextlib.contextmanager
def failures(planned: Plan) -> Iterator[None]:
    """Reports a failed pipeline in one line, and exits with code 1."""
    try:
        yield
    except Exception as error:
        if "KeyboardInterrupt" in str(error):  # as Beam's local runner passes it on
            raise KeyboardInterrupt from None
        logging.getLogger(__name__).debug("the pipeline failed", exc_info=error)
        last = str(error).strip().splitlines()[-1:] or [""]
        if planned.redactor:
            last = [planned.redactor.line(last[0])]
        print(
            f"chatflow: the pipeline failed: {type(error).__name__}: {last[0]} "
            "(--debug shows the whole traceback)",
            file=sys.stderr,
        )
        raise SystemExit(FAILED) from None
    finally:
        planned.model.forget()


@contextlib.contextmanager
def prepare(
    options: Options,
    flags: Sequence[str],
    console: Console,
    replay: bool = False,
    drafts: bool = True,
) -> Iterator[Prepared]:
    """Checks and builds a pipeline, and locks its output folders until the context ends.

    Cheap checks come before services are asked and a model is fetched.
    Raises `UsageError` for a wrong flag, file or setting.
    """
    from chatflow.pipeline import build, plan
    from chatflow.running.manifest import shown_flags
    from chatflow.sinks.write import by_sink, is_file, shown
    from chatflow.sources.chats import customs_by
    from chatflow.sources.lines import about
    from chatflow.sources.read import check_input, check_messages, is_stream

    own_flags = [shown(flag) for flag in options.flags()]
    beam_flags = beam_options(flags, is_stream(options.input), own_flags)
    local = is_local(beam_flags)
    quieten(local)
    inputs = check_input(options.input, customs_by(options))
    planned = plan(options, cloud_of(beam_flags, options), replay, drafts)
    check_earlier(planned, local, not is_dataflow(beam_flags))
    check_accelerator(planned, beam_flags)
    try:
        pipeline = beam.Pipeline(options=beam_flags)
        build(pipeline, planned)
    except ValueError as error:  # Beam's own check of its flags and of names
        raise UsageError("; ".join(filter(None, str(error).splitlines()))) from None
    written = {**planned.destinations, "keep_raw": tuple(filter(None, [options.keep_raw]))}
    prefixes = [uri for uris in written.values() for uri in uris if is_file(uri)]
    command = " ".join(["chatflow", *shown_flags(options)])
    say = functools.partial(console.print, highlight=False, markup=False)
    with open_results(prefixes, inputs, planned.streaming, local, command) as results:
        tell(results, say)
        if local:
            check_messages(options.input)
            for path in inputs[:1]:
                if found := about(path, planned.customs):
                    say(f"{path} is {found}", soft_wrap=True)
        else:
            check_credentials(beam_flags)
        share_files = not is_dataflow(beam_flags)
        written["answers"] = tuple(filter(None, [options.answers]))
        for sink, uris in by_sink(written).items():
            sink.check(uris, planned.sink_settings, local, share_files)
        if local and planned.redactor and planned.redactor.dlp:
            planned.redactor.dlp.check()
        for spec in planned.routes.specs:
            if local:
                spec.kind.prepare(spec, say)
            if options.check_endpoint:
                spec.kind.check_service(spec, local, say)
        results.stage(pipeline)
        if local and not planned.streaming:
            let_results_pass(pipeline)
        yield Prepared(planned, pipeline, results, inputs)


def check_earlier(planned: Plan, local: bool, share_files: bool) -> None:
    """Raises `UsageError` if `--skip_done` names no results, or those that the run will replace."""
    from chatflow.sinks.tables import ending_of
    from chatflow.sinks.write import is_file
    from chatflow.sources.read import files_of
    from chatflow.sources.results import DATABASE, check_results

    place = planned.options.skip_done
    if DATABASE.match(place):
        check_results(place, planned.options.database_password, local, share_files)
        return

    def real(path: str) -> str:
        return path if "://" in path else os.path.realpath(path)

    replaced = [real(uri) for uris in planned.destinations.values() for uri in uris if is_file(uri)]
    for path in files_of(place, "--skip_done") if place else ():
        if ending_of(path):
            raise UsageError(
                f"--skip_done={place}: {path} is a table, which lacks parts of the results; "
                "name JSON Lines, e.g. 'results/*.jsonl', or a database"
            )
        if real(path).startswith(tuple(replaced)):
            raise UsageError(
                f"--skip_done={place}: the run would replace {path}; write the rest elsewhere"
            )


def tell(results: Results, say: Callable[[str], Any]) -> None:
    """Prints what happens to the files of earlier runs."""
    if results.finished:
        say(f"put {results.finished} files of a run in place that was stopped before it did so")
    if results.earlier:
        say(f"{results.earlier} result files of an earlier run stay until this one has succeeded")


def finish(result: Any, console: Console) -> None:
    """Waits for a pipeline; drains a stream at the first Ctrl-C or SIGTERM."""
    if not hasattr(result, "drain"):
        result.wait_until_finish()
        return
    with sigterm_interrupts():
        try:
            result.wait_until_finish()
        except KeyboardInterrupt:
            console.print("draining: finishing what was read; Ctrl-C again stops at once")
            result.drain()
            result.wait_until_finish()


def new_pipeline(flags: Sequence[str] = (), streaming: bool = False) -> beam.Pipeline:
    """Returns a pipeline of your own, on this machine or on the runner that Beam's flags name.

    Set `streaming` if its input never ends. Raises `UsageError` if Beam does not know a flag.
    """
    options = beam_options(flags, streaming)
    quieten(is_local(options))
    return beam.Pipeline(options=options)


def launch(pipeline: beam.Pipeline) -> Any:
    """Runs a pipeline of your own, and returns Beam's `PipelineResult` when it has ended.

    Before it runs, checks what chatflow's transforms read and write as `chatflow run` does, and
    raises `UsageError` if that fails. Files of an earlier run are replaced when this one has
    succeeded. The first Ctrl-C drains a stream. With `--no_wait_until_finish`, returns when the job
    has started.
    """
    from chatflow.running.manifest import Manifest
    from chatflow.running.summary import counts_of
    from chatflow.sinks.write import is_file, sink_of
    from chatflow.sources.read import check_messages, files_of

    began = now()
    parts = _Parts()
    pipeline.visit(parts)
    local = is_local(pipeline.options)
    inputs = [path for read in parts.files for path in files_of(read.pattern, "ReadLines")]
    written = [(uri, to.settings) for to in parts.writes for uri in to.destinations]
    prefixes = [uri for uri, _ in written if is_file(uri)]
    streaming = any(settings.streaming for _, settings in written)
    manifest = Manifest(began, inputs)
    console = Console(stderr=True)
    with open_results(prefixes, inputs, streaming, local, "launch()") as results:
        if local:
            for messages in parts.messages:
                check_messages(messages.path)
        else:
            check_credentials(pipeline.options)
        share_files = not is_dataflow(pipeline.options)
        for uri, settings in written:
            sink_of(uri).check({uri: ()}, settings, local, share_files)
        results.stage(pipeline)
        try:
            with sigterm_interrupts():
                result = pipeline.run()
                if not pipeline.options.view_as(StandardOptions).no_wait_until_finish:
                    finish(result, console)
                results.commit(lambda: manifest.content(counts_of(result.metrics().query())))
        finally:
            for asked in parts.models:
                asked.model.forget()
    return result


class _Parts(PipelineVisitor):
    """Collects the transforms of a pipeline that `launch` needs to know."""

    def __init__(self) -> None:
        from chatflow.sinks.write import WriteRecords
        from chatflow.sources.read import ReadLines, ReadMessages
        from chatflow.stages.ask import AskModel

        self.files: list[Any] = []
        self.messages: list[Any] = []
        self.writes: list[Any] = []
        self.models: list[Any] = []
        self._known: dict[type, list[Any]] = {
            ReadLines: self.files,
            ReadMessages: self.messages,
            WriteRecords: self.writes,
            AskModel: self.models,
        }

    def enter_composite_transform(self, node: Any) -> None:
        if (known := self._known.get(type(node.transform))) is not None:
            known.append(node.transform)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM act as Ctrl-C inside the context, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_accelerator(planned: Plan, options: Any) -> None:
    """Raises `UsageError` if a model needs a GPU on Dataflow, and no flag asks for one."""
    from apache_beam.options.pipeline_options import DebugOptions, GoogleCloudOptions

    services = options.view_as(GoogleCloudOptions).dataflow_service_options or ()
    experiments = options.view_as(DebugOptions).experiments or ()
    if (
        planned.options.accelerator
        or not is_dataflow(options)
        or any("worker_accelerator=" in flag for flag in (*services, *experiments))
    ):
        return
    for spec in planned.routes.specs:
        if spec.kind.needs_accelerator:
            raise UsageError(
                f"--model={spec.name}: vLLM needs a GPU; give e.g. "
                "--accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
            )
