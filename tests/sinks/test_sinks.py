"""Where records go: files that appear whole and once, messages that can be filtered."""

import base64
import functools
import gzip
import os
import random
from concurrent.futures import Future

import pytest
from apache_beam.utils.timestamp import Timestamp
from conftest import ANALYSIS, DRAFT, read
from google.api_core.exceptions import InvalidArgument
from google.pubsub_v1.types import PubsubMessage
from hypothesis import given
from hypothesis import strategies as st

from chatflow import network
from chatflow.dead_letters import join
from chatflow.errors import ElementError, UsageError
from chatflow.records import Analysis, DeadLetter, Response, now, parse_record, record_id
from chatflow.sinks.files import AppendFiles, _AppendDoFn, result_files
from chatflow.sinks.pubsub import _PublishDoFn, to_message, to_messages
from chatflow.sinks.write import SCHEMES, by_sink, shown, split_destinations


def letter(payload, **fields):
    return DeadLetter(
        stage="read", reason="not_json", error="x", payload=payload, failed_at=now(), **fields
    )


RESPONSE = Response(
    response_id="r1", text="x", response="y", model="m", prompt_version="v", responded_at=now()
)


# Files of a stream.


def lines(*records):
    return [record.to_json() + "\n" for record in records]


def test_a_file_that_is_written_again_takes_the_place_of_the_first(tmp_path):
    other = ANALYSIS.model_copy(update={"analysis_id": "a2"})
    sink = AppendFiles(f"{tmp_path}/analyses")
    one = sink.write("", lines(ANALYSIS, other))
    again = sink.write("", lines(other, ANALYSIS))  # a bundle is done again, in another order
    assert one == again == f"{tmp_path}/analyses-20260301T100000Z-{one[-18:-6]}.jsonl"
    assert sorted(a["analysis_id"] for a in read(tmp_path, "analyses")) == ["a1", "a2"]
    assert len(os.listdir(tmp_path)) == 1
    assert result_files(f"{tmp_path}/analyses") == [one]


def appended(do, *records):
    do.start_bundle()
    for record in records:
        do.process(record)
    do.finish_bundle()


def test_a_file_gets_its_name_when_it_is_full_old_or_at_the_end(tmp_path):
    do = _AppendDoFn(f"{tmp_path}/analyses", seconds=600, records=2)
    do.setup()
    appended(do, ANALYSIS)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    appended(do)
    appended(do, ANALYSIS)  # full
    assert len(result_files(f"{tmp_path}/analyses")) == 1
    assert [a["analysis_id"] for a in read(tmp_path, "analyses")] == ["a1", "a1"]
    appended(do, ANALYSIS)
    do.complete(do.file)  # as the timer does
    appended(do, ANALYSIS.model_copy(update={"analysis_id": "a2"}))
    do.teardown()
    assert len(result_files(f"{tmp_path}/analyses")) == 3 == len(os.listdir(tmp_path))
    do.teardown()


# Messages.


def test_a_message_has_what_readers_filter_by():
    message = to_message(ANALYSIS)
    assert parse_record(Analysis, message.pop("data")) == ANALYSIS
    assert message == {
        "kind": "Analysis", "id": "a1", "chat_id": "7", "user_id": "c", "revision": "3",
        "sentiment": "-1", "ordering_key": "7",
    }  # fmt: skip
    assert to_message(DRAFT)["id"] == "d1"
    assert "flag" not in to_message(DRAFT)
    flagged = DRAFT.model_copy(update={"text": None, "flag": "ungrounded"})
    assert to_message(flagged)["flag"] == "ungrounded"


def test_the_same_dead_letter_has_the_same_id():
    one, again = letter("x"), letter("x", chat_id="7")
    assert to_message(one)["id"] == to_message(again)["id"] != to_message(letter("y"))["id"]


def test_ids_that_are_too_long_for_an_attribute():
    message = to_message(ANALYSIS.model_copy(update={"chat_id": "ü" * 1000}))
    assert "chat_id" not in message
    assert len(message["ordering_key"]) == 32


def test_a_letter_that_is_too_large_for_pubsub_is_compressed():
    payload = "late again " * 1_000_000
    (message,) = to_messages(letter(payload))
    assert message["id"] == record_id(letter(payload))
    sent = parse_record(DeadLetter, message["data"])
    assert sent.payload_encoding == "gzip"
    assert sent.payload_bytes() == payload.encode()
    assert gzip.decompress(base64.b64decode(sent.payload)) == payload.encode()


def test_a_letter_that_stays_too_large_is_sent_whole_in_parts():
    noise = base64.b64encode(random.Random(1).randbytes(12_000_000)).decode()
    whole = letter(noise, answer="rubbish", attributes={"tenant": "a"}, chat_id="7")
    messages = to_messages(whole)
    assert max(len(message["data"]) for message in messages) < 10_000_000
    parts = [parse_record(DeadLetter, message["data"]) for message in messages]
    assert [(part.part, part.parts) for part in parts] == [(1, 3), (2, 3), (3, 3)]
    assert join(parts[::-1]) == whole
    assert len({message["id"] for message in messages}) == 3
    assert {(message["ordering_key"], message["reason"]) for message in messages} == {
        ("7", "not_json")
    }


def test_another_record_that_is_too_large_is_a_dead_letter_and_fails_no_other(pubsub):
    large = RESPONSE.model_copy(update={"response_id": "large", "response": "x" * 10_000_000})
    ((stage, reason, payload),) = written(
        pubsub.publisher, RESPONSE, large, RESPONSE, topic=pubsub.topic("events")
    )
    assert (stage, reason) == ("write", "too_large")
    assert parse_record(Response, payload.encode()) == large
    assert len(pulled(pubsub)) == 2


