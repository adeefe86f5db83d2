"""`chatflow run` and `replay`: checks all that can be checked, then runs the pipeline."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import apache_beam as beam
from apache_beam.options.pipeline_options import StandardOptions
from apache_beam.pipeline import PipelineVisitor
from rich.console import Console

from chatflow.errors import FAILED, UsageError
from chatflow.options import Options
from chatflow.running.runner import (
    beam_options,
    check_credentials,
    cloud_of,
    is_dataflow,
    is_local,
    quieten,
)

if TYPE_CHECKING:
    from chatflow.pipeline import Plan
    from chatflow.running.summary import Summary


def execute(
    options: Options, flags: Sequence[str], replay: bool = False, drafts: bool = True
) -> Summary:
    """Checks everything, runs the pipeline to its end, and returns the counts.

    Raises:
      UsageError: before anything runs.
      SystemExit: with code 1, if the pipeline fails.
    """
    from chatflow.running import terminal
    from chatflow.running.summary import Summary

    console = Console(stderr=True)
    planned, pipeline = prepare(options, flags, console, replay, drafts)
    started = time.monotonic()
    # Other runners keep counts in other processes, and show progress themselves.
    shown = terminal.progress(console) if is_local(pipeline.options) else contextlib.nullcontext()
    with failures(planned), shown:
        result = pipeline.run()
        finish(result, console)
    return Summary.of(result, time.monotonic() - started, planned)


def start(options: Options, flags: Sequence[str], replay: bool = False) -> None:
    """Starts a pipeline on another runner and prints its job id; raises as `execute` does."""
    planned, pipeline = prepare(options, flags, Console(stderr=True), replay)
    with failures(planned):
        result = pipeline.run()
    # A Flex Template's launcher only writes the job down; there is no job id yet.
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
        print(
            f"chatflow: the pipeline failed: {type(error).__name__}: {last[0]} "
            "(--debug shows the whole traceback)",
            file=sys.stderr,
        )
        raise SystemExit(FAILED) from None
    finally:
        planned.model.forget()


def prepare(
    options: Options,
    flags: Sequence[str],
    console: Console,
    replay: bool = False,
    drafts: bool = True,
) -> tuple[Plan, Any]:
    """Checks and builds a pipeline; raises `UsageError` for a wrong flag, file or setting."""
    from chatflow.pipeline import build, plan
    from chatflow.sinks.write import by_sink, shown
    from chatflow.sources.read import check_input, check_messages, is_stream

    own_flags = [shown(flag) for flag in options.flags()]
    beam_flags = beam_options(flags, is_stream(options.input), own_flags)
    local = is_local(beam_flags)
    quieten(local)
    inputs = check_input(options.input)
    planned = plan(options, cloud_of(beam_flags, options), replay, drafts)
    check_accelerator(planned, beam_flags)
    try:
        pipeline = beam.Pipeline(options=beam_flags)
        build(pipeline, planned)
    except ValueError as error:  # Beam's own check of its flags and of names
        raise UsageError("; ".join(filter(None, str(error).splitlines()))) from None
    if local:
        check_messages(options.input)
    else:
        check_credentials(beam_flags)
    sinks = by_sink(planned.destinations).items()
    for sink, uris in sinks:
        sink.check(uris, planned.sink_settings, local, share_files=not is_dataflow(beam_flags))
    say = functools.partial(console.print, highlight=False, markup=False)
    for spec in planned.routes.specs:
        if local:
            spec.kind.prepare(spec, say)
        if options.check_endpoint:
            spec.kind.check_service(spec, local, say)
    if removed := sum(s.prepare(uris, inputs, planned.streaming, local) for s, uris in sinks):
        console.print(f"replacing {removed} result files of an earlier run")
    return planned, pipeline


def finish(result: Any, console: Console) -> None:
    """Waits for a pipeline; drains a stream at the first Ctrl-C or SIGTERM."""
    if not hasattr(result, "drain"):
        result.wait_until_finish()
        return
    with sigterm_interrupts():
        try:
            result.wait_until_finish()
        except KeyboardInterrupt:
            console.print("draining: what was read is finished; Ctrl-C again stops at once")
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

    Before it runs, checks what chatflow's transforms read and write as `chatflow run` does, raises
    `UsageError` if that fails, and removes result files of an earlier run. The first Ctrl-C drains
    a stream. With `--no_wait_until_finish`, returns when the job has started.
    """
    from chatflow.sinks.write import sink_of
    from chatflow.sources.read import check_messages, files_of

    parts = _Parts()
    pipeline.visit(parts)
    local = is_local(pipeline.options)
    inputs = [path for read in parts.files for path in files_of(read.pattern, "ReadLines")]
    if local:
        for messages in parts.messages:
            check_messages(messages.path)
    else:
        check_credentials(pipeline.options)
    share_files = not is_dataflow(pipeline.options)
    written = [(sink_of(uri), uri, to.settings) for to in parts.writes for uri in to.destinations]
    for sink, uri, settings in written:
        sink.check({uri: ()}, settings, local, share_files)
    for sink, uri, settings in written:
        sink.prepare({uri: ()}, inputs, settings.streaming, local)
    try:
        result = pipeline.run()
        if not pipeline.options.view_as(StandardOptions).no_wait_until_finish:
            finish(result, Console(stderr=True))
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
        self._known = {
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
    """Makes SIGTERM act as Ctrl-C inside the context."""
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
