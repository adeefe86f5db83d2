"""The tours of examples/ (own_stage, own_sink, own_model): each runs on the samples."""

import email
import email.policy
import json
import runpy
import sys

import pytest
from conftest import DRAFT, ROOT, SAMPLES, chat, read

from chatflow import AnalysisPrompt, Answer, Failure, ModelSpec, load_folder

EXAMPLES = ROOT / "examples"
CHATS = [json.loads(line) for line in SAMPLES.read_text().splitlines()]

pytestmark = pytest.mark.slow


@pytest.fixture
def tour(tmp_path, monkeypatch):
    """Runs an example into a folder; returns its names."""

    def run(name):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def test_own_stage(tour, tmp_path):
    tour("own_stage")
    waits, letters = read(tmp_path, "waits"), read(tmp_path, "dead_letters")
    timed = {c["chat_id"] for c in CHATS if all("sent_at" in m for m in c["messages"])}
    assert {"chat_id": "pizza-late", "seconds": 37.0} in waits
    assert {wait["chat_id"] for wait in waits} <= timed
    assert {letter["chat_id"] for letter in letters} == {c["chat_id"] for c in CHATS} - timed
    assert {(letter["stage"], letter["reason"]) for letter in letters} == {("wait", "no_time")}


def test_own_sink(tour, tmp_path):
    names = tour("own_sink")
    mails = [
        email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
        for path in (tmp_path / "mails").iterdir()
    ]
    assert len(mails) == 53  # one chat has two customers
    (mail,) = (m for m in mails if m["Subject"] == "Chat pizza-late: a draft")
    assert mail.get_content().startswith("We are sorry")
    assert read(tmp_path, "dead_letters") == []

    flagged = DRAFT.model_copy(update={"text": None, "flag": "no_evidence", "draft_id": "d2"})
    for draft in (DRAFT, DRAFT, flagged):
        assert list(names["write_mail"](str(tmp_path / "again"), draft)) == [draft]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["d1.eml", "d2.eml"]
    assert "no_evidence" in (tmp_path / "again" / "d2.eml").read_text()


def test_own_sink_loses_no_draft_that_it_cannot_write(tour, tmp_path):
    (tmp_path / "mails").write_text("a file, where the folder is to be")
    tour("own_sink")
    letters = read(tmp_path, "dead_letters")
    assert len(letters) == 53
    assert {letter["stage"] for letter in letters} == {"write"}


def test_own_model(tour, tmp_path):
    names = tour("own_model")
    tones = {a["chat_id"]: (a["sentiment"], a["model"]) for a in read(tmp_path, "analyses")}
    assert len(tones) == 52
    assert tones["pizza-late"] == (-1, "words")
    assert tones["gym-hours"][0] == 0
    assert tones["fibre-installed"][0] == 1
    assert read(tmp_path, "dead_letters") == []

    prompt = AnalysisPrompt(load_folder("instruct")["analysis"], ModelSpec("scripted:words"))
    spoken, silent = (prompt.question(chat("Thank you!"), user).request for user in ("c", "d"))
    first, second = names["WordsModel"]().answer([spoken, silent])
    assert isinstance(first, Answer)
    assert json.loads(first.text) == {"sentiment": 1, "summary": "Thank you!"}
    assert isinstance(second, Failure)
