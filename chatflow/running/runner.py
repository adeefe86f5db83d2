"""Chooses the runner, and reads Beam's flags."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

from chatflow.errors import UsageError
from chatflow.options import Cloud, Options, Parser, unknown

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


LOCAL_STREAM_RUNNER = "chatflow.running.local.LocalStreamRunner"


def is_dataflow(options: Any) -> bool:
    from apache_beam.options.pipeline_options import StandardOptions

    return bool(options.view_as(StandardOptions).runner == "DataflowRunner")


def check_credentials(options: Any) -> None:
    """Raises `UsageError` if a job for Dataflow has no Google Cloud credentials."""
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    if not is_dataflow(options) or options.view_as(GoogleCloudOptions).no_auth:
        return
    import google.auth

    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        raise UsageError(
            "--runner=DataflowRunner: this machine has no Google Cloud credentials; run "
            "`gcloud auth application-default login`"
        ) from None


def quieten(local: bool) -> None:
    """Silences other libraries' logs: a local run shows progress, and a failure in one line.

    Elsewhere, the runner's messages stay (e.g. where to watch the job), but not the job
    description.
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


def beam_options(flags: Sequence[str], streaming: bool = False, shown: Sequence[str] = ()) -> Any:
    """Returns Beam's `PipelineOptions`, from the flags that are not chatflow's.

    `shown` are chatflow's own flags, for runners that show a job's options. Raises `UsageError` for
    a flag that Beam does not know either, or that needs another runner.
    """
    from apache_beam.options.pipeline_options import StandardOptions

    left, known = not_beams(flags)
    if left:
        own = [f"--{name}" for name in Options.defaults()]
        raise UsageError(unknown(left[0], [*own, *known], "it is neither chatflow's nor Beam's"))
    options = _viewed_once()(list(flags))
    standard = options.view_as(StandardOptions)
    standard.streaming = standard.streaming or streaming
    if standard.runner in (None, "DirectRunner"):
        # Beam's DirectRunner first tries to fetch another runner from the network.
        standard.runner = LOCAL_STREAM_RUNNER if standard.streaming else LOCAL_RUNNER
    if not is_local(options):
        return _viewed_once()([*flags, *shown], streaming=standard.streaming)
    if standard.no_wait_until_finish:
        raise UsageError("--no_wait_until_finish: needs a --runner that runs elsewhere")
    return options


def not_beams(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns which of the arguments Beam does not know, and all flags that it knows."""
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = Parser(add_help=False, allow_abbrev=False)
    for options in set(PipelineOptions.__subclasses__()) - {_shown_options()}:
        options._add_argparse_args(parser)
    return parser.parse_known_args(list(flags))[1], parser.flags()


@functools.cache
def _viewed_once() -> Any:
    """Returns Beam's `PipelineOptions` with each view made once.

    Beam asks for a view with each step that it adds, and parses all flags anew: half a second.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    class ViewedOnce(PipelineOptions):
        def view_as(self, cls: Any) -> Any:
            views = self.__dict__.setdefault("_views", {})
            if cls not in views:
                views[cls] = super().view_as(cls)
            return views[cls]

        def __getstate__(self) -> dict[str, Any]:
            state: dict[str, Any] = super().__getstate__()
            return {name: value for name, value in state.items() if name != "_views"}

    return ViewedOnce


@functools.cache
def _shown_options() -> Any:
    """Returns chatflow's flags as Beam options, so that a job's page shows them."""
    from apache_beam.options.pipeline_options import PipelineOptions

    class ChatflowOptions(PipelineOptions):
        @classmethod
        def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
            for name, flag in Options.defaults().items():
                parser.add_argument(f"--{name}", default=flag["default"])

    return ChatflowOptions


def cloud_of(options: Any, chatflow: Options) -> Cloud:
    """Returns project and location, from flags, the environment or (if needed) credentials."""
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    given = options.view_as(GoogleCloudOptions)
    project = given.project or os.environ.get("GOOGLE_CLOUD_PROJECT", "")
    models = (
        chatflow.model if chatflow.inference == "remote" else "",
        chatflow.draft_model,
        chatflow.escalate_model,
        chatflow.fallback_model,
    )
    if not project and any(name.startswith(("gemini-", "anthropic:")) for name in models):
        import google.auth

        with contextlib.suppress(google.auth.exceptions.GoogleAuthError):
            project = google.auth.default()[1] or ""
    location = chatflow.location or given.region or os.environ.get("GOOGLE_CLOUD_LOCATION", "")
    return Cloud(project, location)


def is_local(options: Any) -> bool:
    from apache_beam.options.pipeline_options import StandardOptions

    return options.view_as(StandardOptions).runner in (LOCAL_RUNNER, LOCAL_STREAM_RUNNER)
