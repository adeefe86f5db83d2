"""`chatflow export`: a row for each customer of each chat, or the chat as CX Insights has it."""

import csv
import json
from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest
from conftest import ANALYSIS, DRAFT, mistake

from chatflow.cli import main
from chatflow.console.decisions import approve, dismiss, mark_of
from chatflow.database import tables
from chatflow.database.upserts import upsert
from chatflow.records import Chat, FieldValue, Message, parse_record
from chatflow.sources.read import check_input

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def chat(chat_id, *texts, at=NOON, **attributes):
    """A customer and an agent in turn, every 30 seconds."""
    messages = [
        Message(
            user_id="ca"[n % 2], role=("customer", "agent")[n % 2], text=text,
            sent_at=at + timedelta(seconds=30 * n),
        )
        for n, text in enumerate(texts)
    ]  # fmt: skip
    return Chat(chat_id=chat_id, messages=messages, attributes=attributes)


def analysis(chat_id, sentiment=-1, revision=0, **fields):
    values = {"analysis_id": f"a-{chat_id}-{revision}", "chat_id": chat_id, "user_id": "c"}
    values |= {"sentiment": sentiment, "revision": revision}
    return type(ANALYSIS).model_validate(ANALYSIS.model_dump() | values | fields)


def draft(chat_id, revision=0, **fields):
    values = {"draft_id": f"d-{chat_id}-{revision}", "analysis_id": f"a-{chat_id}-{revision}"}
    values |= {"chat_id": chat_id, "revision": revision}
    return type(DRAFT).model_validate(DRAFT.model_dump() | values | fields)


def write(database, *records):
    with database.write() as connection:
        upsert(connection, records)


def decide(database, decision, draft_id, *arguments):
    with database.write() as connection:
        row = connection.execute(
            tables.drafts.select().where(tables.drafts.c.draft_id == draft_id)
        ).mappings().one()  # fmt: skip
        seen = connection.execute(
            tables.chats.select().where(tables.chats.c.chat_id == row["chat_id"])
        ).mappings().one_or_none()  # fmt: skip
        decision(connection, draft_id, row["version"], mark_of(connection, seen), *arguments)


@pytest.fixture
def filled(database):
    """Five chats: decided, dismissed, happy, without an analysis, and one that is not kept."""
    late = FieldValue(value="delivery", confidence=0.9)
    write(
        database,
        chat("1", "Late!", "Sorry.", "Still late!", tenant="acme", language="en"),
        analysis("1", 0, 1), analysis("1", -1, 2, fields={"topic": late}, summary="=late"),
        draft("1", 1), draft("1", 2, text="We are sorry.", grievances=("late",)),
        chat("2", "@home\nnow", at=NOON + timedelta(days=1)), analysis("2"), draft("2"),
        chat("3", "Thanks"), analysis("3", 1),
        chat("4", "Hello", at=NOON + timedelta(days=2)),
        analysis("5", 0),
    )  # fmt: skip
    decide(database, approve, "d-1-2", "We are so sorry.", "ada", 0)
    decide(database, dismiss, "d-2-0", "other", "-", "bob")
    published = datetime(2026, 3, 2, tzinfo=UTC)
    with database.write() as connection:
        connection.execute(tables.outbox.update().values(published_at=published))
    return database


def exported(database, path, *flags):
    uri = database._engine.url.render_as_string(hide_password=False)
    assert main(["export", uri, str(path), *flags]) == 0
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_is_a_row_with_all_that_is_known(filled, tmp_path, capsys):
    rows = exported(filled, tmp_path / "x.jsonl", "--summary=json")
    report = {"rows": 5, "chats": 5, "written": f"{tmp_path}/x.jsonl"}
    assert json.loads(capsys.readouterr().out) == report
    assert [row["chat_id"] for row in rows] == ["1", "2", "3", "4", "5"]
    decided_at = rows[0].pop("decided_at")
    assert datetime.fromisoformat(decided_at).tzinfo
    assert rows[0] == {
        "chat_id": "1", "user_id": "c", "first_message_at": "2026-03-01T12:00:00Z",
        "last_message_at": "2026-03-01T12:01:00Z", "messages": 3, "first_response_seconds": 30.0,
        "attribute.language": "en", "attribute.tenant": "acme", "tone": "angry", "sentiment": -1,
        "summary": "=late", "field.topic": "delivery", "confidence.topic": 0.9,
        "draft": "We are sorry.", "grievances": "late", "draft_status": "approved",
        "draft_revision": 2, "draft_model": "m",
        "decided_by": "ada", "reply": "We are so sorry.", "replied_at": "2026-03-02T00:00:00Z",
        "model": "m", "prompt_version": "v", "revision": 2,
        "analysed_at": "2026-03-01T10:00:00.250000Z", "analysis_id": "a-1-2", "draft_id": "d-1-2",
        "transcript": "customer: Late!\nagent: Sorry.\ncustomer: Still late!",
    }  # fmt: skip
    dismissed = {name: rows[1].get(name) for name in ("draft_status", "reason", "reply")}
    assert dismissed == {"draft_status": "dismissed", "reason": "other", "reply": None}
    assert (rows[2]["tone"], "draft" in rows[2]) == ("happy", False)
    assert rows[3] == {
        "chat_id": "4", "first_message_at": "2026-03-03T12:00:00Z", "messages": 1,
        "last_message_at": "2026-03-03T12:00:00Z", "transcript": "customer: Hello",
    }  # fmt: skip
    assert (rows[4]["summary"], "transcript" in rows[4]) == ("It is late.", False)


