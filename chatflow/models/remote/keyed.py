"""The base of clients that call a service by plain HTTP with a key."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from chatflow.models.remote.clients import Client, GoogleToken, get, post
from chatflow.models.remote.faults import HttpError
from chatflow.network import session
from chatflow.options import RemoteSettings
from chatflow.secrets import read_secret

_REFUSES = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|extra|invalid|deprecated|"
    r"not (?:permitted|allowed|available|enabled)",
    re.IGNORECASE,
)


class KeyedClient(Client):
    """Calls with the key of `--api_key`, or with a token of Google at an address of Google.

    Servers differ in which fields they take. A field that a server refuses by name is left out of
    later calls, or goes by another name; the call is made again at once.

    Attributes:
      optional: the fields that a server may refuse.
      instead: other names of some of them.
    """

    optional: ClassVar[tuple[str, ...]] = ()
    instead: ClassVar[Mapping[str, str]] = {}

    def __init__(self, name: str, settings: RemoteSettings):
        self.name, self.settings = name, settings
        self._refused: set[str] = set()
        self._key = ""
        self._token = GoogleToken(settings.without_credentials)
        self._http: aiohttp.ClientSession | None = None

    async def key(self) -> str:
        """Returns the key, or an empty text; raises `UsageError` if it cannot be read."""
        if self.settings.api_key and not self._key:
            place = self.settings.api_key
            self._key = (await asyncio.to_thread(read_secret, place, "--api_key")).strip()
        return self._key

    async def headers(self, url: str) -> Mapping[str, str]:
        """Returns the headers that identify us to the service."""
        host = urlsplit(url).hostname or ""
        if key := await self.key():
            azure = host.endswith(".azure.com")
            return {"api-key": key} if azure else {"Authorization": f"Bearer {key}"}
        return await self._token.header() if host.endswith(".googleapis.com") else {}

    async def post(self, url: str, content: Mapping[str, Any]) -> Any:
        """Returns the JSON of a reply; raises what `clients.post` raises."""
        http = await self._session()
        while True:
            sent = {
                self.instead[name] if name in self._refused else name: value
                for name, value in content.items()
                if name not in self._refused or name in self.instead
            }
            try:
                return await post(http, url, sent, await self.headers(url))
            except HttpError as error:
                if error.status == 401:
                    self._key = ""  # it may have been replaced: the next call reads it again
                refused = refused_field(error, sent, self.optional)
                if refused is None:
                    raise
                self._refused.add(refused)

    async def get(self, url: str) -> Any:
        return await get(await self._session(), url, await self.headers(url))

    async def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = await self.new_session()
        return self._http

    async def new_session(self) -> aiohttp.ClientSession:
        return await session()

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()


def joined(address: str, path: str) -> str:
    """Returns the URL of a path below an address, which may have a query (Azure's `api-version`).

    >>> joined("api.openai.com/v1", "models")
    'https://api.openai.com/v1/models'
    """
    parts = urlsplit(address if "://" in address else f"https://{address}")
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}".rstrip("/")))


def refused_field(
    error: HttpError, sent: Mapping[str, Any], optional: tuple[str, ...]
) -> str | None:
    """Returns the optional field that a server refuses, as its error message says."""
    said = str(error)
    if error.status not in (400, 422) or not _REFUSES.search(said):
        return None
    details = error.details.get("error") if isinstance(error.details, dict) else None
    named = details.get("param") if isinstance(details, dict) else None
    for name in optional:
        if name in sent and (str(named).startswith(name) if named else name in said):
            return name
    return None
