"""Posts records to webhooks, each in a signed POST."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import logging
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import apache_beam as beam
from apache_beam.utils.windowed_value import WindowedValue

from chatflow.dead_letters import fitted, refused
from chatflow.errors import ElementError, UsageError, one_line
from chatflow.network import LoopThread, pause, retry_after, session
from chatflow.options import SinkSettings
from chatflow.records import DeadLetter, Record, record_id
from chatflow.secrets import PLACES_SAID, check_place, read_secret
from chatflow.sinks.sink import Sink, Uris

if TYPE_CHECKING:
    import aiohttp

SECRET_BYTES = 24
"""The shortest secret that the Standard Webhooks specification allows."""

WEBHOOK_SECONDS = 120.0
"""How long to retry posting a record before it becomes a dead letter."""

ANSWER_SECONDS = 30.0
"""How long one POST may take, including its whole answer; the specification says 15 to 30."""

AWAY_SECONDS = 30.0
"""How long records fail without a try after one was given up, unless another got through."""

SMALL_BYTES = 900_000
"""About the most bytes of a POST that services accept by default (nginx: 1 MB)."""

AT_ONCE = 8
"""POSTs in flight per bundle."""

BUNDLE_RECORDS = 1000
"""Records of a bundle that are posted together."""

ANSWER_BYTES = 65_536
"""How much of an answer to read; nothing waits for the rest."""

_AGAIN = {408, 409, 425, 429}
"""Statuses to retry, besides 5xx; 409: the last try is in progress (IETF `Idempotency-Key`)."""

_log = logging.getLogger(__name__)


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class PostRecords(beam.PTransform):
    """Posts each record as JSON to a webhook, in no order; outputs a `DeadLetter` per refused one.

    A refused dead letter fails its bundle; one that is too large (413) is sent in parts. POSTs are
    signed as https://www.standardwebhooks.com specifies. Delivery is at least once: `webhook-id`
    and `Idempotency-Key` are the record's id, which stays the same in retries, repeated bundles
    and replays.

    Attributes:
      url: see `Webhook.check_uri`.
      secret: where the secret is (see `secrets.PLACES`); workers read it when they start.
    """

    url: str = dataclasses.field(repr=False)  # its query may be secret
    secret: str = dataclasses.field(repr=False)  # it may be the secret itself, by mistake

    def __post_init__(self) -> None:
        if not self.secret:
            raise UsageError(
                f"--webhook_secret is missing: it signs what goes to {shown(self.url)}. Make a "
                'secret with `echo "whsec_$(openssl rand -base64 32)"`, give it to the service, '
                f"and say where workers find it: {PLACES_SAID}"
            )
        check_place(self.secret, "--webhook_secret")

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter]:
        post = beam.ParDo(_PostDoFn(self.url, self.secret))
        return records | "Post" >> post.with_output_types(DeadLetter)


class _PostDoFn(beam.DoFn):
    def __init__(self, url: str, secret: str):
        self.url, self.secret = url, secret

    def setup(self) -> None:
        self.poster = Poster(self.url, read_keys(self.secret))

    def start_bundle(self) -> None:
        self.waiting: list[WindowedValue] = []

    def process(
        self,
        record: Record,
        at: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[WindowedValue]:
        self.waiting.append(WindowedValue(record, at, [window]))
        if len(self.waiting) == BUNDLE_RECORDS:
            yield from self.finish_bundle()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        waiting, self.waiting = self.waiting, []
        errors = self.poster.post([found.value for found in waiting])
        for found, error in zip(waiting, errors, strict=True):
            if error is not None:
                yield found.with_value(refused(found.value, error))

    def teardown(self) -> None:
        self.poster.close()


class WebhookError(ElementError):
    """A service did not accept a record."""


class _Fault(NamedTuple):
    """Why a try failed; if `again`, another try may help after at least `wait` seconds."""

    reason: str
    error: str
    again: bool = True
    wait: float = 0.0


class Poster:
    """Posts records to one address, several at once, on one thread.

    Each of the `keys` makes a signature, so that the service can know the old or the new secret.
    """

    def __init__(self, url: str, keys: Sequence[bytes]):
        self.url, self._keys = url, keys
        self._answered_at = self._away_until = self._warned_at = 0.0
        self._last: _Fault | None = None
        self._thread = LoopThread("webhooks")
        # Of the environment only the proxy: no passwords of ~/.netrc.
        options = {"auto_decompress": False, "trust_env": False}
        self._http = self._thread.run(session(cookies=False, **options))
        self._proxy = _proxy_of(url)

    def post(self, records: Sequence[Record]) -> list[Exception | None]:
        """Posts records; returns None or an error for each."""
        return self._thread.run(self._post_all(records))

    def close(self) -> None:
        self._thread.close(self._http.close)

    async def _post_all(self, records: Sequence[Record]) -> list[Exception | None]:
        free = asyncio.Semaphore(AT_ONCE)

        async def post(record: Record) -> Exception | None:
            async with free:
                try:
                    await self._deliver_whole(record)
                except Exception as error:  # any error concerns this record only
                    return error
                return None

        return await asyncio.gather(*map(post, records))

    async def _deliver_whole(self, record: Record) -> None:
        """Posts a record; sends a dead letter in parts if the service finds it too large."""
        try:
            await self._deliver(record_id(record), record.to_json().encode())
        except WebhookError as error:
            if error.reason != "webhook_http_413" or not isinstance(record, DeadLetter):
                raise
            for part in fitted(record, SMALL_BYTES, SMALL_BYTES // 2):
                await self._deliver(record_id(part), part.to_json().encode())

    async def _deliver(self, key: str, body: bytes) -> None:
        """Posts a record, with retries if they may help; raises `WebhookError` if it fails."""
        started, tries = time.monotonic(), 0
        if self._last and started < self._away_until:
            said = f"not tried, because others have just failed: {self._last.error}"
            raise WebhookError(self._last.reason, said)
        while (fault := await self._try(key, body)) is not None:
            tries += 1
            now = time.monotonic()
            seconds = pause(tries, fault.wait)
            if not fault.again:
                self._answered_at, self._away_until = now, 0.0
            if not fault.again or now + seconds > started + WEBHOOK_SECONDS:
                if now - started > WEBHOOK_SECONDS / 2 and self._answered_at < started:
                    self._last, self._away_until = fault, now + AWAY_SECONDS
                times = "once" if tries == 1 else f"{tries} times"
                wait = f", and asked to wait {fault.wait:.0f} s" if fault.wait else ""
                raise WebhookError(fault.reason, f"{fault.error} (tried {times}{wait})")
            self._warn(fault)
            await asyncio.sleep(seconds)
        self._answered_at, self._away_until = time.monotonic(), 0.0

    async def _try(self, key: str, body: bytes) -> _Fault | None:
        """Sends one POST; returns None if the record was accepted."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "chatflow",
            "Accept-Encoding": "identity",
            "Idempotency-Key": key,
            **signed(self._keys, key, int(time.time()), body),
        }
        import aiohttp

        where = _host_of(self.url)
        try:
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                self._http.post(
                    self.url, data=body, headers=headers, allow_redirects=False, proxy=self._proxy
                ) as answer,
            ):
                said = await _start_of(answer)
        except TimeoutError:
            error = f"{where} did not finish its answer within {ANSWER_SECONDS:g} s"
            return _Fault("webhook_timeout", error)
        except aiohttp.ClientConnectorCertificateError as wrong:
            return _Fault("webhook_certificate", f"{where}: {one_line(wrong)}", again=False)
        except (aiohttp.ClientError, OSError) as broken:
            said = _without_secrets(f"{type(broken).__name__}: {one_line(broken)}", self.url)
            return _Fault("webhook_unreachable", f"{where}: {said}")
        if 200 <= answer.status < 300:
            return None
        if 300 <= answer.status < 400:
            said = "redirects are not followed; name the new address"
        error = f"{where} answered {answer.status}: {_without_secrets(said, self.url)}"
        again = answer.status in _AGAIN or answer.status >= 500
        return _Fault(f"webhook_http_{answer.status}", error, again, retry_after(answer))

    def _warn(self, fault: _Fault) -> None:
        """Logs a fault, as a warning at most every ten seconds."""
        now = time.monotonic()
        level = logging.WARNING if now - self._warned_at > 10 else logging.INFO
        self._warned_at = now if level == logging.WARNING else self._warned_at
        _log.log(level, "posting failed, trying again: %s", fault.error)


