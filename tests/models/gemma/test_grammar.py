"""Answers by grammar: whatever the model says, the text is one that was asked for."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow.models.gemma.grammar import DONE, ENDLESS, Text, Vocabulary, compile_texts
from chatflow.models.parts import json_answer

PIECES = (
    b"",  # the end token
    b"",  # a control token
    *(bytes([byte]) for byte in range(256)),
    "é".encode(), "日本".encode(), "👍".encode(), "👍".encode()[:2],
    b'"', b'",', b'"}', b'\\"', b"\\", b"\\\\", b"\\n", b" ", b"  ", b"\n", b"\n\n", b". ", b".",
    b"late", b" parcel", b' the "parcel"', b"x" * 40, b'a"b', b". The", b"?\nNo",
)  # fmt: skip
VOCABULARY = Vocabulary(PIECES, ends=(0,))
JSON = Text(json_string=True)
SENTENCE = Text((". ", "\n"))
ANY = Text()
TEXTS = [SENTENCE, JSON, ANY]
AUTOMATON = compile_texts(TEXTS, VOCABULARY)


def wish(text, order, tokens, characters=ENDLESS):
    """What is written by a model that wishes for one token after another, in vain or not.

    This is what the engine does on the device: of those allowed, the likeliest.
    """
    state, written = AUTOMATON.starts[TEXTS.index(text)], []
    while state != DONE and tokens > 0:
        following = AUTOMATON.next_state[state]
        left = characters - AUTOMATON.characters[state]
        after = np.maximum(following, 0)
        allowed = (
            (following >= 0)
            & (left >= AUTOMATON.characters_to_end[after])
            & (tokens > AUTOMATON.tokens_to_end[after])
        )
        rank = next(order)
        token = next(t for t in rank if allowed[AUTOMATON.token_class[t]])
        kind = AUTOMATON.token_class[token]
        state, characters, tokens = after[kind], left[kind], tokens - 1
        written.append(token)
    return b"".join(PIECES[token] for token in written), state == DONE


def shuffles(seed):
    rng = np.random.default_rng(seed)
    while True:
        # Mostly the longer pieces: the 256 single bytes would crowd them out.
        weights = rng.random(len(PIECES)) * np.where(np.arange(len(PIECES)) < 258, 0.3, 1)
        yield np.argsort(-weights)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 60))
def test_a_json_string_is_valid_whatever_the_model_wishes(seed, tokens, characters):
    written, ended = wish(JSON, shuffles(seed), tokens, characters)
    assert ended
    value = JSON.read(written)
    assert 1 <= len(value) <= characters
    assert value.strip()


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(0, 60))
def test_a_text_is_valid_utf_8_and_ends_before_its_stop(seed, tokens, characters):
    for text in (SENTENCE, ANY):
        written, _ = wish(text, shuffles(seed), tokens, characters)
        value = text.read(written)
        assert len(value) <= characters
        assert not any(stop in value for stop in text.stop)


def test_a_stop_is_seen_across_tokens_and_ends_the_text_at_once():
    ranks = iter([[PIECES.index(piece)] for piece in (b"late", b".", b" parcel", b"late")])
    assert wish(SENTENCE, ranks, 10) == (b"late. parcel", True)
    assert SENTENCE.read(b"late. parcel") == "late"


def test_what_follows_the_end_in_the_same_token_is_no_part_of_the_text():
    ranks = iter([[PIECES.index(piece)] for piece in (b"late", b'"}')])
    assert wish(JSON, ranks, 10) == (b'late"}', True)
    assert JSON.read(b'late"}') == "late"


def test_the_end_token_ends_a_text_but_no_json_string():
    first = [0, PIECES.index(b"late"), PIECES.index(b'"')]
    assert wish(ANY, iter([first]), 10) == (b"", True)
    assert wish(JSON, iter([first[1:], first, first[2:]]), 10) == (b'latelate"', True)


def test_the_tables_are_small():
    """Classes of tokens, not tokens, are what the device looks up."""
    assert AUTOMATON.next_state.shape[1] < len(PIECES)
    assert len(set(AUTOMATON.token_class)) == AUTOMATON.next_state.shape[1]


def test_a_vocabulary_that_cannot_write_a_text_is_refused():
    with pytest.raises(ValueError, match="cannot write"):
        compile_texts([JSON], Vocabulary((b"", b"late"), ends=(0,)))


def test_a_schema_is_filled_in():
    schema = {
        "type": "object",
        "properties": {
            "summary": {"type": "string", "maxLength": 12},
            "sentiment": {"type": "integer", "enum": [-1, 0, 1]},
        },
    }
    form = json_answer(schema)
    assert form.fields == ("sentiment", "summary")
    answer = form.before + form.choices[0] + form.between + 'fine"}'
    assert json.loads(answer) == {"sentiment": -1, "summary": "fine"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"a": {"enum": [1]}},
        {"a": {"type": "string"}, "b": {"type": "string"}},
        {"a": {"enum": [1]}, "b": {"type": "integer"}},
    ],
)
def test_a_schema_of_another_shape_is_refused(fields):
    with pytest.raises(ValueError, match="one enumeration and one string"):
        json_answer({"type": "object", "properties": fields})
