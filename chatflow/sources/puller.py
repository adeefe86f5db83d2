"""Puller: messages of Pub/Sub in the background, through outages.

Google's streaming pull may hang for good when its connection breaks (seen with
google-cloud-pubsub 2.x when the emulator is restarted: "Re-opening stream from gRPC
callback" is its last word). Plain pulls, one after the other, have no such state.
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

_log = logging.getLogger(__name__)

_LEASE_SECONDS = 60
_PULL_SECONDS = 1.0  # short, so that a pull ends by itself and not by a broken connection


def open_puller(path: str) -> Puller:
    """A puller of something that is there; it does not pull yet.

    Raises:
      UsageError: it is not there, or cannot be reached.
    """
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

    Whatever fails is tried again, ever more slowly (up to 10 seconds apart); a topic's
    subscription is made again if it is gone.

    Args:
      path: `projects/P/subscriptions/S` or `projects/P/topics/T`.
      most: messages in one pull, and half of those that wait to be taken.

    Attributes:
      error: what the last pull failed with; None where it did not.
    """

    def __init__(self, path: str, most: int = 1000):
        import google.cloud.pubsub_v1 as pubsub_v1

        self.path = self._subscription = path
        self._topic = path if "/topics/" in path else None
        if self._topic:
            project = re.sub("/topics/.*", "", path)
            self._subscription = f"{project}/subscriptions/chatflow-{uuid.uuid4().hex}"
        self._client = pubsub_v1.SubscriberClient()
        self._most = most
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._leased: set[str] = set()
        self._closed = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._pull, daemon=True)

    def start(self) -> Puller:
        """Begins to pull; whoever needs to know that it works, calls `check` before."""
        self._thread.start()
        threading.Thread(target=self._extend, daemon=True).start()
        return self

    def check(self) -> None:
        """Makes sure that there is something to pull.

        Raises:
          google.api_core.exceptions.GoogleAPIError: there is not, or it cannot be reached.
        """
        if self._topic:
            self._make_subscription()
        else:
            self._client.get_subscription(subscription=self._subscription, timeout=10, retry=None)

    def take(self, most: int, wait: float) -> list[Any]:
        """Up to so many messages (`ReceivedMessage`); waits some seconds for the first."""
        taken = []
        with contextlib.suppress(queue.Empty):
            taken.append(self._arrived.get(timeout=wait) if wait else self._arrived.get_nowait())
            while len(taken) < most:
                taken.append(self._arrived.get_nowait())
        return taken

    def acknowledge(self, messages: Sequence[Any]) -> None:
        """Says that messages were handled; where that fails, they come once more."""
        ids = [message.ack_id for message in messages]
        try:
            for some in _chunks(ids):
                self._client.acknowledge(subscription=self._subscription, ack_ids=some, timeout=10)
        except Exception as error:
            _log.warning("%s: %d messages will come again: %s", self.path, len(ids), error)
        self._leased.difference_update(ids)

    def close(self) -> None:
        """Ends; messages that were not acknowledged go to others at once.

        It waits for the last pull: what a service has answered to a client that is gone
        stays leased until its time is over.
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
            if self._arrived.qsize() > self._most:
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
                for message in response.received_messages:
                    self._leased.add(message.ack_id)
                    self._arrived.put(message)
            self.error, pause = None, 0.5

    def _extend(self) -> None:
        """Keeps messages that wait, or are being handled, from being sent again."""
        while not self._closed.wait(5):  # a new subscription gives 10 seconds
            try:
                self._lease(_LEASE_SECONDS)
            except Exception as error:
                _log.debug("%s: no lease: %s", self.path, error)

    def _lease(self, seconds: int) -> None:
        """Has all messages that are here come again only after so many seconds."""
        for ids in _chunks(list(self._leased)):
            self._client.modify_ack_deadline(
                subscription=self._subscription,
                ack_ids=ids,
                ack_deadline_seconds=seconds,
                timeout=10,
            )


def _chunks(ids: list[str]) -> Iterator[list[str]]:
    """As many as one request takes."""
    for start in range(0, len(ids), 1000):
        yield ids[start : start + 1000]


@contextlib.contextmanager
def follow(paths: Sequence[str]) -> Iterator[Callable[[], list[Any]]]:
    """A function that gives what has arrived at subscriptions and topics, as `PubsubMessage`s.

    A topic is read from now on, by a subscription that is removed at the end.

    Raises:
      UsageError: a path cannot be read.
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
