"""Launches the Flex Template with the flags of `chatflow run`, so that both take the same flags.

  python infra/template/launch.py TEMPLATE_FILE --runner=DataflowRunner --project=P …

prints and runs `gcloud dataflow flex-template run`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence

from chatflow.errors import UsageError
from chatflow.options import Options

GCLOUD = {
    "project": "--project",
    "region": "--region",
    "service_account_email": "--service-account-email",
    "temp_location": "--temp-location",
    "staging_location": "--staging-location",
    "subnetwork": "--subnetwork",
    "num_workers": "--num-workers",
    "max_num_workers": "--max-workers",
    "machine_type": "--worker-machine-type",
    "dataflow_kms_key": "--dataflow-kms-key",
}
"""Flags that have another name in gcloud; Beam's other flags are passed through."""

SWITCHES = {"no_use_public_ips": "--disable-public-ips", "update": "--update"}
LISTS = {"experiments": "--additional-experiments", "labels": "--additional-user-labels"}
NOT_FOR_TEMPLATES = ("runner", "job_name", "no_wait_until_finish", "dataflow_endpoint")
"""The launcher sets these itself."""


def command(template: str, flags: Sequence[str]) -> list[str]:
    """Returns the gcloud command that launches a job with these flags, each as `--name=value`.

    Raises:
      UsageError: a flag of another form.
    """
    job_name, own = "", []
    lists: dict[str, list[str]] = {}
    options: dict[str, str] = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not (equals or name in (*SWITCHES, *NOT_FOR_TEMPLATES)):
            raise UsageError(f"{flag}: flags of a template have the form --name=value")
        if name == "job_name":
            job_name = value
        elif name in GCLOUD:
            own.append(f"{GCLOUD[name]}={value}")
        elif name in SWITCHES:
            own.append(SWITCHES[name])
        elif name in LISTS:
            lists.setdefault(LISTS[name], []).append(value)
        elif name in Options.defaults():
            lists.setdefault("--parameters", []).append(f"{name}={value}")
        elif name not in NOT_FOR_TEMPLATES:
            options[name] = f"{options[name]},{value}" if name in options else value
    if options:
        pairs = [f"{name}={value}" for name, value in options.items()]
        lists["--additional-pipeline-options"] = pairs
    return [
        "gcloud", "dataflow", "flex-template", "run", job_name,
        f"--template-file-gcs-location={template}",
        *own,
        *(f"{name}={_joined(values)}" for name, values in lists.items()),
    ]  # fmt: skip


def _joined(values: Sequence[str]) -> str:
    """Returns a list for gcloud, with a special separator if values have commas in them."""
    free = (mark for mark in ",~|@%!\x1f" if not any(mark in value for value in values))
    separator = next(free)
    return ("" if separator == "," else f"^{separator}^") + separator.join(values)


if __name__ == "__main__":
    try:
        launch = command(sys.argv[1], sys.argv[2:])
    except UsageError as error:
        sys.exit(f"launch: {error}")
    print(shlex.join(launch), flush=True)
    sys.exit(subprocess.run(launch).returncode)
