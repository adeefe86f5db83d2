"""`chatflow tail`: results as they come, from Pub/Sub."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chatflow.errors import BadInputError, UsageError
from chatflow.records import Analysis, DeadLetter, Draft, Record, Reply, open_record
from chatflow.sources.puller import Puller, open_puller
from chatflow.sources.read import PUBSUB_INPUT


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


def for_people(record: Record) -> str:
    """A record for a person, with rich's markup."""
    from chatflow.running.summary import TONE_STYLES
    from chatflow.running.terminal import draft_text, plain

    if isinstance(record, Analysis):
        word, style = TONE_STYLES[int(record.sentiment)]
        said = f"[{style}]{word:<7}[/] {plain(record.chat_id)} {plain(record.user_id)}: "
        return said + plain(record.summary)
    if isinstance(record, Draft):
        text = " ".join(draft_text(record).split())
        return f"[bold]draft[/]   {plain(record.chat_id)} {plain(record.user_id)}: {plain(text)}"
    if isinstance(record, Reply):
        said = f"[bold]reply[/]   {plain(record.chat_id)} {plain(record.user_id)}"
        text = plain(" ".join(record.text.split()))
        return f"{said}, approved by {plain(record.approved_by)}: {text}"
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
    shown = 0
    with follow(paths) as arrived:
        while not parsed.count or shown < parsed.count:
            for message in arrived():
                if parsed.json:
                    print(message.data.decode(), flush=True)
                else:
                    console.print(said(message.data))
                shown += 1
    return 0


def said(data: bytes) -> str:
    try:
        return for_people(open_record(data))
    except BadInputError as error:
        return f"no record of chatflow: {error}"
