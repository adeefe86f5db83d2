"""Dead letters: what fails is kept whole, in parts where it is too large."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow import dead_letters
from chatflow.dead_letters import dead_letter, fitted, join
from chatflow.errors import BadInputError, ElementError
from chatflow.records import Arrival, DeadLetter, now, parse_record, record_id

TEXTS = st.text(st.characters(codec="utf-8"))
LETTERS = st.builds(
    DeadLetter,
    stage=st.just("read"),
    reason=st.just("x"),
    error=TEXTS,
    payload=TEXTS | st.binary(max_size=3000).map(lambda noise: noise.hex()),
    attributes=st.none() | st.dictionaries(TEXTS, TEXTS),
    chat_id=st.none() | TEXTS | TEXTS.map(lambda text: text * 1000),
    answer=st.none() | TEXTS,
    failed_at=st.just(now()),
)
LIMIT = 500
"""Bytes; the parts are made by another one."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(dead_letters, "PART_BYTES", 50)


@settings(suppress_health_check=[], deadline=None)
@given(whole=LETTERS, order=st.randoms(use_true_random=False))
def test_any_letter_is_whole_after_it_was_in_parts(whole, order):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dead_letters, "PART_BYTES", 50)
        made = fitted(whole, LIMIT)
        again = fitted(whole.model_copy(update={"failed_at": now()}), LIMIT)
    sent = [parse_record(DeadLetter, letter.to_json().encode()) for letter in made]
    if sent[0].part is None:
        (one,) = sent
        assert one.payload_bytes() == whole.payload_bytes()
        assert one.model_copy(update={"payload": "", "payload_encoding": "utf-8"}) == (
            whole.model_copy(update={"payload": ""})
        )
        return
    assert [(letter.part, letter.parts) for letter in sent] == [
        (number, len(sent)) for number in range(1, len(sent) + 1)
    ]
    assert len({record_id(letter) for letter in sent}) == len(sent)
    assert [record_id(letter) for letter in again] == [record_id(letter) for letter in sent]
    order.shuffle(sent)
    assert join(sent) == whole


NOISE = random.Random(1).randbytes(2000).hex()


@pytest.mark.parametrize("fault", ["one is missing", "one is twice", "one is of another letter"])
def test_parts_of_which_one_is_wrong_are_refused(small, fault):
    first, second, *others = fitted(letter(NOISE), LIMIT)
    stranger = fitted(letter(NOISE[::-1]), LIMIT)[1]
    parts = {
        "one is missing": [first, *others],
        "one is twice": [first, second, second, *others],
        "one is of another letter": [first, stranger, *others],
    }
    with pytest.raises(BadInputError, match="not those of one letter"):
        join(parts[fault])


def letter(payload):
    return DeadLetter(stage="read", reason="x", error="x", payload=payload, failed_at=now())


@pytest.mark.parametrize(
    "fields", [{"part": 1}, {"part": 1, "parts": 2}, {"part": 0, "parts": 2, "whole_id": "x"}]
)
def test_a_part_says_of_what(fields):
    value = letter("x").model_copy(update=fields).to_json().encode()
    with pytest.raises(BadInputError) as refused:
        parse_record(DeadLetter, value)
    assert refused.value.reason == "wrong_shape"


@pytest.mark.parametrize(
    ("payload", "encoding"),
    [("%", "base64"), ("a", "base64"), ("%", "gzip"), ("aGk=", "gzip"), ("H4sIAAAA", "gzip")],
    ids=str,
)
def test_a_payload_that_cannot_be_read_is_said(payload, encoding):
    broken = letter(payload).model_copy(update={"payload_encoding": encoding})
    with pytest.raises(BadInputError) as refused:
        broken.payload_bytes()
    assert refused.value.reason == "bad_payload"


ELEMENTS = {
    "half an emoji": b'{"chat_id": "7", "text": "\\ud83d"}',
    "a deep list": b'{"chat_id": ' + b"[" * 100_000,
    "a long number": b'{"chat_id": ' + b"1" * 10_000 + b"}",
    "an infinite number": b'{"chat_id": 1e999}',
    "not UTF-8": b'{"chat_id": "\xff"}',
    "NUL": b'{"chat_id": "\0"}',
    "nothing": b"",
}


@pytest.mark.parametrize("line", ELEMENTS.values(), ids=ELEMENTS)
def test_any_line_and_any_error_make_a_letter(line):
    error = ElementError("bad", "half an emoji: \ud83d", "\ud83d\0")
    made = dead_letter("read", Arrival(line, {"tenant": "a"}), error)
    sent = parse_record(DeadLetter, made.to_json().encode())
    assert sent.payload_bytes() == line
    assert (sent.error, sent.answer) == ("half an emoji: \\ud83d", "\\ud83d\0")


@pytest.mark.parametrize("element", [len, 7, None, "\ud83d", {"a": b"\xff"}], ids=ascii)
def test_an_element_of_an_unknown_type_makes_a_letter(element):
    made = dead_letter("read", element, ValueError("x"))
    assert (made.reason, made.to_json()[:16]) == ("internal_ValueError", '{"stage":"read",')
    assert made.payload.replace("\\\\", "\\") == repr(element).replace("\\\\", "\\")