def test_a_record_that_is_not_unicode_is_a_dead_letter_and_fails_no_other(pubsub):
    broken = RESPONSE.model_copy(update={"response": "half an emoji: \ud83d"})
    ((stage, reason, payload),) = written(
        pubsub.publisher, broken, RESPONSE, topic=pubsub.topic("events")
    )
    assert (stage, reason) == ("write", "internal_PydanticSerializationError")
    assert "half an emoji: \\ud83d" in payload
    assert len(pulled(pubsub)) == 1


def test_what_pubsub_refuses_is_a_dead_letter_and_fails_no_other(monkeypatch):
    """Messages that were in one request with it are sent again without it."""
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.01)
    others = [RESPONSE.model_copy(update={"response_id": f"{n}"}) for n in range(3)]
    topic = Refusing("bad")
    bad = RESPONSE.model_copy(update={"response_id": "bad"})
    ((stage, reason, payload),) = written(topic, others[0], bad, *others[1:])
    assert (stage, reason) == ("write", "pubsub_refused")
    assert parse_record(Response, payload.encode()) == bad
    assert topic.taken == ["0", "1", "2"]
    with pytest.raises(ElementError, match="the request is bad"):
        written(Refusing("all"), letter("x"))


class Refusing:
    """A client of a topic that refuses the request with a certain record, or each."""

    def __init__(self, refused):
        self.refused, self.taken = refused, []
        self.batch = []

    def publish(self, topic, **message):
        future = Future()
        self.batch.append((message["id"], future))
        future.result = functools.partial(self.result, future)
        return future

    def result(self, future, timeout):
        if self.batch:  # one request for all that waits
            batch, self.batch = self.batch, []
            ids = [key for key, _ in batch]
            for _, waiting in batch:
                if self.refused in (*ids, "all"):
                    waiting.set_exception(InvalidArgument("the request is bad"))
                else:
                    waiting.set_result("")
            if self.refused not in (*ids, "all"):
                self.taken += ids
        return Future.result(future, timeout)

    def resume_publish(self, topic, key):
        pass


def written(client, *records, topic="projects/p/topics/t"):
    """Publishes records as a runner would, in one bundle; returns what became a dead letter."""
    fn = _PublishDoFn(topic)
    fn.publisher = client
    fn.start_bundle()
    letters = [one for record in records for one in fn.process(record, Timestamp(0), "window")]
    letters += [found.value for found in fn.finish_bundle()]
    return [(one.stage, one.reason, one.payload) for one in letters]


def pulled(pubsub):
    subscription = pubsub.subscription("events")
    found = pubsub.subscriber.pull(subscription=subscription, max_messages=10, timeout=30)
    return found.received_messages


TEXTS = st.text(st.characters(codec="utf-8"), max_size=2000)


@given(chat_id=TEXTS, user_id=TEXTS)
def test_any_ids_make_a_message_that_pubsub_takes(chat_id, user_id):
    """Limits: https://cloud.google.com/pubsub/quotas#resource_limits."""
    record = ANALYSIS.model_copy(update={"chat_id": chat_id * 50, "user_id": user_id})
    (message,) = to_messages(record)
    assert parse_record(Analysis, message["data"]) == record
    own = {name: message.pop(name) for name in ("data", "ordering_key")}
    sent = PubsubMessage(**own, attributes=message)
    assert len(sent.ordering_key.encode()) <= 1024
    assert len(sent.attributes) <= 100
    for name, value in sent.attributes.items():
        assert len(name.encode()) <= 256
        assert len(value.encode()) <= 1024


# --output, --analyses, --drafts, --dead_letters.


def test_a_kinds_own_flag_comes_before_the_output_folder():
    topic = "projects/my-project/topics/a"
    assert split_destinations("analyses", "", "out") == ("out/analyses",)
    assert split_destinations("analyses", topic, "out") == (topic,)
    assert split_destinations("analyses", f"{topic}, x/y", "") == (topic, "x/y")


def test_what_is_secret_in_a_destination_is_not_shown():
    given = "--drafts=postgresql+psycopg://me:pa:ss@h/n,https://h/p?token=x,sqlite:////a/b,gs://b/c"
    told = "--drafts=postgresql+psycopg://me:***@h/n,https://h/p?…,sqlite:////a/b,gs://b/c"
    assert shown(given) == told


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ("", "--output is missing, and so is --drafts"),
        ("redis://x", "nothing writes to 'redis://x'"),
        ("projects/p/topics/", "is not a topic"),
        ("projects/p/subscriptions/s", "is not a topic"),
    ],
)
def test_a_wrong_destination_is_a_clear_error(own, says):
    with pytest.raises(UsageError, match=says):
        split_destinations("drafts", own, "")


def test_destinations_are_sorted_by_what_writes_to_them():
    topic, other, table = "projects/p/topics/a", "pubsub://projects/p/topics/b", "bigquery://p.d.t"
    given = {"analyses": [table, topic], "drafts": ["out/drafts", topic], "dead_letters": [other]}
    assert list(by_sink(given).items()) == [
        (SCHEMES[0], {topic: ["analyses", "drafts"], other: ["dead_letters"]}),
        (SCHEMES[1], {table: ["analyses"]}),
        (SCHEMES[-1], {"out/drafts": ["drafts"]}),
    ]
