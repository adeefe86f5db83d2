"""Where records go: files that appear whole and once, messages that can be filtered."""

import base64
import gzip
import os
import random

import pytest
from conftest import ANALYSIS, DRAFT, read

from chatflow.errors import UsageError
from chatflow.records import Analysis, DeadLetter, now, parse_record
from chatflow.sinks.files import AppendFiles, _AppendDoFn, result_files
from chatflow.sinks.pubsub import to_message
from chatflow.sinks.write import SCHEMES, by_sink, shown, split_destinations


def letter(payload, **fields):
    return DeadLetter(
        stage="read", reason="not_json", error="x", payload=payload, failed_at=now(), **fields
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
    sent = parse_record(DeadLetter, to_message(letter(payload))["data"])
    assert sent.payload_encoding == "gzip"
    assert sent.payload_bytes() == payload.encode()
    assert gzip.decompress(base64.b64decode(sent.payload)) == payload.encode()


def test_a_letter_that_stays_too_large_says_that_it_was_cut():
    noise = base64.b64encode(random.Random(1).randbytes(12_000_000)).decode()
    message = to_message(letter(noise))
    assert len(message["data"]) < 10_000_000
    assert "was cut" in parse_record(DeadLetter, message["data"]).error


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
        ("", "--output is missing, and --drafts"),
        ("redis://x", "nothing writes to 'redis://x'"),
        ("projects/p/topics/", "is no topic"),
        ("projects/p/subscriptions/s", "is no topic"),
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
