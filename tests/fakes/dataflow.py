"""A stand-in for the Dataflow API on loopback, beside an emulator of Cloud Storage.

It takes jobs from Beam's own client, keeps them unchanged, and reports each as running; it runs
nothing. It also takes launches of Flex Templates, and changes of state, from `gcloud dataflow`.
The shapes are those of Google's documentation (v1b3).

  python -m tests.fakes.dataflow -- make deploy

runs a command whose environment points to both, with a PROJECT and a REGION in it, and prints
each job that it received as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apache_beam.portability.api import beam_runner_api_pb2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.server import create_server
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from . import Loopback

JOBS = re.compile(
    r"/v1b3/projects/([^/]+)/locations/([^/]+)/jobs(?:/([^/:]+))?(/messages|/metrics)?"
)
LAUNCH = re.compile(r"/v1b3/projects/([^/]+)/locations/([^/]+)/flexTemplates:launch")


class FakeCloud(Loopback):
    """Starts on free ports; use as a context manager.

    Attributes:
      address: of the Dataflow API, for `--dataflow_endpoint`.
      jobs: by id, each as it was sent, with its `id` and `currentState`.
      launches: bodies of requests to launch a Flex Template.
      counts: values of the counters of every job; a list is a distribution.
      done: jobs end as soon as they are received.
      refusal: a status and message with which every request is refused.
      incompatible: a job that replaces another fails, with this as the reason.
    """

    def __init__(self, *buckets: str) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.launches: list[dict[str, Any]] = []
        self.counts: dict[str, int | list[int]] = {}
        self.done = False
        self.refusal: tuple[int, str] | None = None
        self.incompatible = ""
        self._buckets = buckets
        self._folder = tempfile.TemporaryDirectory(prefix="fake-cloud-")

    def __enter__(self) -> FakeCloud:
        self._storage = create_server("localhost", 0, in_memory=True)
        self._storage.start()
        for bucket in self._buckets:
            self._storage._storage.create_bucket(bucket, {"name": bucket, "kind": "storage#bucket"})
        super().__enter__()
        # By this name, Beam knows that the API is local.
        self.address = f"http://localhost:{self.port}"
        self._credentials = Path(self._folder.name) / "account.json"
        self._credentials.write_text(json.dumps(service_account(f"{self.address}/token")))
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._storage.stop()
        self._folder.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables that point Google's clients and `gcloud` to the stand-ins."""
        return {
            "STORAGE_EMULATOR_HOST": self.storage,
            "DATAFLOW_ENDPOINT": self.address,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAFLOW": f"{self.address}/",
            "CLOUDSDK_AUTH_ACCESS_TOKEN": "a-token",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._credentials),
            # It cannot be reached, and fails at once.
            "PUBSUB_EMULATOR_HOST": "127.0.0.1:1",
            "BIGQUERY_STORAGE_EMULATOR_HOST": "127.0.0.1:1",
        }

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._storage._api._httpd.server_port}"

    def answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        if path == "/token":
            token = {"access_token": "a-token", "expires_in": 3600, "token_type": "Bearer"}
            return 200, json.dumps(token)
        found = None if self.refusal else self._found(method, path, body)
        if found is not None:
            return 200, json.dumps(found)
        status, said = self.refusal or (404, "not found")
        return status, json.dumps({"error": {"code": status, "message": said}})

    def _found(self, method: str, path: str, body: Mapping[str, Any]) -> Any:
        if found := LAUNCH.fullmatch(path):
            self.launches.append(dict(body))
            job = {"name": body["launchParameter"]["jobName"], "type": "JOB_TYPE_STREAMING"}
            return {"job": self._take(job, *found.groups())}
        if not (found := JOBS.fullmatch(path)):
            return None
        project, location, job_id, part = found.groups()
        if method == "POST":
            return self._take(dict(body), project, location)
        if job_id is None:
            return {"jobs": list(self.jobs.values())}
        if job_id not in self.jobs:
            return None
        job = self.jobs[job_id]
        if part:
            return self._messages(job) if part == "/messages" else {"metrics": self._metrics()}
        if method == "PUT":
            job["currentState"] = job["requestedState"] = body["requestedState"]
        return job

    def _take(self, job: dict[str, Any], project: str, location: str) -> dict[str, Any]:
        job |= {
            "id": f"2026-01-01_00_00_00-{len(self.jobs) + 1}",
            "projectId": project,
            "location": location,
            "currentState": "JOB_STATE_RUNNING",
            "createTime": "2026-01-01T00:00:00Z",
            "currentStateTime": "2026-01-01T00:00:00Z",
        }
        replaced = job.get("replaceJobId")
        checked = "graph_validate_only" in job.get("environment", {}).get("serviceOptions", [])
        if replaced and self.incompatible:
            job["currentState"] = "JOB_STATE_FAILED"
        elif checked or self.done:
            job["currentState"] = "JOB_STATE_DONE"
        elif replaced:
            self.jobs[replaced]["currentState"] = "JOB_STATE_UPDATED"
        self.jobs[job["id"]] = job
        return job

    def _metrics(self) -> list[dict[str, Any]]:
        """Returns each counter twice: its committed and its tentative value."""
        made = []
        for name, value in self.counts.items():
            for context in ({}, {"tentative": "true"}):
                place = {"namespace": "chatflow", "step": "s1", **context}
                update: dict[str, Any] = {
                    "name": {"origin": "user", "name": name, "context": place}
                }
                if isinstance(value, list):
                    update["distribution"] = {
                        "count": len(value), "sum": sum(value), "min": min(value), "max": max(value)
                    }  # fmt: skip
                else:
                    update["scalar"] = value
                made.append(update)
        return made

    def _messages(self, job: Mapping[str, Any]) -> dict[str, Any]:
        text = self.incompatible if job["currentState"] == "JOB_STATE_FAILED" else "Worker started."
        importance = "ERROR" if job["currentState"] == "JOB_STATE_FAILED" else "BASIC"
        message = {
            "id": "1",
            "time": "2026-01-01T00:00:01Z",
            "messageText": text,
            "messageImportance": f"JOB_MESSAGE_{importance}",
        }
        return {"jobMessages": [message]}

    def put(self, bucket: str, name: str, data: bytes) -> None:
        with self._client() as client:
            client.bucket(bucket).blob(name).upload_from_string(data)

    def objects(self, bucket: str, prefix: str = "") -> list[str]:
        with self._client() as client:
            return [blob.name for blob in client.list_blobs(bucket, prefix=prefix)]

    @contextlib.contextmanager
    def _client(self) -> Iterator[storage.Client]:
        client = storage.Client(
            project="proj-1",
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": self.storage},
        )
        yield client
        client.close()

    def staged(self, uri: str) -> bytes:
        """Returns an object of the emulator, by its `gs://` name or as jobs name it."""
        bucket, _, name = re.sub(r"^(gs:/|storage\.googleapis\.com)/", "", uri).partition("/")
        return bytes(self._storage._storage.get_file(bucket, name))

    def pipeline(self, job: Mapping[str, Any]) -> beam_runner_api_pb2.Pipeline:
        """Returns the graph that a job was made from."""
        options = job["environment"]["sdkPipelineOptions"]["options"]
        pipeline = beam_runner_api_pb2.Pipeline()
        pipeline.ParseFromString(self.staged(options["pipelineUrl"]))
        return pipeline


def service_account(token_uri: str) -> dict[str, str]:
    """Returns made-up credentials for Google's clients."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "type": "service_account",
        "project_id": "proj-1",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "nobody@proj-1.iam.gserviceaccount.com",
        "token_uri": token_uri,
    }


def main() -> int:
    command = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    with FakeCloud("proj-1-chatflow", "proj-1-chatflow-temp") as cloud:
        place = {"PROJECT": "proj-1", "REGION": "us-central1", **cloud.environment}
        if not command:
            print(json.dumps(place), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            return 0
        code = subprocess.run(command, env={**os.environ, **place}).returncode
        for job in cloud.jobs.values():
            print(json.dumps(job, indent=2))
    return code


if __name__ == "__main__":
    sys.exit(main())
