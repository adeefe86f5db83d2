"""Finds personal data by Google Cloud's Sensitive Data Protection (DLP)."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import requests
import tenacity

from chatflow.errors import UsageError, one_line
from chatflow.network import attempts
from chatflow.redaction.kinds import Found, without_overlaps

HOST_VARIABLE = "DLP_EMULATOR_HOST"
"""The variable with the address of a stand-in (HOST:PORT, without TLS)."""

CHARACTERS, ROWS = 100_000, 1_000
"""What one request holds at most; the service takes half a megabyte, 50,000 values."""

SECONDS = 300.0
"""How long a request is tried again; then the bundle fails, and the runner tries it again."""

_TEMPLATE = re.compile(r"projects/[^/]+(/locations/[^/]+)?/inspectTemplates/[^/]+")
_TYPES = re.compile(r"[A-Z][A-Z0-9_]*(?:\+[A-Z][A-Z0-9_]*)*")


@dataclasses.dataclass(frozen=True)
class Dlp:
    """Asks the service what is in texts; the kinds are its info types in lower case.

    Attributes:
      parent: `projects/P/locations/L`, which pays for it.
      template: the name of an inspection template, or "".
      types: info types to look for without a template.
    """

    parent: str
    template: str = ""
    types: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str, project: str) -> Dlp:
        """Reads what follows `dlp:` in `--redact`: a template's name, or TYPE+TYPE+…."""
        if found := _TEMPLATE.fullmatch(text):
            owner = "/".join(text.split("/")[:2])
            return cls(owner + (found[1] or "/locations/global"), template=text)
        if not _TYPES.fullmatch(text):
            raise UsageError(
                f"--redact=dlp:{text}: must be dlp:projects/P/locations/L/inspectTemplates/T or "
                "info types, e.g. dlp:PERSON_NAME+PHONE_NUMBER"
            )
        if not project:
            raise UsageError("--redact=dlp:…: give --project, or set GOOGLE_CLOUD_PROJECT")
        return cls(f"projects/{project}/locations/global", types=tuple(text.split("+")))

    def find(self, texts: Sequence[str]) -> list[list[Found]]:
        """Returns what is found in each text.

        Raises `requests.RequestException` if the service does not answer within `SECONDS`.
        """
        found: list[list[Found]] = [[] for _ in texts]
        pieces = [
            (number, at, piece)
            for number, text in enumerate(texts)
            for at, piece in _pieces(text)
        ]  # fmt: skip
        for batch in _batches(pieces):
            self._inspect(batch, found)
        return [without_overlaps(text, one) for text, one in zip(texts, found, strict=True)]

    def check(self) -> None:
        """Asks the service once, as each worker will; raises `UsageError` if it refuses."""
        try:
            self._post(_asked_for(self, ["check"]), seconds=0)
        except Exception as error:  # also of credentials
            said = one_line(error)
            raise UsageError(f"--redact=dlp:…: Sensitive Data Protection refuses: {said}") from None

    def _inspect(self, batch: list[tuple[int, int, str]], found: list[list[Found]]) -> None:
        result = self._post(_asked_for(self, [piece for *_, piece in batch])).get("result", {})
        if result.get("findingsTruncated"):
            halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            if len(batch) == 1:
                number, at, piece = batch[0]
                middle = _end(piece, len(piece) // 2)
                halves = [[(number, at, piece[:middle])], [(number, at + middle, piece[middle:])]]
            for half in filter(None, halves):
                self._inspect(half, found)
            return
        for one in result.get("findings", ()):
            place = one["location"]
            record = place["contentLocations"][0]["recordLocation"]
            number, at, _ = batch[int(record["tableLocation"].get("rowIndex", 0))]
            span = place["codepointRange"]
            start, end = at + int(span.get("start", 0)), at + int(span["end"])
            kind = re.sub(r"\W", "_", one["infoType"]["name"].lower())
            found[number].append(Found(kind, start, end))

    def _post(self, asked: dict[str, Any], seconds: float = SECONDS) -> dict[str, Any]:
        passing = tenacity.retry_if_exception(_may_pass)
        for attempt in attempts("Sensitive Data Protection", seconds, passing):
            with attempt:
                session, address = _session()
                answer = session.post(
                    f"{address}/v2/{self.parent}/content:inspect", json=asked, timeout=60
                )
                answer.raise_for_status()
                said: dict[str, Any] = answer.json()
        return said


def _asked_for(dlp: Dlp, texts: Sequence[str]) -> dict[str, Any]:
    """Returns the body of a call of `content:inspect`, with a row a text.

    https://cloud.google.com/sensitive-data-protection/docs/reference/rest/v2/projects.content/inspect
    """
    config: dict[str, Any] = {"limits": {"maxFindingsPerRequest": 3000}}
    if dlp.types:
        config["infoTypes"] = [{"name": name} for name in dlp.types]
    rows = [{"values": [{"stringValue": text}]} for text in texts]
    asked: dict[str, Any] = {
        "inspectConfig": config,
        "item": {"table": {"headers": [{"name": "text"}], "rows": rows}},
    }
    if dlp.template:
        asked["inspectTemplateName"] = dlp.template
    return asked


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, requests.RequestException)


@functools.cache
def _session() -> tuple[requests.Session, str]:
    if host := os.environ.get(HOST_VARIABLE):
        return requests.Session(), f"http://{host}"
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    return AuthorizedSession(credentials), "https://dlp.googleapis.com"  # type: ignore[no-untyped-call]


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yields a text in pieces that a request can hold, and where each begins."""
    at = 0
    while at < len(text):
        end = at + _end(text[at : at + CHARACTERS], CHARACTERS)
        yield at, text[at:end]
        at = end


def _end(text: str, most: int) -> int:
    """Returns after how many characters to cut: at most so many, after a line or a word."""
    if len(text) < most:
        return len(text)
    return max(text.rfind("\n", 1, most), text.rfind(" ", 1, most)) + 1 or most


def _batches(pieces: list[tuple[int, int, str]]) -> Iterator[list[tuple[int, int, str]]]:
    batch: list[tuple[int, int, str]] = []
    size = 0
    for piece in pieces:
        if batch and (size + len(piece[2]) > CHARACTERS or len(batch) == ROWS):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece[2])
    if batch:
        yield batch
