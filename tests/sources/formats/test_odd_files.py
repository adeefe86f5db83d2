"""Files with one odd row or value: it alone becomes a dead letter, and nothing private is shown."""

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatflow.records import Range
from chatflow.running.publishing import read_lines as lines_to_publish
from chatflow.sources.formats import tables
from chatflow.sources.lines import read_lines
from chatflow.sources.privacy import is_private


def read(path):
    """Returns the values of a file's lines, and the reasons of its faults."""
    arrivals = [*read_lines(Range(str(path)), 1_000_000)]
    values = [json.loads(one.line) for one in arrivals if one.fault is None]
    return values, [one.fault.reason for one in arrivals if one.fault]


def table(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text)
    return read(path)


def texts(values):
    return [m["text"] for value in values for m in value.get("messages", ())]


@pytest.mark.parametrize("first", ["1,bob,oops", "1,bob,oops,false,extra"])
def test_a_ragged_first_row_changes_no_other(tmp_path, first):
    rows = f"chat_id,author,text,private\n{first}\n2,amy,hi,false\n2,joe,secret note,true\n"
    values, faults = table(tmp_path, rows)
    assert faults == []
    assert values[0]["error"] in ("3 cells under 4 columns", "5 cells under 4 columns")
    assert [m.get("private") for m in values[1]["messages"]] == [None, True]


@pytest.mark.parametrize("mark", ["t", "T", "y", "on", "true", "1", "yes"])
def test_booleans_as_databases_write_them(mark):
    assert is_private({"private": mark})
    assert not is_private({"public": mark})
    assert is_private({"public": {"t": "f", "y": "n", "on": "off"}.get(mark, "false")})


def test_a_quotation_mark_without_an_end_is_said(tmp_path):
    values, _ = table(tmp_path, 'chat_id,author,text\n1,amy,hi\n2,bob,"oops\n3,amy,hi\n4,joe,x\n')
    assert texts(values) == ["hi"]
    wrong = next(value for value in values if "error" in value)
    assert wrong["error"].startswith("a quotation mark has no end")
    assert "4,joe,x" in json.dumps(wrong["row"])


def test_quotation_marks_within_words_are_words(tmp_path):
    values, faults = table(
        tmp_path, 'chat_id,author,text\n1,amy,5" pipe\n2,bob,"two\nlines, 3"" x"\n'
    )
    assert (texts(values), faults) == (['5" pipe', 'two\nlines, 3" x'], [])


def test_a_cell_that_is_too_long_is_a_row_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_CELL", 1000)
    rows = f"chat_id,author,text\n1,amy,hi\n2,bob,{'x' * 2000}\n3,joe,late\n"
    values, faults = table(tmp_path, rows)
    assert (texts(values), faults) == (["hi", "late"], [])
    assert any("field larger than field limit" in value.get("error", "") for value in values)


def test_a_table_stays_one_with_an_object_in_a_cell(tmp_path):
    values, _ = table(tmp_path, 'chat_id,author,text\n1,amy,"see\n{}\nthat"\n2,bob,hi\n')
    assert texts(values) == ["see\n{}\nthat", "hi"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_both_read(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in (1, 2):
            one = {"chat_id": str(number), "messages": [{"user_id": "c", "text": "hi"}]}
            archive.writestr("a.json", json.dumps(one))
    assert [value["chat_id"] for value in read(path)[0]] == ["1", "2"]


def test_texts_of_parquet_that_are_binary(tmp_path):
    columns = {"chat_id": [b"1"], "author": [b"amy"], "text": ["café".encode()], "tag": [b"x"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    ((value,), faults) = read(tmp_path / "t.parquet")
    assert (value["chat_id"], texts([value]), value["attributes"]) == ("1", ["café"], {"tag": "x"})
    assert faults == []


UTTERANCE = {"id": "u", "speaker": "amy", "conversation_id": "c", "text": "hi", "timestamp": 1}
ODD_UTTERANCES = [
    {"timestamp": 10**400}, {"conversation_id": "\ud83d"}, {"speaker": "\ud83d"}, {"id": [1]},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_UTTERANCES)
def test_an_odd_utterance_takes_no_other_with_it(tmp_path, odd):
    path = tmp_path / "utterances.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (UTTERANCE, {**UTTERANCE, **odd})))
    values, faults = read(path)
    assert (len(texts(values)), faults) == (2, [])


def test_private_utterances_are_private(tmp_path):
    path = tmp_path / "utterances.jsonl"
    path.write_text(json.dumps({**UTTERANCE, "meta": {"private": True}}) + "\n")
    assert read(path)[0][0]["messages"][0]["private"] is True


def test_a_number_of_many_digits_ends_no_file(tmp_path):
    phrase = {"participantPurpose": "external", "text": "hi"}
    lines = [
        {"conversationId": str(n), "transcripts": [{"phrases": [{**phrase, "startTimeMs": at}]}]}
        for n, at in enumerate((1, 10**400, 2))
    ]
    path = tmp_path / "g.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    values, faults = read(path)
    assert (len(values), faults) == (3, [])


def test_an_element_that_is_nested_too_deeply_takes_no_other_with_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n' + "[" * 50_000 + "]" * 50_000 + ',\nnull, {"b": 2}\n]')
    values, faults = read(path)
    assert (values, faults) == ([{"a": 1}, None, {"b": 2}], ["too_deep"])


def test_published_files_of_one_name_are_different_chats(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "_chat.txt").write_text(
            f"[15/01/24, 10:30:45] Amy: hello {folder}\n[15/01/24, 10:31:45] Bob: hi\n"
        )
    found = [json.loads(line)["chat_id"] for line in lines_to_publish(f"{tmp_path}/*/_chat.txt")]
    assert sorted(found) == ["a/whatsapp", "b/whatsapp"]
