"""Sentences: where a message is cut, who speaks, and that nothing of it is lost."""

import itertools

import numpy as np
import pytest
from conftest import chat
from hypothesis import given
from hypothesis import strategies as st

from chatflow.choices.sentences import FEATURES, features, sentences_of, spans
from chatflow.records import Chat, Message


def cut(text):
    return [text[start:end] for start, end in spans(text)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is late. It is broken!", ["It is late.", "It is broken!"]),
        ("hello? is anyone there. i need help", ["hello?", "is anyone there.", "i need help"]),
        ("Part no. 45 is missing.", ["Part no. 45 is missing."]),
        ("No. My bank will hear of it.", ["No.", "My bank will hear of it."]),
        ("It came on 16.10. but broken.", ["It came on 16.10. but broken."]),
        ("Dr. Berg said so. I did not.", ["Dr. Berg said so.", "I did not."]),
        ("Am 3. Mai, z.B. um drei.", ["Am 3. Mai, z.B. um drei."]),
        ("1. Open the app. 2. Press ok", ["1. Open the app.", "2. Press ok"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("one line\nanother line\n\nlast", ["one line", "another line", "last"]),
        ("came home at 6. how long", ["came home at 6.", "how long"]),
        ("届きません。返金してください。", ["届きません。", "返金してください。"]),
        ("", []),
    ],
)
def test_where_a_text_is_cut(text, sentences):
    assert cut(text) == sentences


@given(st.text(max_size=200))
def test_no_letter_is_lost_or_doubled(text):
    found = spans(text)
    assert all(a < b for a, b in found)
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(found))
    inside = "".join(text[a:b] for a, b in found)
    assert [c for c in inside if c.isalnum()] == [c for c in text if c.isalnum()]


def test_who_speaks():
    def said(user_id, role):
        return Message(user_id=user_id, role=role, text="Hello there.")

    some = Chat(
        chat_id="1",
        messages=(
            said("c", "customer"), said("d", "customer"), said("a", "agent"), said("b", "bot"),
            said("s", "system"), said("x", "clerk"),
        ),
    )  # fmt: skip
    speakers = [sentence.speaker for sentence in sentences_of(some, "c")]
    assert speakers == ["Customer", "Other customer", "Agent", "Bot", "Agent"]
    assert [s.message for s in sentences_of(some, "c")] == [0, 1, 2, 3, 5]
    without = some.model_copy(
        update={"messages": tuple(m.model_copy(update={"role": None}) for m in some.messages)}
    )
    assert [s.speaker for s in sentences_of(without, "c")][:3] == ["Customer", "Other", "Other"]


def test_plain_figures_are_finite_and_of_one_shape():
    some = chat("Where is it? I paid 20.00 on 3 May.", "It comes tomorrow.", "thanks")
    found = features(some, sentences_of(some, "c"))
    assert found.shape == (4, FEATURES)
    assert np.isfinite(found).all()
    assert features(some, []).shape == (0, FEATURES)
