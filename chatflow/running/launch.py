"""`chatflow run` and `replay`: checks all that can be checked, then runs the pipeline."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from chatflow.errors import FAILED, UsageError, one_line
from chatflow.options import Cloud, Options, Parser

if TYPE_CHECKING:
    from rich.console import Console

    from chatflow.models.spec import ModelSpec
    from chatflow.pipeline import Plan
    from chatflow.running.summary import Summary

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


LOCAL_STREAM_RUNNER = "chatflow.running.local.LocalStreamRunner"


def execute(
    options: Options, flags: Sequence[str], replay: bool = False, drafts: bool = True
) -> Summary:
    """Checks everything, runs the pipeline, and waits for it; see `pipeline.Plan`.

    Returns:
      the counts.

    Raises:
      UsageError: before anything runs.
      SystemExit: with code 1, when the pipeline fails.
    """
    from rich.console import Console

    from chatflow.running import terminal
    from chatflow.running.summary import Summary

    console = Console(stderr=True)
    planned, pipeline = prepare(options, flags, console, replay, drafts)
    started = time.monotonic()
    # Elsewhere, counts are not in this process, and the runner says how it goes on.
    shown = terminal.progress(console) if is_local(pipeline.options) else contextlib.nullcontext()
    with failures(planned), shown:
        result = pipeline.run()
        finish(result, console)
    return Summary.of(result, time.monotonic() - started, planned)


def launch(options: Options, flags: Sequence[str], replay: bool = False) -> None:
    """Starts a pipeline that another runner runs, and prints by what id it is known there.

    Raises:
      as `execute`.
    """
    from rich.console import Console

    planned, pipeline = prepare(options, flags, Console(stderr=True), replay)
    with failures(planned):
        result = pipeline.run()
    # A Flex Template's launcher only writes the job down, so that there is none yet.
    job_id = result.job_id() if getattr(result, "has_job", False) else None
    if options.summary == "json":
        print(json.dumps({"job_id": job_id}))
    elif job_id:
        print(f"started: {job_id}")


@contextlib.contextmanager
def failures(planned: Plan) -> Iterator[None]:
    """Says of a failed pipeline what failed, in a line, and ends with exit code 1."""
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
    """Checks everything that can be checked before a pipeline runs, and builds it.

    Raises:
      UsageError: a wrong flag, file or setting.
    """
    import apache_beam as beam

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
    if local:
        prepare_model(planned, console)
    for spec in planned.routes.specs:
        if spec.is_remote and options.check_endpoint == "true":
            check_model(spec, local, console)
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


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Meanwhile, SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_dataflow(options: Any) -> bool:
    from apache_beam.options.pipeline_options import StandardOptions

    return bool(options.view_as(StandardOptions).runner == "DataflowRunner")


def check_credentials(options: Any) -> None:
    """Makes sure that a job can be sent to Google Cloud at all.

    Raises:
      UsageError: there are no credentials.
    """
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    if not is_dataflow(options) or options.view_as(GoogleCloudOptions).no_auth:
        return
    import google.auth

    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        raise UsageError(
            "--runner=DataflowRunner: there are no credentials of Google Cloud here; run "
            "`gcloud auth application-default login`"
        ) from None


def check_accelerator(planned: Plan, options: Any) -> None:
    """Makes sure that vLLM has a GPU on Dataflow.

    Raises:
      UsageError: no flag asks for one.
    """
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
        if spec.is_vllm:
            raise UsageError(
                f"--model={spec.name}: vLLM needs a GPU; give e.g. "
                "--accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
            )


def quieten(local: bool) -> None:
    """Leaves logs of others out: a local run shows its progress, and its failure as one line.

    A run elsewhere logs what its runner says, e.g. where to watch the job, but not the whole
    description of the job.
    """
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    logging.getLogger().setLevel(logging.CRITICAL if local else logging.WARNING)
    logging.getLogger("chatflow").setLevel(logging.WARNING)
    if not local:
        logging.getLogger("apache_beam.runners").setLevel(logging.INFO)
        for noisy in ("apache_beam.transforms", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        for handler in logging.getLogger().handlers:
            handler.addFilter(
                lambda record: record.levelno > logging.INFO or len(record.getMessage()) < 220
            )


CHECK_SECONDS = 15.0

_NOT_OURS_TO_ASK = ("credentials", "http_401", "http_403")


def check_model(spec: ModelSpec, local: bool, console: Console) -> None:
    """Asks the service whether a remote model is there.

    Where it cannot be reached, or this machine may not ask it for a job that runs
    elsewhere, only a warning is printed: the workers may well reach it.

    Raises:
      UsageError: the service says that the model is not there, or not for us.
    """
    from chatflow.models.remote.calls import RemoteModel
    from chatflow.models.remote.faults import Kind, classify
    from chatflow.models.remote.handler import client_of

    settings = spec.remote._replace(timeout=min(spec.remote.timeout, CHECK_SECONDS))
    model = RemoteModel(spec.name, client_of(spec.name, settings), settings)
    try:
        console.print(model.check(), highlight=False)
    except UsageError:
        raise
    except Exception as error:
        fault = classify(error)
        said = f"--model={spec.name}: {fault.reason}: {one_line(error)}"
        if fault.kind is Kind.FATAL and (local or fault.reason not in _NOT_OURS_TO_ASK):
            raise UsageError(f"{said} (--check_endpoint=false does not ask)") from None
        console.print(f"warning: not checked: {said}", highlight=False, markup=False)
    finally:
        model.close()


def prepare_model(planned: Plan, console: Console) -> None:
    """Makes the embedded model now, with progress, if it is asked for and not there yet.

    Raises:
      UsageError: it cannot be made, or what another one needs is not installed.
    """
    for spec in planned.routes.specs:
        if spec.is_vllm:
            from chatflow.models.vllm.handler import check_installed

            check_installed(spec.name)
            console.print(
                f"{spec.name}: the first chats wait for vLLM's server; --debug shows its log",
                highlight=False,
            )
    if not any(spec.is_embedded for spec in planned.routes.specs):
        return
    from chatflow.weights import embedded
    from chatflow.weights.presets import local_preset

    try:
        local_preset(
            embedded.NAME,
            lambda text: console.print(f"{embedded.NAME}: {text}", highlight=False),
        )
    except embedded.EmbeddedModelError as error:
        raise UsageError(f"--model={embedded.NAME}: {error}") from None


def beam_options(flags: Sequence[str], streaming: bool = False, shown: Sequence[str] = ()) -> Any:
    """Beam's `PipelineOptions` of the flags that are not chatflow's.

    Args:
      streaming: the input never ends.
      shown: chatflow's own flags, for runners that show the options of a job.

    Raises:
      UsageError: a flag that Beam does not know either, or that needs another runner.
    """
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    parser = Parser(add_help=False, allow_abbrev=False)
    for options in set(PipelineOptions.__subclasses__()) - {_shown_options()}:
        options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(flags))
    if unknown:
        own = [f"--{name}" for name in Options.defaults()]
        close = difflib.get_close_matches(unknown[0].split("=")[0], own, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; it is neither chatflow's nor Beam's"
        raise UsageError(f"unknown flag {unknown[0]}{hint}")
    options = PipelineOptions(list(flags))
    standard = options.view_as(StandardOptions)
    standard.streaming = standard.streaming or streaming
    if standard.runner in (None, "DirectRunner"):
        # Beam's DirectRunner first tries to fetch another runner from the network.
        standard.runner = LOCAL_STREAM_RUNNER if standard.streaming else LOCAL_RUNNER
    if not is_local(options):
        return PipelineOptions([*flags, *shown], streaming=standard.streaming)
    if standard.no_wait_until_finish:
        raise UsageError("--no_wait_until_finish: needs a --runner that runs elsewhere")
    return options


@functools.cache
def _shown_options() -> Any:
    """chatflow's flags as options of Beam's, by which a job's page shows them."""
    from apache_beam.options.pipeline_options import PipelineOptions

    class ChatflowOptions(PipelineOptions):
        @classmethod
        def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
            for name, flag in Options.defaults().items():
                parser.add_argument(f"--{name}", default=flag["default"])

    return ChatflowOptions


def cloud_of(options: Any, chatflow: Options) -> Cloud:
    """From flags, else the environment, else (where a model needs it) Google's credentials."""
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    given = options.view_as(GoogleCloudOptions)
    project = given.project or os.environ.get("GOOGLE_CLOUD_PROJECT", "")
    if not project and chatflow.inference == "remote" and chatflow.model.startswith("gemini-"):
        import google.auth

        with contextlib.suppress(google.auth.exceptions.GoogleAuthError):
            project = google.auth.default()[1] or ""
    location = chatflow.location or given.region or os.environ.get("GOOGLE_CLOUD_LOCATION", "")
    return Cloud(project, location)


def is_local(options: Any) -> bool:
    from apache_beam.options.pipeline_options import StandardOptions

    return options.view_as(StandardOptions).runner in (LOCAL_RUNNER, LOCAL_STREAM_RUNNER)
