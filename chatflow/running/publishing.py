"""Publishes chats and lines of files to a Pub/Sub topic, at a rate."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from chatflow.errors import UsageError, one_line
from chatflow.records import Arrival, Chat, Event, now
from chatflow.sinks.pubsub import ordering_key, publisher, wait_published
from chatflow.sources.chats import USUAL, Customs
from chatflow.sources.lines import numbered, root_of
from chatflow.sources.parse import parse_arrival
from chatflow.sources.read import files_of

GIVE_UP_SECONDS = 60.0


class Line(NamedTuple):
    """A message to publish; `chat_id` is its ordering key, empty if the line has none."""

    data: bytes
    chat_id: str


@dataclasses.dataclass(frozen=True)
class Lines:
    """The non-blank lines of files, read again by each iteration; raises as `numbered` does.

    Files of other formats than JSON Lines become lines, a chat each.
    """

    paths: Sequence[str]
    flag: str
    customs: Customs
    root: str

    def __iter__(self) -> Iterator[bytes]:
        for path in self.paths:
            for _, line in numbered(path, self.flag, self.customs, self.root):
                yield line


def read_lines(pattern: str, flag: str = "FILE", customs: Customs = USUAL) -> Iterable[bytes]:
    """Returns the non-blank lines of files, which each iteration reads again; for pipes, a list.

    Raises `UsageError` if there is no file; iterating it, if one cannot be read to its end.
    """
    lines = Lines(files_of(pattern, flag), flag, customs, root_of([pattern]))
    pipes = [path for path in lines.paths if "://" not in path and not os.path.isfile(path)]
    return list(lines) if pipes else lines


def as_they_are(lines: Iterable[bytes], customs: Customs = USUAL) -> Iterator[Line]:
    """Yields each line as a message, whatever it contains; its chat's id is the key."""
    for line in lines:
        read = _parse(line, customs)
        yield Line(line, read[0].chat_id if read else "")


def _parse(line: bytes, customs: Customs) -> list[Chat | Event]:
    try:
        return parse_arrival(Arrival(line), timedelta(0), customs)
    except Exception:  # the line is sent, whatever the parser says of it
        return []


@dataclasses.dataclass
class Replay:
    """Replays chats as if they happened now: message by message, then closed.

    `at_once` chats are open at a time. `sent` is called with chat id, revision and time of sending
    (seconds since 1970) of each message; `AssembleChats` computes the same revision.
    """

    chats: Iterable[Chat]
    at_once: int = 8
    seed: int = 0
    sent: Callable[[str, int, float], None] = lambda chat_id, revision, at: None

    def __iter__(self) -> Iterator[Line]:
        chance = random.Random(self.seed)
        waiting = map(self._messages, self.chats)
        talking: list[Iterator[Line]] = []
        while True:
            talking += itertools.islice(waiting, self.at_once - len(talking))
            if not talking:
                return
            speaker = chance.choice(talking)
            line = next(speaker, None)
            if line is None:
                talking.remove(speaker)
            else:
                yield line

    def _messages(self, chat: Chat) -> Iterator[Line]:
        """Yields the messages of a chat, dated when they are sent, and its end."""
        for number, message in enumerate(chat.messages, 1):
            at = now()
            at = at.replace(microsecond=at.microsecond // 1000 * 1000)
            fresh = message.model_copy(
                update={
                    "message_id": message.message_id or f"{chat.chat_id}-{number}",
                    "sent_at": at,
                    "attributes": {**chat.attributes, **message.attributes},
                }
            )
            self.sent(chat.chat_id, round(at.timestamp() * 1000) + number, at.timestamp())
            yield Line(_line(Event(chat_id=chat.chat_id, message=fresh)), chat.chat_id)
        yield Line(_line(Event(chat_id=chat.chat_id)), chat.chat_id)


def _line(event: Event) -> bytes:
    return event.to_line().encode()


def chats_of(lines: Iterable[bytes], customs: Customs = USUAL) -> tuple[list[Chat], list[bytes]]:
    """Returns the whole chats among lines, and the other lines; reads them twice."""
    return [*chats_in(lines, customs)], [*others_in(lines, customs)]


def chats_in(lines: Iterable[bytes], customs: Customs = USUAL) -> Iterator[Chat]:
    """Yields the whole chats among lines."""
    return (one for line in lines for one in _parse(line, customs) if isinstance(one, Chat))


def others_in(lines: Iterable[bytes], customs: Customs = USUAL) -> Iterator[bytes]:
    """Yields the lines that are not whole chats."""
    for line in lines:
        if not any(isinstance(one, Chat) for one in _parse(line, customs)):
            yield line


def send(
    lines: Iterable[Line],
    topic: str,
    rate: float = 0,
    published: Callable[[int], None] = lambda count: None,
    stopped: Callable[[float | None], bool] = threading.Event().wait,
) -> int:
    """Publishes lines in order, waits until the service has them, and returns their number.

    Args:
      rate: messages per second; 0 means no limit.
      published: called with the count so far.
      stopped: waits for a number of seconds; true ends the sending.

    Raises:
      UsageError: the topic could not be reached for a minute, or there are no credentials.
    """
    try:
        client = publisher()
    except Exception as error:  # Google's errors, and those of a key file
        raise UsageError(f"--topic: {topic} cannot be published to: {one_line(error)}") from None
    waiting: list[tuple[dict[str, Any], Any]] = []
    started, count = time.monotonic(), 0

    def settle() -> None:
        give_up = time.monotonic() + GIVE_UP_SECONDS
        for message, future in waiting:
            wait_published(client, topic, message, future, give_up)
        waiting.clear()

    try:
        for line in lines:
            due = started + count / rate if rate else 0
            if due > time.monotonic():
                settle()
                if stopped(max(due - time.monotonic(), 0)):
                    break
            message = {"data": line.data, "ordering_key": ordering_key(line.chat_id)}
            waiting.append((message, client.publish(topic, **message)))
            if len(waiting) >= 1000:
                settle()
            count += 1
            published(count)
        settle()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"--topic: {topic} cannot be published to: {one_line(error)}") from None
    finally:
        client.stop()
    return count
