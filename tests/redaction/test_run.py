"""Whole runs with `--redact`: what was planted is in no sink, prompt, log, letter or database."""

import base64
import binascii
import csv
import gzip
import json
import os
import re
import shutil
import sqlite3

import pytest
from conftest import ANGRY, APOLOGY, as_line, read
from consoles import Visitor, angry_chat, served, write
from fakes.hook import Hook

from chatflow.cli import main
from chatflow.console.outbox import Publisher, ReplyFile
from chatflow.console.people import People, digest_of
from chatflow.database.connections import Database
from chatflow.redaction.logs import stop_redacting

PLANTED = {
    "email": "ann.miller@private.org", "phone": "(415) 555-2671", "card": "4111 1111 1111 1111",
    "iban": "DE89 3704 0044 0532 0130 00", "ssn": "536-22-8726", "nino": "AB 12 34 56 C",
    "steuer_id": "86095742719", "ip": "203.0.113.77", "name": "Annabel Quist",
    "url": "https://shop.example/reset?token=s3cr3tT0ken", "address": "12 Baker Street, London",
    "contract": "C-123456",
}  # fmt: skip
SAID = "My parcel is late! " + "; ".join(
    f"my name is {value}" if kind == "name" else value for kind, value in PLANTED.items()
)


def whole(chat_id, text=SAID, **fields):
    message = {"user_id": PLANTED["email"], "role": "customer", "text": text,
               "message_id": PLANTED["email"] + chat_id,
               "attributes": {"from": PLANTED["email"]}}  # fmt: skip
    beside = {"attributes": {"customer_name": PLANTED["name"]}}
    return {"chat_id": chat_id, "messages": [message], **beside, **fields}


LINES = [
    whole("1"),
    whole("2", text="late! unusable answer " + SAID),  # a dead letter of the model's answer
    {"chat_id": "3", "text": SAID, "user_id": "c", "sent_at": "yesterday"},
    {"chat_id": "4", "user_id": "c", "event": SAID},  # unknown_event
    {"chat_id": "5", "messages": [{"user_id": "a", "role": "agent", "text": SAID}]},  # no_customer
    whole("6"), whole("6", text=SAID + " again"),  # shared_id
    f'{{"chat_id": "7", "text": "{SAID}',  # not_json
    b'{"chat_id": "8", "text": "' + SAID.encode() + b' caf\xe9"}',  # not_utf8
    [SAID],  # not_an_object
    {"chat_id": "9", "messages": [{"user_id": "c", "text": "x" * 3000 + SAID}]},  # line_too_long
]  # fmt: skip


def leaks(content: bytes) -> list[str]:
    """Returns which planted items bytes have, also those packed in base64 and gzip."""
    texts = [content.decode("latin-1")]
    for run in re.findall(rb"[A-Za-z0-9+/]{24,}={0,2}", content):
        try:
            raw = base64.b64decode(run, validate=True)
        except binascii.Error:
            continue
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        texts.append(raw.replace(b"\0", b"").decode("latin-1"))
    forms = {form for value in PLANTED.values() for form in (value, json.dumps(value)[1:-1])}
    forms |= {"Quist", "4111111111111111", "DE89370400440532013000"}
    return [form for form in sorted(forms) for text in texts if form in text]


def dump(path) -> bytes:
    with sqlite3.connect(path) as connection:
        return "\n".join(connection.iterdump()).encode()


@pytest.fixture(autouse=True)
def own_logs():
    """Ends what a run in this process began: its log lines are redacted until the process ends."""
    yield
    stop_redacting()


