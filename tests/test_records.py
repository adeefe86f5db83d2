import json
from datetime import datetime, timedelta, timezone

import pytest

from chatflow.errors import BadInputError
from chatflow.records import (
    Analysis,
    Chat,
    DeadLetter,
    Identity,
    Message,
    Sentiment,
    parse_record,
    validate,
)


def test_many_problems_are_counted_not_listed():
    with pytest.raises(BadInputError, match="and 19 more"):
        validate(Chat, {"messages": [{"user_id": "1", "text": 5}, {}] * 7 + [{}]})


@pytest.mark.parametrize(
    ("fields", "users"),
    [
        ({"user_id": "b"}, ("b",)),
        ({"roles": ("customer", "agent", "customer")}, ("a", "c")),
        ({"roles": (None, "customer", None)}, ("b",)),
        ({}, ("a",)),
        ({"roles": ("system", None, None)}, ("b",)),
        ({"roles": ("system", "wizard", "customer")}, ("c",)),
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
    one = Identity("7", "1", 0, "c", "v1", "m")
    assert one.digest() == Identity("7", "1", 0, "c", "v1", "m").digest()
    assert len(one.digest()) == 32
    others = [one._replace(**{field: "other"}) for field in one._fields]
    assert len({identity.digest() for identity in [one, *others]}) == 7


def test_a_summary_is_never_longer_than_512_characters_and_never_empty():
    fields = {
        "analysis_id": "x", "chat_id": "7", "user_id": "1", "revision": 0, "sentiment": 0,
        "model": "m", "prompt_version": "v", "analysed_at": "2026-03-02T07:15:00Z",
    }  # fmt: skip
    assert Analysis(summary="x" * 512, **fields).sentiment is Sentiment.NEUTRAL
    for bad in ("x" * 513, ""):
        with pytest.raises(ValueError, match="summary"):
            Analysis(summary=bad, **fields)


def test_a_dead_letter_gives_its_payload_back_as_it_came():
    letter = {"stage": "read", "reason": "x", "error": "x", "failed_at": "2026-03-02T07:15:00Z"}
    raw = json.dumps({**letter, "payload": "/w==", "payload_encoding": "base64"}).encode()
    assert parse_record(DeadLetter, raw).payload_bytes() == b"\xff"
