"""examples/chatwoot.py: drafts to private notes, from `chatflow run` to a stand-in of Chatwoot."""

import contextlib
import importlib.util
import json
import runpy
import sys
import threading
import time

import pytest
import requests
from conftest import ANALYSIS, DRAFT, ROOT, RULES, SECRET, chat, read
from fakes import Loopback
from fakes.hook import Answer, Hook

from chatflow.options import Options
from chatflow.running.launch import execute
from chatflow.sinks.webhooks import keys_of, signed

RELAY = str(ROOT / "examples" / "chatwoot.py")


class Chatwoot(Hook):
    """Keeps notes of conversations 1 to 9; `faults` are what the next requests get instead."""

    def __init__(self):
        super().__init__(self.note)
        self.faults, self.private = [], True

    def note(self, got, _):
        if got.headers.get("api_access_token") != "t0ken":
            return Answer(401, '{"errors": ["You need to sign in"]}')
        start, number, end = got.path.rpartition("/conversations/")[0], *got.path.split("/")[-2:]
        if (start, end) != ("/api/v1/accounts/5", "messages") or len(number) > 1:
            return Answer(404, '{"error": "Resource could not be found"}')
        if self.faults:
            return self.faults.pop(0)
        return Answer(200, json.dumps({"id": 1, "private": self.private}))

    def notes(self):
        return {got.path.split("/")[-2]: got.record["content"] for got in self.received}


@pytest.fixture
def chatwoot():
    with Chatwoot() as chatwoot:
        yield chatwoot


@pytest.fixture
def relay(tmp_path, monkeypatch):
    """Starts the relay; gives its address."""
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    spec = importlib.util.spec_from_file_location("chatwoot", RELAY)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "PAUSE", {"Retry-After": "0.1"})

    @contextlib.contextmanager
    def start(address, token="t0ken"):
        account, keys = f"{address}/api/v1/accounts/5", keys_of(SECRET)
        with example.Relay(0, account, token, keys, tmp_path / "noted.sqlite3") as relay:
            threading.Thread(target=relay.serve_forever, args=(0.05,), daemon=True).start()
            yield f"http://127.0.0.1:{relay.server_port}/"
            relay.shutdown()
            relay.noted.close()

    return start


def send(address, record, at=0, secret=SECRET, **headers):
    body = record.to_json().encode()
    made = signed(keys_of(secret), "id", int(time.time()) + at, body)
    return requests.post(address, data=body, headers=made | headers, timeout=30)


def of(number, **fields):
    return DRAFT.model_copy(update={"chat_id": number, "draft_id": f"d{number}", **fields})


@pytest.mark.slow
def test_drafts_are_private_notes(chatwoot, relay, lines, script, tmp_path):
    """A flagged one says why; one of no conversation is a dead letter; each is noted once."""
    source = lines(*(chat("It is late.", chat_id=c) for c in ("1", "chatwoot-2", "3", "77", "x")))
    flagged = {"chat_id": "3", "task": "apology", "answer": "We are sorry about the unicorn. " * 2}
    chatwoot.faults = [Answer(500), Answer(429, "", {"Retry-After": "0.2"}), "reset"]

    def run(address, output):
        options = Options(
            input=source, output=f"{tmp_path}/{output}", model=script(flagged, *RULES),
            drafts=f"{address},{tmp_path}/{output}/drafts", webhook_secret="env:HOOK_SECRET",
        )  # fmt: skip
        return execute(options, []).to_dict()

    with relay(chatwoot.address) as address:
        counts = run(address, "first")
        assert counts["dead_letters_by_reason"] == {
            "write/webhook_http_404": 1, "write/webhook_http_422": 1
        }  # fmt: skip
        assert (counts["lost"], len(read(tmp_path / "first", "drafts"))) == (0, 5)
        payloads = {
            json.loads(letter["payload"])["chat_id"]: letter["error"]
            for letter in read(tmp_path / "first", "dead_letters")
        }
        assert "Chatwoot answered 404" in payloads["77"]
        assert "chat_id 'x' is no conversation of Chatwoot" in payloads["x"]
        assert set(chatwoot.notes()) == {"1", "2", "3", "77"}
        said = "Draft of an apology, for review. It was not sent:\n\nWe are sorry that it is late."
        assert chatwoot.notes()["1"] == said
        for got in chatwoot.received:
            assert (got.record["private"], got.record["message_type"]) == (True, "outgoing")
        sent = len(chatwoot.received)
        assert sent == 3 + 4
        run(address, "second")
        assert len(chatwoot.received) == sent + 1  # 77 again
    with relay(chatwoot.address) as address:
        run(address, "third")
        assert len(chatwoot.received) == sent + 2


def test_a_flagged_draft_says_that_a_person_has_to_write(chatwoot, relay):
    with relay(chatwoot.address) as address:
        assert send(address, of("4", text=None, flag="ungrounded")).status_code == 200
    assert chatwoot.notes()["4"] == (
        "⚑ This customer seems angry. There is no draft, for what it wrote was about something "
        "else: please write yourself."
    )


def test_what_is_not_taken(chatwoot, relay):
    other = "whsec_" + "b" * 40
    with relay(chatwoot.address) as address:
        assert send(address, DRAFT, at=-301).status_code == 401
        assert send(address, DRAFT, at=302).status_code == 401
        assert send(address, DRAFT, secret=other).status_code == 401
        assert send(address, DRAFT, **{"webhook-id": "another"}).status_code == 401
        assert send(address, DRAFT, **{"webhook-timestamp": "9" * 5000}).status_code == 401
        assert requests.post(address, data=b"{}", timeout=30).status_code == 401
        assert send(address, ANALYSIS).status_code == 422
        assert send(address, of("../../1")).status_code == 422
    assert chatwoot.received == []


def test_chatwoots_failures_are_tried_again_by_chatflow(chatwoot, relay):
    chatwoot.faults = [Answer(503), Answer(429, "", {"Retry-After": "7"}), Answer(422, "no")]
    with relay(chatwoot.address) as address:
        answers = [send(address, of("1")) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [503, 429, 422, 200]
        assert [answer.headers.get("Retry-After") for answer in answers[:2]] == ["0.1", "7"]
    with relay(chatwoot.address, token="wrong") as address:
        answer = send(address, of("2"))
        assert (answer.status_code, "You need to sign in" in answer.text) == (401, True)
    with Loopback() as gone:
        pass
    with relay(gone.address) as address:
        assert send(address, of("3")).status_code == 502


def test_nothing_more_is_written_where_a_note_was_not_kept_private(chatwoot, relay):
    chatwoot.private = False
    with relay(chatwoot.address) as address:
        assert send(address, of("1")).status_code == 200
        assert send(address, of("2")).status_code == 503
        assert send(address, of("1")).text == "noted before"
    assert len(chatwoot.received) == 1


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.delenv("CHATWOOT_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["chatwoot.py", "--chatwoot=https://x", "--account=5"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(RELAY, run_name="__main__")
    assert (ended.value.code, "'CHATWOOT_TOKEN' is missing" in capsys.readouterr().err) == (2, True)
