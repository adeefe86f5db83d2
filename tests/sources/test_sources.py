"""What arrives, and when it was: lines and Pub/Sub messages to chats and events."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.utils.timestamp import Timestamp
from conftest import as_line, chat, run_stage
from hypothesis import given
from hypothesis import strategies as st

from chatflow.errors import BadInputError, UsageError
from chatflow.records import Arrival, Chat, Event, Message
from chatflow.sources.parse import ParseArrivals, parse_arrival
from chatflow.sources.read import check_input, is_stream, split_inputs, to_arrival

DAY = timedelta(hours=24)
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MESSAGE = {"chat_id": "7", "user_id": "c", "text": "hi"}


def arrival(value, published=None, **attributes):
    return Arrival(as_line(value), attributes, "pubsub-1" if published else None, published)


def parse(value, published=None, **attributes):
    (found,) = parse_arrival(arrival(value, published, **attributes), DAY)
    return found


def test_chats_messages_and_ends_are_told_apart():
    assert isinstance(parse(chat("hi")), Chat)
    assert parse(MESSAGE) == Event(chat_id="7", message=Message(user_id="c", text="hi"))
    assert parse({**MESSAGE, "event": "message"}).message.text == "hi"
    assert parse({"chat_id": 7, "event": "closed"}) == Event(chat_id="7")


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        ({"chat_id": "7"}, "wrong_shape", "neither text nor messages nor an event"),
        ({"chat_id": "7", "text": "x"}, "wrong_shape", "user_id: it is missing"),
        ({"user_id": "c", "text": "x"}, "wrong_shape", "chat_id"),
        ({**MESSAGE, "chat_id": ""}, "wrong_shape", "chat_id"),
        ({**MESSAGE, "text": ["x"]}, "wrong_shape", "text: a string is needed, found a list"),
        ({"chat_id": "7", "event": "exploded"}, "unknown_event", "known are message and closed"),
        ({"event": "closed"}, "wrong_shape", "chat_id"),
        ("nonsense", "not_json", "not JSON"),
    ],
)
def test_a_malformed_event_says_what_is_wrong(value, reason, says):
    with pytest.raises(BadInputError) as caught:
        parse(value)
    assert caught.value.reason == reason
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("sent", "published", "at"),
    [
        (NOW - timedelta(minutes=5), NOW, NOW - timedelta(minutes=5)),  # on its way for a while
        (NOW + timedelta(milliseconds=200), NOW, NOW + timedelta(milliseconds=200)),
        (None, NOW, NOW),
        (NOW + timedelta(days=3), NOW, NOW),  # nothing is sent after it was published
        (NOW - timedelta(days=3), NOW, NOW),  # longer ago than chats are kept
        (datetime(1, 1, 1, tzinfo=UTC), NOW, NOW),
        (datetime(9999, 12, 31, tzinfo=UTC), NOW, NOW),
        (NOW - timedelta(days=3000), None, NOW - timedelta(days=3000)),  # in files, as it is
        (None, None, None),
    ],
)
def test_event_time(sent, published, at):
    value = {**MESSAGE, "sent_at": sent and sent.isoformat()}
    event = parse({k: v for k, v in value.items() if v}, published)
    assert event.at == event.message.sent_at == at


def test_times_without_a_zone_are_utc():
    event = parse({**MESSAGE, "sent_at": "2026-03-01T11:00:00"}, NOW)
    assert event.at == NOW - timedelta(hours=1)


def test_the_services_message_id_stands_in_for_one_of_the_message():
    assert parse(MESSAGE, NOW).message.message_id == "pubsub-1"
    assert parse({**MESSAGE, "message_id": "own"}, NOW).message.message_id == "own"


def test_attributes_stand_in_for_fields_and_the_others_are_kept():
    event = parse({"text": "hi", "attributes": {"tenant": "own"}}, NOW, chat_id="7", user_id="c",
                  tenant="a", language="en")  # fmt: skip
    assert (event.chat_id, event.message.user_id) == ("7", "c")
    assert event.message.attributes == {"tenant": "own", "language": "en"}
    assert parse({**MESSAGE, "chat_id": "line"}, NOW, chat_id="attribute").chat_id == "line"
    read = parse(chat("hi", chat_id="8"), NOW, tenant="a")
    assert (read.chat_id, read.attributes) == ("8", {"tenant": "a"})


def test_a_pubsub_message_as_an_arrival():
    message = PubsubMessage(b"x", {"tenant": "a", "googclient_x": "y"}, "12", NOW)
    found = to_arrival(message, Timestamp(0))
    assert found == Arrival(b"x", {"tenant": "a"}, "12-20260301T120000.000000", NOW)
    bare = to_arrival(PubsubMessage(b"x", None), Timestamp(5))
    assert bare == Arrival(b"x", {}, None, datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC))


def test_a_dead_letter_keeps_the_attributes_for_a_replay():
    found = run_stage(
        ParseArrivals(1000), [arrival({"text": {}}, NOW, chat_id="7")], ["dead_letters"]
    )
    (letter,) = found["dead_letters"]
    assert (letter.attributes, letter.payload) == ({"chat_id": "7"}, '{"text": {}}')


def test_messages_without_text_are_left_out():
    found = run_stage(
        ParseArrivals(1000), [arrival({**MESSAGE, "text": " "})], ["events", "dead_letters"]
    )
    assert found == {"events": [], "dead_letters": []}


@given(st.binary(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_any_bytes_are_a_chat_an_event_or_a_clear_error(line, attributes):
    try:
        found = parse_arrival(Arrival(line, attributes), DAY)
    except BadInputError as error:
        found = error.reason
    assert found


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.builds(Message, user_id=texts, text=texts, message_id=texts), texts)
def test_an_event_survives_its_json(message, chat_id):
    event = Event(chat_id=chat_id, message=message)
    (read,) = parse_arrival(Arrival(event.to_line().encode()), DAY)
    assert read.message.original or read == event
    assert parse_arrival(Arrival(read.to_line().encode()), DAY) == [read]


# --input.


def test_inputs_are_divided_by_commas():
    assert split_inputs("a.jsonl, b/*.jsonl") == ("a.jsonl", "b/*.jsonl")
    assert not is_stream("a.jsonl")
    assert is_stream("projects/my-project/topics/a,projects/my-project/subscriptions/b")
    assert check_input("projects/my-project/subscriptions/b") == []


def test_several_inputs_are_all_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(MESSAGE))
    assert len(check_input(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")) == 2
    with pytest.raises(UsageError, match=r"no file matches '/none\.jsonl'"):
        check_input(f"{tmp_path}/a.jsonl,/none.jsonl")
