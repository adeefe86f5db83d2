"""Puller: pulls Pub/Sub messages in the background and survives outages.

Google's streaming pull may hang forever when its connection breaks (seen with google-cloud-pubsub
2.x when the emulator restarts; the last thing it logs is "Re-opening stream from gRPC callback").
Single pulls, one after the other, have no connection state that can break.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chatflow.errors import UsageError, one_line
from chatflow.network import pubsub_client

_log = logging.getLogger(__name__)

_LEASE_SECONDS = 60
WAITING_BYTES = 100_000_000
"""The most bytes of messages to take at once; about the same may wait to be taken."""

_PULL_SECONDS = 1.0  # short, so that a pull ends before its connection can break


def open_puller(path: str) -> Puller:
    """Returns a puller, not yet started; raises `UsageError` if its path cannot be read."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        puller = Puller(path)
        try:
            puller.check()
        except BaseException:
            puller.close()
            raise
    except (GoogleAPIError, GoogleAuthError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from None
    return puller


class Puller:
    """Pulls a subscription, or a topic from now on, until it is closed.

    It tries again after every failure, with growing pauses of up to 10 seconds, and creates a
    topic's subscription again if somebody deleted it. `error` is the error of the last pull, or
    None.

    Args:
      path: `projects/P/subscriptions/S` or `projects/P/topics/T`.
      most: the most messages in one pull; at most twice as many wait to be taken.
    """

    def __init__(self, path: str, most: int = 1000):
        self.path = self._subscription = path
        self._topic = path if "/topics/" in path else None
        if self._topic:
            project = re.sub("/topics/.*", "", path)
            self._subscription = f"{project}/subscriptions/chatflow-{uuid.uuid4().hex}"
        self._client = pubsub_client("SubscriberClient")
        self._most = most
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._counting = threading.Lock()
        self._leased: set[str] = set()
        self._closed = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._pull, daemon=True)

    def start(self) -> Puller:
        """Starts to pull; call `check` first to be sure that it works."""
        self._thread.start()
        threading.Thread(target=self._extend, daemon=True).start()
        return self

    def check(self) -> None:
        """Raises `google.api_core.exceptions.GoogleAPIError` if the path cannot be read."""
        if self._topic:
            self._make_subscription()
        else:
            self._client.get_subscription(subscription=self._subscription, timeout=10, retry=None)

    def take(self, most: int, wait: float) -> list[Any]:
        """Returns up to `most` messages (`ReceivedMessage`); waits `wait` seconds for the first.

        It returns fewer messages if they are large, so that they fit into memory; see
        `WAITING_BYTES`.
        """
        taken: list[Any] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            while len(taken) < most and size < WAITING_BYTES:
                waits = wait and not taken
                found = self._arrived.get(timeout=wait) if waits else self._arrived.get_nowait()
                taken.append(found)
                size += len(found.message.data)
        with self._counting:
            self._waiting_bytes -= size
        return taken

    def acknowledge(self, messages: Sequence[Any]) -> None:
        """Acknowledges messages; if that fails, Pub/Sub sends them again."""
        ids = [message.ack_id for message in messages]
        try:
            for some in _chunks(ids):
                self._client.acknowledge(subscription=self._subscription, ack_ids=some, timeout=10)
        except Exception as error:
            _log.warning("%s: %d messages will come again: %s", self.path, len(ids), error)
        self._leased.difference_update(ids)

    def close(self) -> None:
        """Stops pulling; other subscribers can get unacknowledged messages at once.

        It waits for the last pull, because messages that Pub/Sub sends to a closed client stay
        leased until the lease ends.
        """
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5 * _PULL_SECONDS)
        with contextlib.suppress(Exception):
            self._lease(0)
        with contextlib.suppress(Exception):
            if self._topic:
                self._client.delete_subscription(subscription=self._subscription, timeout=5)
        self._client.close()

    def _make_subscription(self) -> None:
        from google.api_core.exceptions import AlreadyExists

        with contextlib.suppress(AlreadyExists):
            self._client.create_subscription(name=self._subscription, topic=self._topic, timeout=10)

    def _pull(self) -> None:
        from google.api_core.exceptions import DeadlineExceeded, NotFound

        pause = 0.5
        missing = self._topic is not None
        while not self._closed.is_set():
            if self._arrived.qsize() > self._most or self._waiting_bytes > WAITING_BYTES:
                self._closed.wait(0.05)
                continue
            try:
                if missing:
                    self._make_subscription()
                    missing = False
                response = self._client.pull(
                    subscription=self._subscription,
                    max_messages=self._most,
                    timeout=_PULL_SECONDS,
                    retry=None,
                )
            except DeadlineExceeded:
                pass  # nothing came
            except Exception as error:
                if self._closed.is_set():
                    return
                missing = self._topic is not None and isinstance(error, NotFound)
                _log.warning("%s cannot be read, trying again: %s", self.path, error)
                self.error = error
                self._closed.wait(pause)
                pause = min(2 * pause, 10)
                continue
            else:
                size = sum(len(found.message.data) for found in response.received_messages)
                with self._counting:
                    self._waiting_bytes += size
                for message in response.received_messages:
                    self._leased.add(message.ack_id)
                    self._arrived.put(message)
            self.error, pause = None, 0.5

    def _extend(self) -> None:
        """Extends the leases of unacknowledged messages, so that they are not sent again."""
        while not self._closed.wait(5):  # a new subscription leases for 10 seconds
            try:
                self._lease(_LEASE_SECONDS)
            except Exception as error:
                _log.debug("%s: no lease: %s", self.path, error)

    def _lease(self, seconds: int) -> None:
        for ids in _chunks(list(self._leased)):
            self._client.modify_ack_deadline(
                subscription=self._subscription,
                ack_ids=ids,
                ack_deadline_seconds=seconds,
                timeout=10,
            )


def _chunks(ids: list[str]) -> Iterator[list[str]]:
    """Yields the ids in lists of at most 1000, the most for one request."""
    for start in range(0, len(ids), 1000):
        yield ids[start : start + 1000]


@contextlib.contextmanager
def follow(paths: Sequence[str]) -> Iterator[Callable[[], list[Any]]]:
    """Yields a function that returns new `PubsubMessage`s of subscriptions and topics.

    A topic is read from now on, through a subscription that is deleted at the end. Raises
    `UsageError` if a path cannot be read.
    """
    pullers: list[Puller] = []

    def arrived() -> list[Any]:
        received = [(puller, puller.take(100, 0)) for puller in pullers]
        for puller, messages in received:
            if messages:
                puller.acknowledge(messages)
        if not any(messages for _, messages in received):
            time.sleep(0.05)
        return [m.message for _, messages in received for m in messages]

    try:
        for path in paths:
            pullers.append(open_puller(path).start())
        yield arrived
    finally:
        for puller in pullers:
            puller.close()
