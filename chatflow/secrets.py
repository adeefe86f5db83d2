"""Reads secrets. Flags say where a secret is, never the secret itself, because flags are shown."""

from __future__ import annotations

import os
import re
from typing import Any

from chatflow.errors import UsageError, one_line

PLACES = re.compile(
    r"env:(?P<variable>\w+)|file:(?P<path>.+)|(?P<version>projects/[^/]+/secrets/[^/]+/versions/[^/]+)"
)
"""Where a secret may be: an environment variable, a file, or Google's Secret Manager."""

PLACES_SAID = "env:NAME, file:PATH or projects/P/secrets/S/versions/V"

HOST_VARIABLE = "SECRET_MANAGER_EMULATOR_HOST"
"""The variable with the address of a Secret Manager emulator (HOST:PORT, REST without TLS)."""


def check_place(place: str, flag: str) -> None:
    """Raises `UsageError` unless a flag names a place; hides the value, which may be the secret."""
    if not PLACES.fullmatch(place):
        raise UsageError(f"{flag}: must be {PLACES_SAID}, never the secret itself")


def read_secret(place: str, flag: str) -> str:
    """Returns the text of a secret; raises `UsageError` with the flag if it cannot be read."""
    check_place(place, flag)
    found = PLACES.fullmatch(place)
    assert found is not None
    try:
        if found["variable"]:
            return os.environ[found["variable"]]
        if found["path"]:
            from apache_beam.io.filesystems import FileSystems

            with FileSystems.open(found["path"]) as file:
                text: str = file.read().decode()
                return text
        return _read_version(found["version"])
    except KeyError:
        raise UsageError(f"{flag}={place}: there is no such variable") from None
    except UnicodeDecodeError:
        raise UsageError(f"{flag}={place}: the secret is not text in UTF-8") from None
    except Exception as error:  # each filesystem raises its own errors
        raise UsageError(f"{flag}={place}: cannot be read: {one_line(error)}") from None


def _read_version(name: str) -> str:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.secretmanager import SecretManagerServiceClient

    where: dict[str, Any] = {}
    if host := os.environ.get(HOST_VARIABLE):
        options = {"api_endpoint": f"http://{host}"}
        where = {"client_options": options, "credentials": AnonymousCredentials()}  # type: ignore[no-untyped-call]
    with SecretManagerServiceClient(transport="rest", **where) as client:
        data: bytes = client.access_secret_version(name=name).payload.data
    return data.decode()