@pytest.fixture(scope="module")
def planted_once(tmp_path_factory, fake_vertex, warm):
    """Runs the pipeline as a user does, with all log lines, on chats with planted items."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "own.toml").write_text("contract = 'C-\\d{6}'\n")
    (folder / "chats.jsonl").write_bytes(b"".join(as_line(line) + b"\n" for line in LINES))
    asked = []

    def answer(prompt):
        asked.append(prompt)
        if "apolog" in prompt.lower() and "JSON" not in prompt:
            return "Dear [NAME_1], we are sorry that your parcel is late."
        if "unusable answer" in prompt:
            return "I would rather not: " + prompt[-2000:]
        return '{"sentiment": -1, "summary": "The parcel of [NAME_1] is late."}'

    fake_vertex.reset()
    before, fake_vertex.brain.answer = fake_vertex.brain.answer, answer
    with Hook() as hook:
        ran = warm.run(
            "-m", "chatflow", "run", "--input=chats.jsonl", "--output=out",
            f"--analyses=out/analyses,{hook.address}/analyses", "--webhook_secret=env:HOOK",
            "--database=sqlite:///chatflow.db", "--inference=remote", "--model=openai:small",
            f"--api_endpoint={fake_vertex.address}/v1", "--max_line_bytes=3000",
            "--redact=all", "--redact_patterns=own.toml", "--keep_raw=sqlite:///raw.db",
            "--summary=json", "--debug", cwd=folder,
            env={**os.environ, "HOOK": "whsec_" + base64.b64encode(bytes(32)).decode()},
        )  # fmt: skip
        assert ran.returncode == 0
        sent = b"".join(one.body for one in hook.received)
    fake_vertex.brain.answer = before
    return {
        "sent": sent, "counts": json.loads(ran.said),
        "printed": f"{ran.said}{ran.complained}".encode(),
        "prompts": "\n".join(asked).encode(), "folder": folder,
    }  # fmt: skip


@pytest.fixture
def planted(planted_once, tmp_path):
    """What came out of that run; the folder is a copy."""
    shutil.copytree(planted_once["folder"], tmp_path, dirs_exist_ok=True)
    return {**planted_once, "folder": tmp_path}


def test_what_was_planted_is_nowhere(planted):
    folder = planted["folder"]
    assert planted["counts"]["lost"] == 0
    assert len(read(folder / "out", "dead_letters")) == 9
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    found = {path.name: leaks(path.read_bytes()) for path in files}
    found |= {name: leaks(planted[name]) for name in ("sent", "printed", "prompts")}
    found["database"] = leaks(dump(folder / "chatflow.db"))
    assert {name: one for name, one in found.items() if one} == {}
    assert planted["sent"]
    assert b"[CONTRACT_1]" in planted["prompts"]
    # The check itself finds what is there: the raw chats, where --keep_raw says.
    assert set(PLANTED.values()) <= set(leaks(dump(folder / "raw.db")))


def test_counts_and_positions_are_in_the_results(planted):
    (analysis,) = [a for a in read(planted["folder"] / "out", "analyses") if a["chat_id"] == "1"]
    kinds = {one["kind"] for one in analysis["redacted"]}
    assert kinds == set(PLANTED)
    counted = planted["counts"]["redacted"]
    assert counted["email"] > counted["contract"] > 0


def test_letters_are_replayed_as_they_are(planted, script):
    folder = planted["folder"]
    letters = folder / "letters.jsonl"
    usable = [one for one in read(folder / "out", "dead_letters") if one["stage"] == "answer"]
    letters.write_text("".join(json.dumps(one) + "\n" for one in usable))
    main([
        "replay", f"--input={letters}", f"--output={folder}/again", "--redact=all",
        f"--model={script(ANGRY, APOLOGY)}", f"--keep_raw=sqlite:///{folder}/raw.db",
        "--summary=json",
    ])  # fmt: skip
    (analysis,) = read(folder / "again", "analyses")
    assert analysis["chat_id"] == "2"
    assert {one["kind"] for one in analysis["redacted"]} >= {"card", "iban"}
    # What was redacted before does not take the place of the raw chat.
    assert PLANTED["card"] in dump(folder / "raw.db").decode()


def test_raw_chats_in_files(tmp_path, lines, script):
    flags = [f"--input={lines(whole('1'))}", f"--output={tmp_path}/out", "--redact=email,name"]
    kept = f"--keep_raw={tmp_path}/raw/chats"
    table = f"--analyses={tmp_path}/out/analyses.csv"
    assert main(["run", *flags, kept, table, f"--model={script(ANGRY, APOLOGY)}"]) == 0
    (path,) = (tmp_path / "raw").glob("chats*.jsonl")
    raw = json.loads(path.read_text())
    assert raw["chat"]["messages"][0]["text"] == SAID
    assert raw["placeholders"]["[EMAIL_1]"] == PLANTED["email"]
    with open(tmp_path / "out" / "analyses.csv", encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert {one["kind"] for one in json.loads(row["redacted"])} == {"email", "name"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("projects/p/topics/t", "'projects/p/topics/t' must be a file prefix or a database"),
        ("sqlite:///nowhere/x.db", "there is no folder"),
    ],
)
def test_mistakes_in_keep_raw(lines, script, place, said, capsys):
    flags = ["--output=out", "--redact=all", f"--keep_raw={place}", f"--model={script(ANGRY)}"]
    assert main(["run", f"--input={lines(whole('1'))}", *flags]) == 2
    found = capsys.readouterr().err
    assert "--keep_raw: " in found
    assert said in found


@pytest.fixture
def databases(planted):
    folder = planted["folder"]
    made = [Database(f"sqlite:///{folder}/{name}", connections=20) for name in
            ("chatflow.db", "raw.db")]  # fmt: skip
    yield made
    for one in made:
        one.close()


PEOPLE = People(
    "local",
    {
        name: {"role": role, "token_sha256": digest_of(name)}
        for name, role in (("ada", "agent"), ("otto", "observer"))
    },
    redacted=frozenset(),
)


def signed_in(address, name):
    visitor = Visitor(address)
    page = visitor.get("/sign-in").text
    csrf = re.search(r'name="csrf" value="([^"]*)"', page)[1]
    visitor.post("/sign-in", {"token": name, "csrf": csrf})
    return visitor


def test_the_console_fills_in_for_those_who_decide(planted, databases, tmp_path):
    database, raw = databases
    drafts = {d["chat_id"]: d for d in read(planted["folder"] / "out", "drafts")}
    page = f"/drafts/{drafts['1']['draft_id']}"
    with served(database, PEOPLE, raw=raw) as address:
        ada, otto = signed_in(address, "ada"), signed_in(address, "otto")
        assert "Dear Annabel Quist, we are sorry" in ada.get(page).text
        assert "Annabel Quist" in ada.get("/").text
        for path in (page, "/", "/history"):
            shown = otto.get(path).text
            assert leaks(shown.encode()) == []
        assert "Dear [NAME_1], we are sorry" in otto.get(page).text
        text = f"Dear Annabel Quist, we wrote to {PLANTED['email']}."
        assert ada.decide(drafts["1"]["draft_id"], "approve", text=text).status_code == 303
    assert leaks(dump(planted["folder"] / "chatflow.db")) == []
    replies = ReplyFile(str(tmp_path / "replies.jsonl"))
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE outbox SET publish_after = '2026-01-01 00:00:00'")
    assert Publisher(database, replies, raw).publish() == 1
    (reply,) = map(json.loads, (tmp_path / "replies.jsonl").read_text().splitlines())
    assert reply["text"] == text


def test_a_customer_never_sees_a_placeholder(planted, databases, tmp_path):
    database, raw = databases
    drafts = {d["chat_id"]: d for d in read(planted["folder"] / "out", "drafts")}
    draft_id = drafts["1"]["draft_id"]
    with served(database, PEOPLE) as address:  # raw chats are not here
        ada = signed_in(address, "ada")
        answer = ada.decide(draft_id, "approve", text=drafts["1"]["text"])
        assert answer.status_code == 409
        assert "[NAME_1] stands for something that was left out" in answer.text
    with served(database, PEOPLE, raw=raw) as address:
        ada = signed_in(address, "ada")
        assert ada.decide(draft_id, "approve", text=drafts["1"]["text"]).status_code == 303
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE outbox SET publish_after = '2026-01-01 00:00:00'")
    replies = ReplyFile(str(tmp_path / "replies.jsonl"))
    # What the placeholders stand for is gone; another reply does not wait for it.
    other = decide_something(database)
    assert Publisher(database, replies).publish() == 1
    (sent,) = map(json.loads, (tmp_path / "replies.jsonl").read_text().splitlines())
    assert sent["draft_id"] == other
    with database.read() as connection:
        query = f"SELECT error FROM outbox WHERE draft_id = '{draft_id}'"
        (error,) = connection.exec_driver_sql(query).scalars()
    assert error == "a placeholder in the reply cannot be filled in: its value is not stored"
    assert Publisher(database, replies, raw).publish() == 0  # it is tried again later
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE outbox SET leased_until = NULL")
    assert Publisher(database, replies, raw).publish() == 1


def decide_something(database):
    chat, analysis, draft = angry_chat(1, text="[REF_12] is late")  # nothing was redacted in it
    write(database, chat, analysis, draft)
    with served(database) as address:
        text = "We are sorry for [REF_12]."
        assert Visitor(address).decide(draft.draft_id, "approve", text=text).status_code == 303
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE outbox SET publish_after = '2026-01-01 00:00:00'")
    return draft.draft_id


@pytest.mark.parametrize("typed", ["Dear [Name_1],", "Dear NAME_1,", "Dear [NAME 1],"])
def test_what_looks_like_a_placeholder_is_refused_too(planted, databases, typed):
    database, raw = databases
    drafts = {d["chat_id"]: d for d in read(planted["folder"] / "out", "drafts")}
    with served(database, PEOPLE, raw=raw) as address:
        answer = signed_in(address, "ada").decide(drafts["1"]["draft_id"], "approve", text=typed)
        assert answer.status_code == 409


def test_the_page_is_there_without_the_raw_chats(planted, databases):
    database, raw = databases
    with raw.write() as connection:
        connection.exec_driver_sql("DROP TABLE raw_chats")
    with served(database, PEOPLE, raw=raw) as address:
        assert "[NAME_1]" in signed_in(address, "ada").get("/").text