async def _start_of(answer: aiohttp.ClientResponse) -> str:
    """Returns the start of an answer: up to 500 characters."""
    said = b""
    async for part in answer.content.iter_any():
        said += part
        if len(said) > ANSWER_BYTES:
            break
    return " ".join(said[:2000].decode(errors="replace").split())[:500]


def signed(keys: Iterable[bytes], key: str, seconds: int, body: bytes) -> dict[str, str]:
    """Returns the headers that https://www.standardwebhooks.com specifies.

    `key` is the message's id, the same in each try; `seconds` is the time of sending, since 1970.
    """
    content = f"{key}.{seconds}.".encode() + body
    made = (hmac.digest(secret, content, hashlib.sha256) for secret in keys)
    return {
        "webhook-id": key,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(each).decode()}" for each in made),
    }


def read_keys(place: str) -> tuple[bytes, ...]:
    """Returns the keys of the secret at `place` (see `secrets.PLACES`).

    There are several keys while an old and a new one are both valid. Raises `UsageError` if there
    is no key; the message does not show the text found instead.
    """
    keys = keys_of(read_secret(place, "--webhook_secret"))
    if not keys or min(map(len, keys)) < SECRET_BYTES:
        raise UsageError(
            f"--webhook_secret={place}: must contain whsec_… with at least {SECRET_BYTES} "
            'bytes in base64; `echo "whsec_$(openssl rand -base64 32)"` makes one'
        )
    return keys


