"""`chatflow import`: what other systems export, as chatflow's own lines, with a report."""

import json
from pathlib import Path

import pytest
from conftest import chat

from chatflow.cli import main
from chatflow.records import DeadLetter, validate

TICKETS = (
    "ticket_id,role,body,public\n7,customer,It is late,true\n8,customer,Thanks,true\n"
    "7,agent,Sorry,true\n7,agent,A difficult one,false\n,agent,lost,true\n"
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text(TICKETS)
    return path


def run(capsys, *arguments):
    assert main(["import", *map(str, arguments), "--summary=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_export_becomes_our_lines_which_say_the_same_when_read_again(tmp_path, table, capsys):
    output = tmp_path / "chats.jsonl"
    report = run(capsys, table, output)
    letters = str(tmp_path / "chats.dead_letters.jsonl")
    assert report == {
        "lines": 3, "chats": 2, "messages": 4, "dead_letters/bad_row": 1, "formats/csv": 2,
        "input/private_notes": 1, "written": [str(output), letters],
    }  # fmt: skip
    again = tmp_path / "again.jsonl"
    run(capsys, output, again)
    assert again.read_text() == output.read_text()
    (line,) = Path(letters).read_text().splitlines()
    letter = validate(DeadLetter, json.loads(line))
    assert (letter.stage, letter.reason, letter.error) == (
        "read", "bad_row", "there is no ticket_id",
    )  # fmt: skip


def test_the_report_is_a_table_and_says_how_columns_were_taken(tmp_path, table, capsys):
    assert main(["import", str(table), str(tmp_path / "x.jsonl")]) == 0
    said = capsys.readouterr()
    assert "dead letters: bad row" in said.out
    assert "CSV export: 2 chats; 3 messages, 1 private note left out\n" in said.err
    assert "--columns='chat=ticket_id,text=body,who=role'" in said.err
    assert f"the first that could not be read: there is no ticket_id ({table}, row 5)" in said.err


def test_chats_of_one_object_are_counted_once(tmp_path, capsys):
    users = [{"id": 1, "role": "end-user"}]
    comments = [{"id": 5, "author_id": 1, "public": True, "plain_body": "late"}]
    tickets = [{"id": n, "requester_id": 1, "subject": "s", "comments": comments} for n in (1, 2)]
    path = tmp_path / "page.json"
    path.write_text(json.dumps({"tickets": tickets, "users": users}))
    report = run(capsys, path, tmp_path / "x.jsonl")
    assert (report["chats"], report["formats/zendesk"]) == (2, 2)


def test_an_import_of_nothing_is_none(tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_text("chat_id,text\n,lost\n")
    assert main(["import", str(path), str(tmp_path / "y.jsonl")]) == 1
    assert "there is no chat_id" in capsys.readouterr().err
    assert not (tmp_path / "y.jsonl.part").exists()


def test_messages_and_ends_stay_what_they_are(tmp_path, lines, capsys):
    path = lines(
        chat("late"),
        {"chat_id": "7", "user_id": "c", "text": "hi"},
        {"chat_id": "7", "event": "closed"},
    )
    output = tmp_path / "x.jsonl"
    report = run(capsys, path, output)
    assert (report["chats"], report["messages_and_ends"]) == (1, 2)
    assert len(output.read_text().splitlines()) == 3
    assert report["written"] == [str(output)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{table}", "{table}"], "is one of the files to read"),
        (["{folder}/none.csv", "{folder}/x.jsonl"], "no file matches"),
        (["{table}", "{folder}/x.jsonl", "--columns=chat=x"], "there is no column 'x' for chat"),
        (["{table}", "{folder}/x.jsonl", "--input_format=xml"], "--input_format=xml: must be"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, table, capsys, arguments, said):
    given = [one.format(table=table, folder=tmp_path) for one in arguments]
    assert main(["import", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
