"""Publishes records to Pub/Sub topics."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import apache_beam as beam
from apache_beam.utils.windowed_value import WindowedValue

from chatflow.dead_letters import check_size, fitted, refused
from chatflow.errors import ElementError, UsageError, one_line
from chatflow.network import attempts, pubsub_client
from chatflow.options import SinkSettings
from chatflow.records import Analysis, DeadLetter, Record, digest, record_id
from chatflow.sinks.google import check_each
from chatflow.sinks.sink import Sink, Uris

if TYPE_CHECKING:
    import tenacity

PUBSUB_TOPIC = re.compile(r"(?:pubsub://)?(projects/[^/]+/topics/[^/]+)")

PUBSUB_BYTES = 9_500_000
"""The most bytes of data in a message; Pub/Sub accepts messages of 10 MB."""

PUBLISH_SECONDS = 600.0
"""How long to retry publishing before the bundle fails and the runner retries it."""


@beam.typehints.with_input_types(Record)
@dataclasses.dataclass
class PublishRecords(beam.PTransform):
    """Publishes records to a Pub/Sub topic, ordered by chat (the ordering key is the chat's id).

    Delivery is at least once: a repeated bundle is published again, with the same `id` attributes,
    so that readers can drop duplicates. A message has the attributes `kind`, `id`, `chat_id`,
    `user_id`, `revision`, `sentiment`, `flag`, `stage` and `reason`, as far as its record has them.

    A dead letter that is too large for a message is compressed or becomes several messages. Any
    other record that is too large, or that Pub/Sub refuses, becomes a dead letter.

    Beam's own WriteToPubSub has no ordering keys on Dataflow, and gives up at the first error that
    Google's client does not retry, e.g. if the topic does not exist yet.
    """

    topic: str

    def expand(self, records: beam.PCollection[Record]) -> beam.PCollection[DeadLetter]:
        publish = beam.ParDo(_PublishDoFn(self.topic))
        return records | "Publish" >> publish.with_output_types(DeadLetter)


class _PublishDoFn(beam.DoFn):
    def __init__(self, topic: str):
        self.topic = topic

    def setup(self) -> None:
        self.publisher = publisher()

    def start_bundle(self) -> None:
        self.waiting: list[tuple[WindowedValue, dict[str, Any], Any]] = []

    def process(
        self,
        record: Record,
        at: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[DeadLetter]:
        try:
            messages = to_messages(record)
        except Exception as error:  # any error concerns only this record
            yield refused(record, error)
            return
        found = WindowedValue(record, at, [window])
        for message in messages:
            self.waiting.append((found, message, self.publisher.publish(self.topic, **message)))

    def teardown(self) -> None:
        self.publisher.stop()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        from google.api_core.exceptions import InvalidArgument

        give_up = time.monotonic() + PUBLISH_SECONDS
        for found, message, future in self.waiting:
            try:
                wait_published(self.publisher, self.topic, message, future, give_up)
            except InvalidArgument as error:
                said = ElementError("pubsub_refused", one_line(error))
                yield found.with_value(refused(found.value, said))


def publisher() -> Any:
    import google.cloud.pubsub_v1 as pubsub_v1

    ordered = pubsub_v1.types.PublisherOptions(enable_message_ordering=True)
    return pubsub_client("PublisherClient", publisher_options=ordered)


def wait_published(
    publisher: Any, topic: str, message: dict[str, Any], future: Any, give_up: float
) -> None:
    """Waits until a message is published; retries until `give_up`, a time of `time.monotonic`.

    After that, it raises the client's last error. A message that Pub/Sub refuses raises
    `InvalidArgument` only at the second try, in which it is alone; the first time, another message
    of its batch may be the cause.
    """
    from google.api_core.exceptions import InvalidArgument

    def may_pass(state: tenacity.RetryCallState) -> bool:
        error = state.outcome and state.outcome.exception()
        alone = state.attempt_number > 1
        return error is not None and not (alone and isinstance(error, InvalidArgument))

    for attempt in attempts(f"publishing to {topic}", give_up - time.monotonic(), may_pass):
        if attempt.retry_state.attempt_number > 1:
            if key := message.get("ordering_key"):
                publisher.resume_publish(topic, key)
            future = publisher.publish(topic, **message)
        with attempt:
            future.result(timeout=max(give_up - time.monotonic(), 1))


def to_messages(record: Record) -> list[dict[str, Any]]:
    """Returns a record as a message, or a dead letter as several if it is too large for one.

    Raises `ElementError`: `too_large`, for any other record.
    """
    if isinstance(record, DeadLetter):
        letters = fitted(record, PUBSUB_BYTES)
        if len(letters) == 1:  # may be compressed, but keeps the id of the original letter
            return [{**to_message(letters[0]), "id": record_id(record)}]
        return list(map(to_message, letters))
    message = to_message(record)
    check_size(record, len(message["data"]), PUBSUB_BYTES)
    return [message]


def to_message(record: Record) -> dict[str, Any]:
    """Returns a record's data, ordering key and attributes."""
    data = record.to_json().encode()
    fields = {
        "kind": type(record).__name__,
        "id": record_id(record),
        **{name: getattr(record, name, None) for name in _ATTRIBUTES},
    }
    attributes = {name: str(value) for name, value in fields.items() if value is not None}
    if isinstance(record, Analysis):
        attributes["sentiment"] = str(int(record.sentiment))
    short = {k: v for k, v in attributes.items() if len(v.encode()) <= _ATTRIBUTE_BYTES}
    return {"data": data, "ordering_key": ordering_key(attributes.get("chat_id", "")), **short}


def ordering_key(chat_id: str) -> str:
    """Returns the chat's id, or its hash if the id is too long for Pub/Sub."""
    return chat_id if len(chat_id.encode()) <= _ATTRIBUTE_BYTES else digest(chat_id)


_ATTRIBUTES = ("chat_id", "user_id", "revision", "flag", "stage", "reason")
_ATTRIBUTE_BYTES = 1024  # Pub/Sub's limit for a value, and for an ordering key


def check_topics(destinations: Iterable[str], local: bool = True) -> None:
    """Checks that the topics exist, as `sinks.google.check_each` does; raises `UsageError`."""

    def ask(topic: str) -> None:
        with publisher() as client:
            client.get_topic(topic=topic, timeout=10, retry=None)

    topics = [found[1] for uri in destinations if (found := PUBSUB_TOPIC.fullmatch(uri))]
    check_each(topics, ask, "published to", local)


class PubSub(Sink):
    example = "projects/PROJECT/topics/NAME"
    pattern = re.compile(r"pubsub:|projects/[^/]+/(topics|subscriptions)\b")

    def check_uri(self, uri: str) -> None:
        if not PUBSUB_TOPIC.fullmatch(uri):
            raise UsageError(f"{uri!r} is not a topic; write {self.example}")

    def check(self, uris: Uris, settings: SinkSettings, local: bool, share_files: bool) -> None:
        check_topics(uris, local)

    def write(self, uri: str, settings: SinkSettings) -> beam.PTransform:
        return PublishRecords(uri.removeprefix("pubsub://"))
