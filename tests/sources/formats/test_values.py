"""JSON values one after another: whatever the pieces are, none is lost, cut or kept for long."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow.records import Range
from chatflow.sources.formats.values import Element, elements, pairs
from chatflow.sources.lines import read_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


def cut(text, size):
    return (text[at : at + size] for at in range(0, len(text), size))


@given(st.lists(JSON, max_size=5), st.integers(1, 30), st.sampled_from([None, 1]), st.booleans())
@settings(deadline=None)
def test_values_are_the_same_whatever_the_pieces_are(values, size, indent, as_array):
    if as_array:
        text = json.dumps(values, indent=indent)
    else:
        values = [value for value in values if not isinstance(value, list)]
        text = "\n".join(json.dumps(value, indent=indent) for value in values)
    assert [one.value for one in elements(cut(text, size), 10_000)] == values
    named = {str(number): value for number, value in enumerate(values)}
    assert dict(pairs(cut(json.dumps(named, indent=indent), size), 10_000)) == named


@given(st.lists(JSON, min_size=1, max_size=5), st.integers(1, 30), st.integers(0, 20))
@settings(deadline=None)
def test_a_value_that_is_too_long_costs_no_other(values, size, most):
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    found = [*elements(cut(f"[{','.join(texts)}]", size), most)]
    assert found == [
        Element(value if len(text) <= most else None, len(text))
        for value, text in zip(values, texts, strict=True)
    ]


@given(st.lists(st.dictionaries(st.text(max_size=4), JSON), min_size=1, max_size=5), st.data())
@settings(deadline=None)
def test_an_array_that_breaks_off_is_never_taken_for_whole(values, data):
    text = json.dumps(values)
    end = data.draw(st.integers(1, len(text) - 1))
    found = []
    with pytest.raises(EOFError):
        found.extend(elements(cut(text[:end], 7), 10_000))
    assert found == [Element(value, len(json.dumps(value))) for value in values[: len(found)]]


def read(path, most):
    found = [*read_lines(Range(str(path)), most)]
    return (
        [json.loads(arrival.line) for arrival in found if arrival.fault is None],
        [arrival.fault for arrival in found if arrival.fault is not None],
    )


CHATS = [{"chat_id": str(number), "text": "late " * 10} for number in range(200)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_array_may_be_longer_than_a_line_may_be(tmp_path, indent, encoding):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(CHATS, indent=indent), encoding)
    assert read(path, 100) == (CHATS, [])


def test_what_is_wrong_in_an_array_is_said_with_its_place(tmp_path):
    path = tmp_path / "export.json"
    long = {"chat_id": "long", "text": "x" * 5000}
    text = json.dumps([*CHATS[:5], long, *CHATS[5:]])
    path.write_text(text)
    values, (fault,) = read(path, 100)
    assert values == CHATS
    assert (fault.reason, fault.part) == ("line_too_long", Range(str(path)))
    assert f"{path}, element 6 has 5031 characters, more than --max_line_bytes=100" in fault.message
    path.write_text(text[:-2000])
    values, (_, fault) = read(path, 100)
    assert CHATS[:100] == values[:100]
    assert fault.reason == "truncated_file"
    assert f"ends too early, as after a broken download; {len(values) + 1} el" in fault.message
    path.write_text(json.dumps(CHATS[:5])[:-1] + ", {broken}, " + text[1:])
    values, (fault,) = read(path, 100)
    assert (values, fault.reason) == (CHATS[:5], "corrupt_file")
    assert "is not JSON: Expecting property name" in fault.message
    assert "5 elements of it were read" in fault.message


def test_lines_whose_first_is_very_long_are_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    first = {"chat_id": "long", "text": "x" * 100_000}
    path.write_text(json.dumps(first) + "\n{broken\n" + json.dumps(CHATS[0]))
    found = [*read_lines(Range(str(path)), 1_000_000)]
    assert [arrival.number for arrival in found] == [1, 2, 3]
    assert found[1].line == b"{broken"


def test_a_large_array_needs_little_memory(tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps([{"chat_id": "1", "text": "x" * 1000}] * 30_000))
    tracemalloc.start()
    count = sum(1 for _ in read_lines(Range(str(path)), 1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000
    assert peak < 12e6
