"""Summaries by choice: what is quoted, of whom, and never what the chat takes back."""

import numpy as np
import pytest
from conftest import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow.choices.sentences import sentences_of
from chatflow.choices.summaries import ANSWER, ENDING, MATTER, NONE, composed
from chatflow.records import Chat, Message

PARTS = {"-": NONE, "m": MATTER, "a": ANSWER, "e": ENDING}


def said(*messages):
    """A chat of "C:" and "A:" messages; each sentence begins with its part in brackets."""
    return Chat(
        chat_id="1",
        messages=tuple(
            Message(user_id=text[0], role="customer" if text[0] == "C" else "agent", text=text[3:])
            for text in messages
        ),
    )


def summary(some, parts, limit=512, opening=""):
    """A summary if each sentence is surely of the given part: a letter a sentence."""
    sentences = sentences_of(some, "C")
    assert len(sentences) == len(parts)
    sure = np.full((len(parts), 4), 0.02)
    for row, part in zip(sure, parts, strict=True):
        row[PARTS[part]] = 0.94
    return composed(sentences, sure, limit, opening)[0]


def test_it_says_who_said_what_in_the_order_of_the_chat():
    some = said(
        "C: Hello. My parcel 12 is late.", "A: It left the depot today.", "C: Fine, I will wait."
    )
    assert summary(some, "-mae", opening="Not solved.") == (
        "Not solved. Customer: “My parcel 12 is late.” Agent: “It left the depot today.” "
        "Customer: “Fine, I will wait.”"
    )


def test_sentences_of_one_message_are_joined_and_gaps_shown():
    some = said("C: The lamp is broken. I am Ann. It was for a birthday. It cost 40.")
    assert summary(some, "m-mm") == (
        "Customer: “The lamp is broken. … It was for a birthday. It cost 40.”"
    )


@pytest.mark.parametrize(
    "junk",
    [
        "Sent from my phone", "> we never got it", "On 3 May Ann wrote:", "How did we do? Rate us",
        "This message was deleted", "https://example.org/x", "Please do not reply to this message.",
        "How can I help you today?", "Is there anything else I can help with?",
    ],
)  # fmt: skip
def test_junk_and_filler_are_never_quoted(junk):
    some = said("C: My parcel is late.", f"A: {junk}", "C: So it never came.")
    parts = "m" + "m" * (len(sentences_of(some, "C")) - 2) + "e"
    assert junk not in summary(some, parts)


def test_what_is_taken_back_is_not_quoted_alone():
    moved = said(
        "C: When does the fitter come?",
        "A: He comes on Monday at 9:00.",
        "A: Sorry, the fitter is now booked for Thursday at 14:00.",
        "C: Ok then.",
    )
    alone = summary(moved, "ma-e")
    assert "Thursday" in alone
    assert "Monday" not in alone
    assert "Thursday" in summary(moved, "maae")  # with the correction beside it

    waived = said(
        "C: Why is there a fee of 25.00?",
        "A: The late fee is 25.00.",
        "A: I have corrected it, the fee is 0.00 now.",
    )
    assert "0.00 now" in summary(waived, "ma-")


def test_a_short_answer_comes_with_its_question():
    some = said("C: Which size do you have left?", "A: 42", "C: Then never mind, thanks.")
    found = summary(some, "-ae")
    assert "Which size do you have left?" in found


def test_a_sentence_that_hangs_on_another_comes_with_it():
    some = said("C: The boiler broke on Sunday. It leaks all over the floor.")
    assert "The boiler broke" in summary(some, "-m")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("CA"), st.text(min_size=1, max_size=120)), min_size=1, max_size=8
    ),
    st.integers(min_value=30, max_value=512),
    st.randoms(use_true_random=False),
)
def test_it_is_short_and_made_of_what_was_said(messages, limit, random):
    some = Chat(
        chat_id="1",
        messages=tuple(
            Message(user_id=who, role="customer" if who == "C" else "agent", text=text)
            for who, text in messages
        ),
    )
    sentences = sentences_of(some, "C")
    if not sentences:
        return
    parts = np.array([[random.random() for _ in range(4)] for _ in sentences])
    text, quoted = composed(sentences, parts, limit)
    assert 1 <= len(text) <= limit
    places = [at for quote in quoted for at in quote.sentences]
    assert places == sorted(set(places))
    assert all(sentences[at].message == q.message for q in quoted for at in q.sentences)


def test_a_chat_without_sentences_has_none():
    assert composed([], np.zeros((0, 4)), 512) == ("", ())
    assert chat("hello").messages