def test_csv_and_parquet_have_the_same_rows_and_no_formulas(filled, tmp_path):
    shown = exported(filled, tmp_path / "x.csv")
    typed = exported(filled, tmp_path / "x.parquet")
    assert list(shown[0]) == list(typed[0])
    assert [row["chat_id"] for row in shown] == [row["chat_id"] for row in typed]
    assert shown[0]["summary"] == "'=late"
    assert shown[1]["transcript"] == "customer: @home\nnow"
    assert (shown[1]["comment"], shown[0]["sentiment"]) == ("'-", "-1")
    assert shown[0]["last_message_at"] == "2026-03-01 12:01:00"
    assert typed[0]["last_message_at"] == NOON + timedelta(minutes=1)
    assert sorted(path.name for path in tmp_path.glob("x.*")) == ["x.csv", "x.parquet"]


@pytest.mark.parametrize(
    ("flags", "chats"),
    [
        (["--since=2026-03-02"], ["2", "4"]),
        (["--since=2026-03-01T13:00:00+01:00", "--until=2026-03-02"], ["1", "3"]),
        (["--until=2026-03-01T12:00:00Z"], ["5"]),  # when it was analysed
        (["--sentiment=angry"], ["1", "2"]),
        (["--sentiment=neutral,happy"], ["3", "5"]),
        (["--since=2027-01-01"], []),
    ],
)
def test_filters(filled, tmp_path, flags, chats):
    assert [row["chat_id"] for row in exported(filled, tmp_path / "x.csv", *flags)] == chats


def test_each_customer_of_a_chat_has_a_row(database, tmp_path, capsys):
    both = chat("1", "Late!", "Late for me, too!")
    write(database, both, analysis("1"), analysis("1", analysis_id="a", user_id="a", sentiment=1))
    rows = exported(database, tmp_path / "x.jsonl", "--summary=json")
    assert [(row["user_id"], row["tone"]) for row in rows] == [("a", "happy"), ("c", "angry")]
    assert json.loads(capsys.readouterr().out)["chats"] == 1


def test_of_many_attributes_the_most_frequent_have_columns(sqlite, tmp_path, monkeypatch):
    monkeypatch.setattr("chatflow.commands.export.MOST_ATTRIBUTES", 1)
    write(sqlite, chat("1", "x", a="1", tenant="acme"), chat("2", "x", tenant="b"))
    first, second = exported(sqlite, tmp_path / "x.jsonl")
    assert (first["attribute.tenant"], first["attributes"]) == ("acme", '{"a":"1"}')
    assert "attributes" not in second


def test_cx_insights_is_a_file_a_chat_that_is_read_again(filled, tmp_path, capsys, lines):
    folder = tmp_path / "cx"
    uri = filled._engine.url.render_as_string(hide_password=False)
    assert main(["export", uri, str(folder), "--format=cx_insights", "--summary=json"]) == 0
    report = {"files": 4, "chats_without_words": 1, "written": str(folder)}
    assert json.loads(capsys.readouterr().out) == report
    assert len(check_input(str(folder))) == 4
    assert main(["import", str(folder), f"{tmp_path}/again.jsonl", "--summary=json"]) == 0
    again = (tmp_path / "again.jsonl").read_bytes().splitlines()
    found = {one.chat_id: one for one in (parse_record(Chat, line) for line in again)}
    said = [(m.role, m.text, m.sent_at) for m in found["1"].messages]
    given = chat("1", "Late!", "Sorry.", "Still late!").messages
    assert said == [(m.role, m.text, m.sent_at) for m in given]
    assert sorted(found) == ["1", "2", "3", "4"]
    assert main(["export", uri, str(folder), "--format=cx_insights"]) == 2
    assert f"{folder}/1.json exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("URI OUT", "must end in .csv, .parquet, .jsonl, or be a folder, with --format="),
        ("URI OUT.xlsx", "must end in .csv"),
        ("sqlite:///NONE.db OUT.csv", "NONE.db: there is no such file"),
        ("mysql://h/n OUT.csv", "is a database that chatflow does not write to"),
        ("URI OUT.csv --since yesterday", "--since: must be a date or a time, e.g. 2026-03-01"),
        ("URI OUT.csv --sentiment sad", "--sentiment: must be of angry, neutral, happy; found"),
        ("URI OUT.csv --database_password env:NOT_THERE", "NOT_THERE"),
        ("URI FILE/x.csv", "PATH: 'FILE' cannot be written"),
        ("URI", "PATH is missing"),
    ],
)
def test_a_mistake_is_one_clear_line(sqlite, tmp_path, capsys, arguments, said):
    (tmp_path / "file").write_text("")
    places = {"URI": sqlite.uri, "OUT": f"{tmp_path}/out", "FILE": f"{tmp_path}/file"}
    error = mistake(["export", *arguments.split()], places, capsys)
    assert said.replace("FILE", places["FILE"]) in error
    assert not list(tmp_path.glob("out*"))


def test_an_export_that_fails_leaves_the_earlier_file(filled, tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text("before")

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr("chatflow.commands.export.row_of", broken)
    uri = filled._engine.url.render_as_string(hide_password=False)
    assert main(["export", uri, str(path)]) == 1
    assert path.read_text() == "before"
    assert not list(tmp_path.glob("*.part"))
