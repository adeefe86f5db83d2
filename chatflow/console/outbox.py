"""Outbox: approved replies to a topic or a file, each once.

An approval and its reply are one transaction; a publisher takes replies from there, so that
neither is without the other, whatever is killed in between
(https://microservices.io/patterns/data/transactional-outbox.html).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import fasteners
import sqlalchemy as sa

from chatflow.database.connections import Database, clock
from chatflow.database.tables import outbox
from chatflow.errors import UsageError, one_line
from chatflow.records import Reply, now

LEASE_SECONDS = 60.0
"""How long replies are one publisher's; when it is killed, another one takes them then."""

LOOK_SECONDS = 0.5
"""Between two looks for replies."""

MOST = 100
"""Replies that are published at once."""

_BEGINS = b'{"reply_id":'
"""What each reply in a file begins with: what is cut off and does not is somebody else's."""

_log = logging.getLogger(__name__)


class Replies(Protocol):
    """Where replies go."""

    def send(self, replies: Sequence[Reply], seconds: float) -> None:
        """Sends replies that were perhaps sent before.

        Args:
          seconds: after which it gives up.

        Raises:
          PartlySentError: some were sent, and others perhaps not.
          Exception: all were perhaps not sent.
        """


class PartlySentError(Exception):
    """Some replies were not sent.

    Attributes:
      sent: ids of those that were.
    """

    def __init__(self, error: Exception, sent: Collection[str]):
        super().__init__(one_line(error))
        self.sent = sent


