"""Starts and stops Google's Pub/Sub emulator."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from chatflow.errors import UsageError, one_line
from chatflow.network import PUBSUB_HOST, pubsub_client
from chatflow.running.processes import kill, started

HOST_VARIABLE = PUBSUB_HOST
INSTALL = (
    "install the Google Cloud CLI with its component pubsub-emulator and a Java runtime "
    "(https://cloud.google.com/pubsub/docs/emulator), or start one elsewhere and set "
    f"{HOST_VARIABLE}"
)


class Emulator:
    """A Pub/Sub emulator in a separate process, by default on a free port.

    Its `host` is `127.0.0.1:PORT`, the value for `PUBSUB_EMULATOR_HOST`.
    """

    def __init__(self, port: int = 0):
        self.host = f"127.0.0.1:{port or free_port()}"
        self._process: Any = None

    def start(self, seconds: float = 60) -> None:
        """Starts the emulator and waits until it is ready; raises `UsageError` if it cannot."""
        gcloud = shutil.which("gcloud")
        if gcloud is None:
            raise UsageError(f"the Pub/Sub emulator is missing: {INSTALL}")
        self._data = tempfile.mkdtemp(prefix="chatflow-pubsub-")
        command = [
            gcloud, "beta", "emulators", "pubsub", "start", f"--host-port={self.host}",
            "--project=chatflow-local", "--quiet", f"--data-dir={self._data}",
        ]  # fmt: skip
        self._process, ready, said = started(command, "Server started", seconds)
        if not ready:
            self.stop()
            said = said or "nothing"
            raise UsageError(f"the Pub/Sub emulator did not start; it said: {said}. {INSTALL}")

    def stop(self) -> None:
        if self._process is not None:
            kill(self._process)  # with Java, which gcloud starts as a child
            self._process = None
            shutil.rmtree(self._data, ignore_errors=True)


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Yields the host in `PUBSUB_EMULATOR_HOST`; if it is not set, that of a new emulator."""
    if host := os.environ.get(HOST_VARIABLE):
        yield host
        return
    own = Emulator()
    own.start()
    os.environ[HOST_VARIABLE] = own.host
    try:
        yield own.host
    finally:
        del os.environ[HOST_VARIABLE]
        own.stop()


def make_topics(topics: Iterable[str]) -> None:
    """Creates missing topics, and a subscription of the same name for each topic.

    Raises `UsageError` if nothing answers at `PUBSUB_EMULATOR_HOST`.
    """
    from google.api_core.exceptions import AlreadyExists, GoogleAPIError
    from google.api_core.retry import Retry

    # An emulator that has just restarted may refuse at first.
    once: Any = {"timeout": 30, "retry": Retry(timeout=10)}
    try:
        publishing, subscribing = map(pubsub_client, ("PublisherClient", "SubscriberClient"))
        with publishing as publisher, subscribing as subscriber:
            for topic in topics:
                with contextlib.suppress(AlreadyExists):
                    publisher.create_topic(name=topic, **once)
                with contextlib.suppress(AlreadyExists):
                    subscriber.create_subscription(
                        name=subscription_of(topic), topic=topic, ack_deadline_seconds=60, **once
                    )
    except GoogleAPIError as error:
        host = os.environ.get(HOST_VARIABLE, "")
        raise UsageError(
            f"{HOST_VARIABLE}={host}: no emulator answers there: {one_line(error)}; "
            "start one, or unset the variable"
        ) from None


def subscription_of(topic: str) -> str:
    return topic.replace("/topics/", "/subscriptions/")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
