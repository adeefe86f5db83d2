"""`chatflow tail`: results as they come, from Pub/Sub."""

from __future__ import annotations

import argparse
import contextlib
import queue
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chatflow.errors import BadInputError, UsageError
from chatflow.records import Analysis, DeadLetter, Draft, Record, load_object, validate
from chatflow.sources import PUBSUB_INPUT


@contextlib.contextmanager
def follow(paths: Sequence[str], arrived: Callable[[bytes], None]) -> Iterator[list[Any]]:
    """Calls a function with each message of subscriptions and topics, from another thread.

    A topic is read from now on, by a subscription that is removed at the end.

    Raises:
      UsageError: a path cannot be read.
    """
    import google.cloud.pubsub_v1 as pubsub_v1
    from google.api_core.exceptions import GoogleAPICallError, RetryError

    def take(message: Any) -> None:
        arrived(message.data)
        message.ack()

    made: list[str] = []
    pulling: list[Any] = []
    with pubsub_v1.SubscriberClient() as client:
        try:
            for path in paths:
                subscription = path
                if "/topics/" in path:
                    project = re.sub("/topics/.*", "", path)
                    subscription = f"{project}/subscriptions/chatflow-tail-{uuid.uuid4().hex}"
                    client.create_subscription(name=subscription, topic=path, timeout=10)
                    made.append(subscription)
                else:
                    client.get_subscription(subscription=path, timeout=10)
                pulling.append(client.subscribe(subscription, callback=take))
            yield pulling
        except (GoogleAPICallError, RetryError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
        finally:
            for future in pulling:
                future.cancel()
                with contextlib.suppress(Exception):
                    future.result(timeout=10)
            for subscription in made:
                with contextlib.suppress(Exception):
                    client.delete_subscription(subscription=subscription, timeout=5)


def open_record(data: bytes) -> Record:
    """A result of any kind from its JSON.

    Raises:
      BadInputError: it is none.
    """
    value = load_object(data)
    kind: type[Record] = DeadLetter
    if "draft_id" in value:
        kind = Draft
    elif "analysis_id" in value:
        kind = Analysis
    return validate(kind, value)


def one_line(record: Record) -> str:
    """A record for a person, with rich's markup."""
    from chatflow.report import TONE_STYLES, plain

    if isinstance(record, Analysis):
        word, style = TONE_STYLES[int(record.sentiment)]
        said = f"[{style}]{word:<7}[/] {plain(record.chat_id)} {plain(record.user_id)}: "
        return said + plain(record.summary)
    if isinstance(record, Draft):
        text = " ".join(record.text.split())
        return f"[bold]draft[/]   {plain(record.chat_id)} {plain(record.user_id)}: {plain(text)}"
    assert isinstance(record, DeadLetter)
    where = f"{record.stage}/{record.reason}"
    return f"[magenta]dead[/]    {plain(record.chat_id or '-')} {where}: {plain(record.error)}"


def tail(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """The command: prints until it is interrupted, or `--count` is reached."""
    from rich.console import Console

    if flags:
        raise UsageError(f"unknown flag {flags[0]}; see chatflow tail --help")
    paths = []
    for path in parsed.paths:
        if not (matched := PUBSUB_INPUT.fullmatch(path)):
            raise UsageError(
                f"{path!r}: must be projects/PROJECT/topics/NAME or "
                "projects/PROJECT/subscriptions/NAME"
            )
        paths.append(matched[1])
    console = Console(highlight=False, soft_wrap=True)
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    shown = 0
    with follow(paths, arrived.put) as pulling:
        while not parsed.count or shown < parsed.count:
            try:
                data = arrived.get(timeout=1)
            except queue.Empty:
                for path, future in zip(paths, pulling, strict=True):
                    if future.done():
                        raise UsageError(f"{path} broke off: {future.exception()}") from None
                continue
            if parsed.json:
                print(data.decode(), flush=True)
            else:
                try:
                    console.print(one_line(open_record(data)))
                except BadInputError as error:
                    console.print(f"no record of chatflow: {error}", markup=False)
            shown += 1
    return 0