class ReplyFile:
    """A file of lines of JSON. A reply that is in it is not written again: each is there once."""

    def __init__(self, path: str):
        """
        Raises:
          UsageError: the file cannot be written, or has other things in it.
        """
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UsageError(f"--replies={path}: there is no folder {self.path.parent}")
        self._lock = fasteners.InterProcessLock(f"{path}.lock")
        self._ids: set[str] = set()
        self._read_to = 0
        try:
            self.send((), LEASE_SECONDS)
        except OSError as error:
            raise UsageError(f"--replies={path}: cannot be written: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"--replies={path}: has a line that is no reply") from None

    def send(self, replies: Sequence[Reply], seconds: float) -> None:
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError(f"{self.path}.lock is held by another process")
        try:
            with self.path.open("a+b") as file:
                self._read(file)
                new = [reply for reply in replies if reply.reply_id not in self._ids]
                file.write(b"".join(reply.to_json().encode() + b"\n" for reply in new))
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._lock.release()

    def _read(self, file: Any) -> None:
        """Learns the ids of what others have written; removes a line that was cut off."""
        file.seek(0, os.SEEK_END)
        if file.tell() < self._read_to:  # somebody began it anew
            self._read_to = 0
            self._ids.clear()
        file.seek(self._read_to)
        for line in file:
            try:
                found = json.loads(line)["reply_id"]
            except ValueError:
                if line.endswith(b"\n") or not line.startswith(_BEGINS[: len(line)]):
                    raise
                file.truncate(self._read_to)
                break
            if not line.endswith(b"\n"):  # all of it is there
                file.write(b"\n")
                line += b"\n"
            self._ids.add(found)
            self._read_to += len(line)
        file.seek(0, os.SEEK_END)


class ReplyTopic:
    """A Pub/Sub topic. Its messages are as those of other records: attribute `id`, ordered."""

    def __init__(self, topic: str):
        self.topic = topic
        self._client: Any = None

    def send(self, replies: Sequence[Reply], seconds: float) -> None:
        # Beam takes seconds to be imported, which files need not wait for.
        from chatflow.sinks.pubsub import publisher, to_message

        if self._client is None:
            self._client = publisher()
        messages = [to_message(reply) for reply in replies]
        sent = [self._client.publish(self.topic, timeout=seconds, **m) for m in messages]
        give_up = time.monotonic() + seconds
        done: set[str] = set()
        failed: dict[str, Exception] = {}
        for reply, message, future in zip(replies, messages, sent, strict=True):
            try:
                future.result(timeout=max(give_up - time.monotonic(), 0.1))
                done.add(reply.reply_id)
            except Exception as error:
                failed[message["ordering_key"]] = error
        for key in failed:  # else the client would never publish to this key again
            with contextlib.suppress(RuntimeError):  # it would: this one was only late
                self._client.resume_publish(self.topic, key)
        if failed:
            raise PartlySentError(next(iter(failed.values())), done)


def replies_to(uri: str) -> Replies:
    """What `--replies` names.

    Raises:
      UsageError: nothing that replies can go to.
    """
    if uri.startswith(("projects/", "pubsub://")):
        from chatflow.sinks.pubsub import PUBSUB_TOPIC, check_topics

        if topic := PUBSUB_TOPIC.fullmatch(uri):
            check_topics([uri])
            return ReplyTopic(topic[1])
    if "://" in uri or uri.startswith("projects/"):
        raise UsageError(
            f"--replies={uri}: replies go to a topic (projects/PROJECT/topics/NAME) or to a file "
            "of this machine"
        )
    return ReplyFile(uri)


class Publisher:
    """Publishes replies from the outbox, in a thread of its own; several may do so."""

    def __init__(self, database: Database, replies: Replies):
        self.database, self.replies = database, replies
        self._name = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends it, when it has published what it has taken."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause = LOOK_SECONDS
        while not self._stop.wait(pause):
            try:
                while self.publish():
                    pass
                pause = LOOK_SECONDS
            except Exception as error:
                _log.warning("replies were not published, trying again: %s", one_line(error))
                pause = min(2 * pause, 30)

    def publish(self) -> int:
        """Publishes replies that are due; gives how many.

        Raises:
          Exception: they could not be published; they stay in the outbox.
        """
        due = self._take()
        if not due:
            return 0
        try:
            self.replies.send([Reply(**reply) for reply in due.values()], LEASE_SECONDS / 2)
        except Exception as error:
            sent = error.sent if isinstance(error, PartlySentError) else ()
            self._note_sent(sent)
            self._put_back([draft_id for draft_id in due if draft_id not in sent], one_line(error))
            raise
        self._note_sent(due)
        return len(due)

    def _note_sent(self, ids: Collection[str]) -> None:
        """Notes it while they are still this publisher's, also where the database is away."""
        mine = outbox.c.draft_id.in_(list(ids)), outbox.c.published_at.is_(None)
        give_up = time.monotonic() + LEASE_SECONDS / 2
        while True:
            try:
                with self.database.write() as connection:
                    noted = sa.update(outbox).where(*mine)
                    connection.execute(noted.values(published_at=now(), error=None))
                return
            except sa.exc.DBAPIError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(LOOK_SECONDS)

    def _take(self) -> dict[str, Any]:
        """Replies for this publisher alone, by their drafts, in the order of approval."""
        with self.database.read() as connection:
            moment = clock(connection)
            free = (
                outbox.c.published_at.is_(None),
                outbox.c.publish_after <= moment,
                sa.or_(outbox.c.leased_until.is_(None), outbox.c.leased_until < moment),
            )
            query = sa.select(outbox.c.draft_id).where(*free)
            ids = list(
                connection.execute(query.order_by(outbox.c.publish_after).limit(MOST)).scalars()
            )
        if not ids:
            return {}
        with self.database.write() as connection:
            lease = moment + timedelta(seconds=LEASE_SECONDS)
            connection.execute(
                sa.update(outbox)
                .where(outbox.c.draft_id.in_(ids), *free)  # somebody else may have been faster
                .values(leased_by=self._name, leased_until=lease, attempts=outbox.c.attempts + 1)
            )
            query = sa.select(outbox.c.draft_id, outbox.c.reply).where(
                outbox.c.draft_id.in_(ids),
                outbox.c.leased_by == self._name,
                outbox.c.leased_until == lease,
            )
            return {
                row.draft_id: row.reply
                for row in connection.execute(query.order_by(outbox.c.publish_after))
            }

    def _put_back(self, ids: Sequence[str], error: str) -> None:
        """They are anybody's again, but can no longer be undone: some may have gone out."""
        with self.database.write() as connection:
            connection.execute(
                sa.update(outbox)
                .where(outbox.c.draft_id.in_(ids), outbox.c.leased_by == self._name)
                .values(leased_until=None, error=error)
            )
