"""A stand-in for Vertex AI's JobService on loopback: CreateCustomJob and GetCustomJob over HTTP.

A job is pending, runs, and ends; each request for it moves it to the next state. It runs nothing.
The shapes are those of Google's documentation (v1).
"""

from __future__ import annotations

import re
from typing import Any

from . import Loopback

JOBS = re.compile(r"/v1/(projects/[^/]+/locations/[^/]+/customJobs)(/\d+)?")


class FakeJobs(Loopback):
    """Starts on a free port; use as a context manager.

    Attributes:
      address: for `--api_endpoint`.
      jobs: by name, each as it was sent, with its `state`.
      error: why jobs fail; empty: they succeed.
      busy: how many requests for a job are answered with 503.
      refusal: a status and message with which new jobs are refused.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.error = ""
        self.busy = 0
        self.refusal: tuple[int, str] | None = None

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        found = JOBS.fullmatch(path)
        if found and method == "POST":
            if self.refusal:
                return _error(*self.refusal)
            name = f"{found[1]}/{len(self.jobs) + 1}"
            self.jobs[name] = {**body, "name": name, "state": "JOB_STATE_PENDING"}
            return 200, self.jobs[name]
        job = self.jobs.get(path.removeprefix("/v1/"))
        if job is None:
            return _error(404, "not found")
        if self.busy:
            self.busy -= 1
            return _error(503, "busy")
        if job["state"] == "JOB_STATE_PENDING":
            job["state"] = "JOB_STATE_RUNNING"
        elif self.error:
            job |= {"state": "JOB_STATE_FAILED", "error": {"code": 3, "message": self.error}}
        else:
            job["state"] = "JOB_STATE_SUCCEEDED"
        return 200, job


def _error(status: int, said: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"code": status, "message": said}}
