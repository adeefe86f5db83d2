import json
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatflow.errors import BadInputError
from chatflow.records import (
    Analysis,
    Chat,
    DeadLetter,
    Identity,
    Message,
    Sentiment,
    load_object,
    parse_record,
    read_chat,
)


def line(**fields):
    chat = {"chat_id": "7", "messages": [{"user_id": "1", "text": "hi"}], **fields}
    return json.dumps(chat).encode()


@pytest.mark.parametrize(
    ("raw", "reason", "says"),
    [
        (b"not json", "not_json", "not JSON"),
        (b'{"chat_id": "7"', "not_json", "not JSON"),
        (b'{"a": NaN}', "not_json", "not JSON"),
        (b'{"a": "\\ud800"}', "not_json", "not JSON"),
        (b"[" * 100_000, "not_json", "not JSON"),
        (b'{"chat_id": "\xff"}', "not_utf8", "not UTF-8"),
        (b'[{"chat_id": "7"}]', "not_an_object", "list"),
        (b"7", "not_an_object", "int"),
        (line(messages=[]), "no_messages", "chat 7"),
        (line(messages="hi"), "wrong_shape", "messages: "),
        (line(messages=[{"user_id": "1"}]), "wrong_shape", "messages.0.text"),
        (line(messages=[{"user_id": "1", "text": 5}]), "wrong_shape", "messages.0.text"),
        (line(messages=[{"user_id": "1", "text": "x", "role": "boss"}]), "wrong_shape", "role"),
        (line(messages=[{"user_id": True, "text": "x"}]), "wrong_shape", "user_id"),
        (line(messages=[{"user_id": "1", "text": "x", "sent_at": "soon"}]), "wrong_shape", "sent_"),
        (line(chat_id=""), "wrong_shape", "chat_id"),
        (line(chat_id=None), "wrong_shape", "chat_id"),
        (line(revision=-1), "wrong_shape", "revision"),
        (line(revision=2**63), "wrong_shape", "revision"),
        (line(attributes={"tenant": 5}), "wrong_shape", "attributes.tenant"),
        (line(messages=[{"user_id": "1", "text": " \n"}]), "no_text", "chat 7"),
        (line(user_id="2"), "no_customer", "user 2"),
        (line(messages=[{"user_id": "1", "text": "x", "role": "bot"}]), "no_customer", "customer"),
    ],
)  # fmt: skip
def test_a_bad_line_says_what_is_wrong(raw, reason, says):
    with pytest.raises(BadInputError) as caught:
        read_chat(load_object(raw))
    assert caught.value.reason == reason
    assert says in str(caught.value)


def test_many_problems_are_counted_not_listed():
    with pytest.raises(BadInputError, match="and 15 more"):
        read_chat(load_object(line(messages=[{"user_id": "1"}] * 20)))


def test_integer_ids_become_strings_and_unknown_fields_are_ignored():
    raw = line(chat_id=4116, messages=[{"user_id": 221, "text": "hi", "mood": 1}], flow="x")
    chat = read_chat(load_object(raw)).chat
    assert (chat.chat_id, chat.messages[0].user_id) == ("4116", "221")


def test_a_byte_order_mark_and_a_carriage_return_are_taken():
    assert read_chat(load_object(b"\xef\xbb\xbf" + line() + b"\r")).chat.chat_id == "7"


def test_empty_messages_and_repeated_message_ids_are_left_out_and_counted():
    messages = [
        {"user_id": "1", "text": "one", "message_id": 1},
        {"user_id": "1", "text": "   ", "message_id": 2},
        {"user_id": "1", "text": "one again", "message_id": "1"},
        {"user_id": "1", "text": "no id"},
        {"user_id": "1", "text": "no id"},
    ]
    reading = read_chat(load_object(line(messages=messages)))
    assert [m.text for m in reading.chat.messages] == ["one", "no id", "no id"]
    assert (reading.empty_messages, reading.duplicate_messages) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "users"),
    [
        ({"user_id": "b"}, ("b",)),
        ({"roles": ("customer", "agent", "customer")}, ("a", "c")),
        ({"roles": (None, "customer", None)}, ("b",)),
        ({}, ("a",)),
    ],
)
def test_whose_tone_is_asked_for(fields, users):
    roles = fields.pop("roles", (None, None, None))
    messages = tuple(
        Message(user_id=user, text="x", role=role) for user, role in zip("abc", roles, strict=True)
    )
    assert Chat(chat_id="1", messages=messages, **fields).users() == users


def test_times_are_written_in_utc():
    zone = timezone(timedelta(hours=2))
    message = Message(user_id="1", text="x", sent_at=datetime(2026, 3, 2, 9, 15, tzinfo=zone))
    assert json.loads(message.to_json())["sent_at"] == "2026-03-02T07:15:00Z"


def test_ids_are_the_same_for_the_same_input_and_differ_for_any_other():
    one = Identity("7", "1", 0, "v1", "m")
    assert one.digest() == Identity("7", "1", 0, "v1", "m").digest()
    assert len(one.digest()) == 32
    others = [one._replace(**{field: "other"}) for field in one._fields]
    assert len({identity.digest() for identity in [one, *others]}) == 6


def test_a_summary_is_never_longer_than_512_characters_and_never_empty():
    fields = {
        "analysis_id": "x", "chat_id": "7", "user_id": "1", "revision": 0, "sentiment": 0,
        "model": "m", "prompt_version": "v", "analysed_at": "2026-03-02T07:15:00Z",
    }  # fmt: skip
    assert Analysis(summary="x" * 512, **fields).sentiment is Sentiment.NEUTRAL
    for bad in ("x" * 513, ""):
        with pytest.raises(ValueError, match="summary"):
            Analysis(summary=bad, **fields)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    st.builds(
        Chat,
        chat_id=texts,
        messages=st.lists(st.builds(Message, user_id=texts, text=texts), min_size=1).map(tuple),
        attributes=st.dictionaries(texts, texts),
    )
)
def test_a_chat_survives_its_json(chat):
    assert read_chat(load_object(chat.to_json().encode())).chat == chat


@given(st.binary())
def test_any_bytes_are_a_chat_or_a_clear_error(raw):
    try:
        found = read_chat(load_object(raw)).chat.chat_id
    except BadInputError as error:
        found = error.reason
    assert found


def test_a_dead_letter_gives_its_payload_back_as_it_came():
    letter = {"stage": "read", "reason": "x", "error": "x", "failed_at": "2026-03-02T07:15:00Z"}
    raw = json.dumps({**letter, "payload": "/w==", "payload_encoding": "base64"}).encode()
    assert parse_record(DeadLetter, raw).payload_bytes() == b"\xff"