def keys_of(text: str) -> tuple[bytes, ...]:
    """Returns the keys in `whsec_…` words, separated by blanks; an invalid word is an empty key."""
    return tuple(map(_key, text.split()))


def _key(text: str) -> bytes:
    encoded = text.removeprefix("whsec_").rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return b""
    return key if text.startswith("whsec_") else b""


def shown(text: str) -> str:
    """Returns a text without the users, passwords and queries of addresses in it."""
    return _ADDRESS.sub(lambda found: found[1] + found[2] + ("?…" if found[3] else ""), text)


_ADDRESS = re.compile(r"(https?://)(?:[^/?#,\s]*@)?([^?,\s]*)(\?[^,\s]*)?", re.IGNORECASE)


def _host_of(url: str) -> str:
    """Returns an address without its path, which may be a secret."""
    found = urllib.parse.urlsplit(url)
    return f"{found.scheme}://{found.netloc}"


def _proxy_of(url: str) -> str | None:
    """Returns the proxy that the environment names for an address."""
    found = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(found.netloc):
        return None
    return urllib.request.getproxies().get(found.scheme.lower())


def _without_secrets(said: str, url: str) -> str:
    """Returns a text about an address without its path, and without the values in its query."""
    _, _, path, query, _ = urllib.parse.urlsplit(url)
    values = [value for _, value in urllib.parse.parse_qsl(query) if len(value) > 3]
    path = path if len(path) > 3 else ""
    for secret in filter(None, [path, query, urllib.parse.unquote(query), *values]):
        said = said.replace(secret, "…")
    return said


class Webhook(Sink):
    example = "https://… (a webhook)"
    pattern = re.compile("https?://", re.IGNORECASE)

    def check_uri(self, uri: str) -> None:
        """Refuses addresses other than `https://…`, or `http://` to this machine."""
        try:
            parts = urllib.parse.urlsplit(uri)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if host and "@" in parts.netloc:
            raise UsageError(
                f"{shown(uri)}: must not contain a user or password; what is sent is signed "
                "instead, see --webhook_secret"
            )
        if not host or not re.fullmatch(r"https?://[\w.:\[\]-]+([/?][^\s#\\]*)?", uri, re.I):
            raise UsageError(f"{shown(uri)!r} is not an address; write https://HOST/PATH")
        if parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(
                f"{shown(uri)}: must be https://, because personal data goes through a network; "
                "http:// is only for localhost"
            )

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:
        if local:  # otherwise, maybe only the workers can read the secret
            read_keys(settings.webhook_secret)

    def shown(self, text: str) -> str:
        return shown(text)

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        return PostRecords(uri, settings.webhook_secret)
