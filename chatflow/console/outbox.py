"""Outbox: publishes approved replies to a topic or a file, each once.

An approval and its reply are stored in one transaction, and publishers read replies from the
database. So a crash cannot leave one without the other
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
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import fasteners
import sqlalchemy as sa

from chatflow.database.connections import Database, clock, private
from chatflow.database.raw import values_of
from chatflow.database.tables import outbox
from chatflow.errors import UsageError, one_line
from chatflow.records import Reply, now
from chatflow.redaction.placeholders import fill

LEASE_SECONDS = 60.0
"""How long a publisher reserves replies; if it is killed, another one takes them after that."""

LOOK_SECONDS = 0.5
"""Seconds between two checks for replies."""

MOST = 100
"""Maximum number of replies published at once."""

UNFILLED_SECONDS = 600.0
"""Seconds until a reply is tried again whose placeholders could not be filled in."""

NOT_FILLED = "a placeholder in the reply cannot be filled in: its value is not stored"

_BEGINS = b'{"reply_id":'
"""The beginning of each reply in a file; a cut-off line without it is not from chatflow."""

_log = logging.getLogger(__name__)


class Replies(Protocol):
    """A destination of replies."""

    def send(self, replies: Sequence[Reply], seconds: float) -> None:
        """Sends replies, which may have been sent before; gives up after `seconds`.

        Raises:
          PartlySentError: some were sent, and others possibly not.
          Exception: possibly none were sent.
        """


class PartlySentError(Exception):
    """Some replies were not sent; `sent` holds the ids of those that were."""

    def __init__(self, error: Exception, sent: Collection[str]):
        super().__init__(one_line(error))
        self.sent = sent


class ReplyFile:
    """A file of JSON lines that holds each reply once: a known reply is not written again."""

    def __init__(self, path: str):
        """Raises `UsageError` if the file cannot be written or contains anything but replies."""
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
            raise UsageError(f"--replies={path}: has a line that is not a reply") from None

    def send(self, replies: Sequence[Reply], seconds: float) -> None:
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError(f"{self.path}.lock is held by another process")
        try:
            with private(self.path).open("a+b") as file:
                self._read(file)
                new = [reply for reply in replies if reply.reply_id not in self._ids]
                file.write(b"".join(reply.to_json().encode() + b"\n" for reply in new))
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._lock.release()

    def remove(self, chat_ids: Collection[str]) -> int:
        """Removes the replies in some chats; returns how many."""
        with self._lock, self.path.open("rb") as file:
            lines = file.readlines()
            kept = [line for line in lines if json.loads(line)["chat_id"] not in chat_ids]
            if len(kept) < len(lines):
                beside = private(f"{self.path}.new")
                beside.write_bytes(b"".join(kept))
                beside.replace(self.path)
        return len(lines) - len(kept)

    def _read(self, file: Any) -> None:
        """Reads the ids that other processes wrote; removes a line that was cut off."""
        file.seek(0, os.SEEK_END)
        if file.tell() < self._read_to:  # somebody emptied or replaced the file
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
            if not line.endswith(b"\n"):  # complete except for its line end
                file.write(b"\n")
                line += b"\n"
            self._ids.add(found)
            self._read_to += len(line)
        file.seek(0, os.SEEK_END)


class ReplyTopic:
    """A Pub/Sub topic; like other records, messages have an attribute `id` and are ordered."""

    def __init__(self, topic: str):
        self.topic = topic
        self._client: Any = None

    def send(self, replies: Sequence[Reply], seconds: float) -> None:
        # Imported here, because Beam takes seconds to import and files do not need it.
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
        for key in failed:  # otherwise the client never publishes to it again
            with contextlib.suppress(RuntimeError):  # key not paused: the reply was only late
                self._client.resume_publish(self.topic, key)
        if failed:
            raise PartlySentError(next(iter(failed.values())), done)


def replies_to(uri: str) -> Replies:
    """Returns the destination that `--replies` names; raises `UsageError` if it cannot be used."""
    if uri.startswith(("projects/", "pubsub://")):
        from chatflow.sinks.pubsub import PUBSUB_TOPIC, check_topics

        if topic := PUBSUB_TOPIC.fullmatch(uri):
            check_topics([uri])
            return ReplyTopic(topic[1])
    if "://" in uri or uri.startswith("projects/"):
        raise UsageError(
            f"--replies={uri}: must be a topic (projects/PROJECT/topics/NAME) or a file on this "
            "machine"
        )
    return ReplyFile(uri)


class Publisher:
    """Publishes replies from the outbox in its own thread; several publishers may run."""

    def __init__(self, database: Database, replies: Replies, raw: Database | None = None):
        self.database, self.replies, self.raw = database, replies, raw or database
        self._name = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after it has published the replies that it has taken."""
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
        """Publishes due replies and returns how many; after an error, they stay in the outbox."""
        due = self._filled(self._take())
        if not due:
            return 0
        try:
            self.replies.send(list(due.values()), LEASE_SECONDS / 2)
        except Exception as error:
            done = error.sent if isinstance(error, PartlySentError) else ()
            sent = [draft_id for draft_id, reply in due.items() if reply.reply_id in done]
            self._note_sent(sent)
            self._put_back([draft_id for draft_id in due if draft_id not in sent], one_line(error))
            raise
        self._note_sent(due)
        return len(due)

    def _filled(self, due: Mapping[str, Any]) -> dict[str, Reply]:
        """Returns replies with their placeholders filled in.

        One that cannot be filled in is tried again later; no customer may see a placeholder.
        """
        found = {draft_id: Reply(**row.reply) for draft_id, row in due.items()}
        open_ = [draft_id for draft_id, row in due.items() if row.placeholders]
        if not open_:
            return found
        keys = [(found[draft_id].chat_id, found[draft_id].revision) for draft_id in open_]
        try:
            hidden, error = values_of(self.raw, keys), NOT_FILLED
        except sa.exc.SQLAlchemyError as fault:
            hidden, error = {}, one_line(fault)
        unfilled = []
        for draft_id, key in zip(open_, keys, strict=True):
            values = hidden.get(key, {})
            if set(due[draft_id].placeholders) <= set(values):
                text = fill(found[draft_id].text, values)
                found[draft_id] = found[draft_id].model_copy(update={"text": text})
            else:
                unfilled.append(draft_id)
                del found[draft_id]
        if unfilled:
            _log.warning("%d replies are not sent: %s", len(unfilled), error)
            self._put_back(unfilled, error, UNFILLED_SECONDS)
        return found

    def _note_sent(self, ids: Collection[str]) -> None:
        """Marks replies as published; retries within the lease if the database is unavailable."""
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
        """Leases due replies for this publisher; returns them by draft id, in approval order."""
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
                .where(outbox.c.draft_id.in_(ids), *free)  # another may have been faster
                .values(leased_by=self._name, leased_until=lease, attempts=outbox.c.attempts + 1)
            )
            query = sa.select(outbox.c.draft_id, outbox.c.reply, outbox.c.placeholders).where(
                outbox.c.draft_id.in_(ids),
                outbox.c.leased_by == self._name,
                outbox.c.leased_until == lease,
            )
            return {
                row.draft_id: row
                for row in connection.execute(query.order_by(outbox.c.publish_after))
            }

    def _put_back(self, ids: Sequence[str], error: str, seconds: float = 0) -> None:
        """Releases the lease in `seconds`; undo stays impossible, as some may have been sent."""
        with self.database.write() as connection:
            until = clock(connection) + timedelta(seconds=seconds) if seconds else None
            connection.execute(
                sa.update(outbox)
                .where(outbox.c.draft_id.in_(ids), outbox.c.leased_by == self._name)
                .values(leased_until=until, error=error)
            )
