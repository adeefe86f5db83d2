"""Runs `save-state-dict` as a Vertex AI custom job, for models too large for this machine."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from chatflow.commands.model.info import LEAST_DISK_GB, needs_of
from chatflow.errors import FAILED, UsageError, one_line

VERTEX_FLAGS = {
    "project": "Google Cloud project; default: GOOGLE_CLOUD_PROJECT",
    "region": "e.g. us-central1; default: GOOGLE_CLOUD_LOCATION",
    "image": "chatflow's container image with PyTorch (chatflow[torch])",
    "machine_type": "default: what `chatflow model info` suggests",
    "disk_size_gb": "at least 100; default: what `chatflow model info` suggests",
    "staging_bucket": "gs:// folder for what the job writes besides PATH",
    "service_account": "account that the job runs as; default: that of the project's custom jobs",
    "api_endpoint": "address of the API instead of Google's; http:// is called without credentials",
}

_ENDED = {
    "JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED", "JOB_STATE_FAILED",
    "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED",
}  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    """Starts the job and waits for it unless told not to; returns the job's outcome as exit code.

    Raises:
      UsageError: a flag is wrong, or Vertex AI refuses the job.
    """
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError

    parent, job = request(parsed)
    try:
        client = _client(parsed)
        started = client.create_custom_job(parent=parent, custom_job=job)
        if parsed.no_wait_until_finish:
            _say(parsed, started.name, started.state.name)
            return 0
        ended = _wait(client, started)
    except (GoogleAPICallError, GoogleAuthError) as error:
        raise UsageError(f"--on=vertex: {one_line(error)}") from None
    _say(parsed, ended.name, ended.state.name, ended.error.message)
    return 0 if ended.state.name == "JOB_STATE_SUCCEEDED" else FAILED


def request(parsed: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the location to create the job in, and the job as a `CustomJob` dictionary.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec

    Raises:
      UsageError: a flag is missing or wrong.
    """
    project = parsed.project or os.environ.get("GOOGLE_CLOUD_PROJECT", "")
    region = parsed.region or os.environ.get("GOOGLE_CLOUD_LOCATION", "")
    for name, value in (("project", project), ("region", region), ("image", parsed.image)):
        if not value:
            raise UsageError(f"--{name} is missing: {VERTEX_FLAGS[name]}")
    if not parsed.path.startswith("gs://"):
        raise UsageError(f"PATH={parsed.path}: with --on=vertex, it must be gs://…")
    if os.path.isdir(parsed.name):
        raise UsageError(
            f"NAME={parsed.name} is a folder of this machine: copy it to gs:// and name it there"
        )
    if parsed.staging_bucket and not parsed.staging_bucket.startswith("gs://"):
        raise UsageError(f"--staging_bucket={parsed.staging_bucket}: must be gs://…")
    machine, disk = _machine(parsed)
    words = ["model", "save-state-dict", parsed.name, parsed.path, f"--dtype={parsed.dtype}"]
    hub = os.environ.get("HF_ENDPOINT")
    container = {
        "image_uri": parsed.image,
        "command": ["chatflow"],
        "args": [*words, "--summary=json", *(["--overwrite"] if parsed.overwrite else [])],
        # HF_TOKEN is not sent: everyone who may view the job could read it.
        "env": [{"name": "HF_ENDPOINT", "value": hub}] if hub else [],
    }
    spec: dict[str, Any] = {
        "worker_pool_specs": [
            {
                "machine_spec": {"machine_type": machine},
                "replica_count": 1,
                "disk_spec": {"boot_disk_type": "pd-ssd", "boot_disk_size_gb": disk},
                "container_spec": container,
            }
        ]
    }
    if parsed.service_account:
        spec["service_account"] = parsed.service_account
    if parsed.staging_bucket:
        spec["base_output_directory"] = {"output_uri_prefix": parsed.staging_bucket}
    job = {"display_name": f"save-state-dict {parsed.name}"[:128], "job_spec": spec}
    return f"projects/{project}/locations/{region}", job


def _machine(parsed: argparse.Namespace) -> tuple[str, int]:
    try:
        disk = int(parsed.disk_size_gb or LEAST_DISK_GB)
    except ValueError:
        disk = 0
    if disk < LEAST_DISK_GB:
        raise UsageError(
            f"--disk_size_gb={parsed.disk_size_gb}: must be a number, at least {LEAST_DISK_GB}"
        )
    if parsed.machine_type and parsed.disk_size_gb:
        return parsed.machine_type, disk
    try:
        needs = needs_of(parsed.name, parsed.dtype)
    except UsageError as error:
        raise UsageError(f"{error}; or give --machine_type and --disk_size_gb") from None
    return (
        parsed.machine_type or needs.save_machine,
        disk if parsed.disk_size_gb else needs.save_disk_gb,
    )


def _client(parsed: argparse.Namespace) -> Any:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1 import JobServiceClient
    from google.cloud.aiplatform_v1.services.job_service.transports.rest import (
        JobServiceRestTransport,
    )

    region = parsed.region or os.environ.get("GOOGLE_CLOUD_LOCATION", "")
    base = parsed.api_endpoint or f"{region}-aiplatform.googleapis.com"
    scheme, _, host = base.rstrip("/").rpartition("://")
    if scheme == "http":
        anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
        transport = JobServiceRestTransport(host=host, url_scheme="http", credentials=anonymous)
        return JobServiceClient(transport=transport)
    return JobServiceClient(client_options={"api_endpoint": host})


def _wait(client: Any, job: Any) -> Any:
    """Waits until the job ends and shows its states on stderr."""
    from google.api_core.retry import Retry
    from rich.console import Console

    console = Console(stderr=True)
    before, pause = "", 0.2
    with console.status(f"{job.name}: {job.state.name}") as status:
        while True:
            if (state := job.state.name) != before:
                console.print(f"{job.name}: {state}", highlight=False, soft_wrap=True)
                status.update(f"{job.name}: {state}")
                before = state
            if state in _ENDED:
                return job
            time.sleep(pause)
            pause = min(2 * pause, 30)
            # After a transient error, e.g. 503, `Retry` repeats the call for two minutes.
            job = client.get_custom_job(name=job.name, retry=Retry())


def _say(parsed: argparse.Namespace, name: str, state: str, error: str = "") -> None:
    if parsed.summary == "json":
        values = {"job": name, "state": state, "path": parsed.path, "error": error}
        print(json.dumps({key: value for key, value in values.items() if value}))
        return
    outcome = {"JOB_STATE_SUCCEEDED": f"written: {parsed.path}"}.get(state, state)
    print(f"{name}: {outcome}" + (f": {error}" if error else ""))
