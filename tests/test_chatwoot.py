"""examples/chatwoot.py between chatflow and a stand-in of Chatwoot: conversations in, notes out."""

import contextlib
import hashlib
import hmac
import http.client
import importlib.util
import json
import os
import runpy
import sqlite3
import sys
import threading
import time

import pytest
import requests
from conftest import ANALYSIS, ANGRY, APOLOGY, DRAFT, ROOT, RULES, SECRET, chat, read
from fakes import Loopback
from fakes.hook import Answer, Hook

from chatflow.options import Options
from chatflow.running import publishing
from chatflow.running.emulator import HOST_VARIABLE, make_topics
from chatflow.running.launch import execute
from chatflow.sinks.webhooks import keys_of, signed

RELAY = str(ROOT / "examples" / "chatwoot.py")
DESK_SECRET = "pbnR1XyzY5TtaW8XpNJ4cCXV"


class Chatwoot(Hook):
    """Keeps notes of conversations 1 to 9; `faults` are what the next requests get instead.

    Attributes:
      hook: where its own webhooks go, if anywhere.
      answers: status and text of what they were answered.
    """

    def __init__(self):
        super().__init__(self.note)
        self.faults, self.private = [], True
        self.hook, self.answers = "", []

    def note(self, got, _):
        if got.headers.get("api_access_token") != "t0ken":
            return Answer(401, '{"errors": ["You need to sign in"]}')
        start, number, end = got.path.rpartition("/conversations/")[0], *got.path.split("/")[-2:]
        if (start, end) != ("/api/v1/accounts/5", "messages") or len(number) > 1:
            return Answer(404, '{"error": "Resource could not be found"}')
        if self.faults:
            return self.faults.pop(0)
        if self.hook:  # it may come before the answer does
            note = {**got.record, "private": self.private, "sender": USER}
            self.say(int(number), note.pop("content"), **note)
        return Answer(200, json.dumps({"id": 1, "private": self.private}))

    def say(self, conversation, content, **fields):
        """Sends the webhook of a message, by default a customer's."""
        self.tell({**created(conversation, content), "id": len(self.answers) + 100, **fields})

    def tell(self, payload):
        answer = deliver(self.hook, payload)
        self.answers.append((answer.status_code, answer.text))

    def notes(self):
        return {got.path.split("/")[-2]: got.record["content"] for got in self.received}


USER = {"id": 2, "name": "Dana", "email": "dana@example.com", "type": "user"}


def created(conversation, content):
    """A webhook of a message, as version 4 sends it."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    return {
        "event": "message_created", "id": 100, "content": content, "message_type": "incoming",
        "content_type": "text", "content_attributes": {}, "created_at": at, "private": False,
        "source_id": None, "account": {"id": 5, "name": "Shop"},
        "sender": {"id": 3, "name": "Ann", "account": {"id": 5, "name": "Shop"}},
        "inbox": {"id": 1, "name": "Website"},
        "conversation": {
            "id": conversation, "inbox_id": 1, "status": "open", "channel": "Channel::WebWidget",
            "messages": [{"id": 100, "content": content, "message_type": 0, "account_id": 5}],
        },
    }  # fmt: skip


def status(conversation, status, event="conversation_status_changed"):
    """A webhook of a conversation's new status."""
    return {
        "event": event, "id": conversation, "inbox_id": 1, "status": status,
        "channel": "Channel::WebWidget", "can_reply": True, "labels": [], "priority": None,
        "messages": [{"id": 100, "content": "Late!", "message_type": 0, "account_id": 5}],
        "changed_attributes": [{"status": {"previous_value": "open", "current_value": status}}],
    }  # fmt: skip


def deliver(hook, payload, at=0, secret=DESK_SECRET, **headers):
    """Posts a webhook as Chatwoot's lib/webhooks/trigger.rb does."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    seconds = str(int(time.time()) + at)
    made = hmac.new(secret.encode(), f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    sent = {
        "Content-Type": "application/json", "X-Chatwoot-Delivery": "d", **headers,
        "X-Chatwoot-Timestamp": seconds, "X-Chatwoot-Signature": f"sha256={made}",
    }  # fmt: skip
    return requests.post(hook, data=body, headers=sent, timeout=30)


@pytest.fixture
def chatwoot():
    with Chatwoot() as chatwoot:
        yield chatwoot


@pytest.fixture
def relay(tmp_path, monkeypatch):
    """Starts the relay; returns its address."""
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    spec = importlib.util.spec_from_file_location("chatwoot", RELAY)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "PAUSE", {"Retry-After": "0.1"})

    @contextlib.contextmanager
    def start(address, token="t0ken", topic="", secrets=(DESK_SECRET,)):
        account, keys = f"{address}/api/v1/accounts/5", keys_of(SECRET)
        with example.Relay(0, account, token, keys, tmp_path / "noted.sqlite3") as relay:
            if topic:
                spool = tmp_path / "spool.sqlite3"
                relay.forwarder = example.Forwarder(topic, 5, [*secrets], spool)
            threading.Thread(target=relay.serve_forever, args=(0.05,), daemon=True).start()
            yield f"http://127.0.0.1:{relay.server_port}/"
            relay.shutdown()
            relay.noted.close()
        if topic:
            assert not relay.forwarder.is_alive()
            relay.forwarder.spool.close()

    start.example = example
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
        assert "chat_id 'x' is not a conversation of Chatwoot" in payloads["x"]
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
        "⚑ This customer seems angry. There is no draft, because what it wrote was about something "
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


# Chatwoot's webhooks.

NOWHERE = "projects/p/topics/nowhere"
"""A topic to which nothing is published."""


@pytest.mark.slow
def test_a_conversation_comes_in_and_its_draft_is_a_note(chatwoot, relay, pubsub, script):
    """From webhook to topic, pipeline, draft and note; the note's own webhook goes no further."""
    with relay(chatwoot.address, topic=pubsub.topic("events")) as address:
        chatwoot.hook = f"{address}chatwoot"
        options = pubsub.options(
            model=script(ANGRY, APOLOGY), drafts=address, webhook_secret="env:HOOK_SECRET"
        )
        with pubsub.inbox() as inbox, pubsub.pipeline(options) as run:
            chatwoot.tell(status(7, "open", "conversation_created"))
            chatwoot.say(7, "Where is my parcel? It is late!")
            chatwoot.say(7, "Ann was assigned to Dana", message_type="activity", sender=None)
            chatwoot.say(7, "She is right", message_type="outgoing", private=True, sender=USER)
            chatwoot.say(7, "Let me look.", message_type="outgoing", sender=USER)
            chatwoot.say(7, "Where is it?", event="message_updated")
            chatwoot.say(7, "Again nobody answers!")
            chatwoot.say(8, "Hello?")
            chatwoot.tell(status(7, "resolved"))
            assert chatwoot.wait(lambda received: len(received) == 1)
            chatwoot.say(7, "Still nothing!")  # it is open again
            chatwoot.tell(status(7, "resolved"))
            assert chatwoot.wait(lambda received: len(received) == 2)
    note = "Draft of an apology, for review. It was not sent:\n\n" + APOLOGY["answer"]
    assert chatwoot.notes() == {"7": note, "8": note}  # 8 when the stream was drained
    assert [got.record["private"] for got in chatwoot.received] == [True] * 3
    kept, left_out = (200, "kept"), (200, "left out: message_created")
    assert chatwoot.answers[:9] == [
        (200, "left out: conversation_created"), kept, left_out, left_out, kept,
        (200, "left out: message_updated"), kept, kept, kept,
    ]  # fmt: skip
    assert sorted(chatwoot.answers[9:]) == [kept] * 2 + [left_out] * 3  # these are the notes'
    counts = run.summary.to_dict()
    assert (run.summary.get("messages_read"), run.summary.get("closes_read")) == (5, 2)
    assert counts["lost"] == 0
    assert {a["user_id"] for a in inbox.analyses} == {"contact-3"}
    assert inbox.dead_letters == []


def pulled(pubsub, count):
    """The first messages of the topic, in order; they are acknowledged."""
    found, where = [], pubsub.subscription("events")
    while len(found) < count:
        got = pubsub.subscriber.pull(subscription=where, max_messages=100, timeout=30)
        found += [each.message for each in got.received_messages]
        ids = [each.ack_id for each in got.received_messages]
        pubsub.subscriber.acknowledge(subscription=where, ack_ids=ids)
    return found


def test_what_is_published(chatwoot, relay, pubsub):
    with relay(chatwoot.address, topic=pubsub.topic("events")) as address:
        payload = created(7, "It is <b>late</b>, ça va?")
        assert deliver(f"{address}chatwoot", payload).text == "kept"
        bot = {**payload, "id": 101, "message_type": "outgoing", "sender": {"type": "agent_bot"}}
        assert deliver(f"{address}chatwoot/", bot).text == "kept"
        resolved = status(7, "resolved", "conversation_resolved")  # an agent bot's
        assert deliver(f"{address}chatwoot", resolved).text == "kept"
        messages = pulled(pubsub, 3)
    customer, bot, closed = (json.loads(message.data) for message in messages)
    attributes = {"channel": "Channel::WebWidget", "inbox": "Website"}
    assert customer == {
        "chat_id": "7", "message_id": 100, "user_id": "contact-3", "role": "incoming",
        "text": "It is <b>late</b>, ça va?", "sent_at": payload["created_at"],
        "attributes": attributes,
    }  # fmt: skip
    assert (bot["role"], bot["message_id"]) == ("bot", 101)
    assert closed == {"chat_id": "7", "event": "closed"}
    assert [(m.ordering_key, dict(m.attributes)) for m in messages] == [("7", {})] * 3


def test_what_pubsub_does_not_take_waits_in_the_spool(chatwoot, relay, pubsub, monkeypatch):
    """Also while the program is started again; then all of it is published, in order."""
    monkeypatch.setattr(publishing, "GIVE_UP_SECONDS", 0.5)
    there = os.environ[HOST_VARIABLE]
    with Loopback() as gone:
        pass
    monkeypatch.setenv(HOST_VARIABLE, gone.address.removeprefix("http://"))
    with relay(chatwoot.address, topic=pubsub.topic("events")) as address:
        for number in range(150):
            payload = {**created(7, f"{number}"), "id": number + 1}
            assert deliver(f"{address}chatwoot", payload).text == "kept"
    monkeypatch.setenv(HOST_VARIABLE, there)
    with relay(chatwoot.address, topic=pubsub.topic("events")) as address:
        assert deliver(f"{address}chatwoot", status(7, "resolved")).text == "kept"
        events = [json.loads(message.data) for message in pulled(pubsub, 151)]
    assert [event.get("text") for event in events] == [*map(str, range(150)), None]
    assert events[-1]["event"] == "closed"


def test_a_topic_that_is_made_later_gets_what_waits(chatwoot, relay, pubsub, monkeypatch):
    monkeypatch.setattr(publishing, "GIVE_UP_SECONDS", 0.5)
    topic = pubsub.topic("later")
    failed, made = threading.Event(), threading.Event()
    example = relay.example
    publish = example.send

    def send_or_wait(lines, topic):
        """Fails without a topic, and then waits until it has a subscription, too."""
        if failed.is_set():
            made.wait(60)
        try:
            return publish(lines, topic)
        except Exception:
            failed.set()
            raise

    monkeypatch.setattr(example, "send", send_or_wait)
    with relay(chatwoot.address, topic=topic) as address:
        assert deliver(f"{address}chatwoot", created(7, "Late!")).text == "kept"
        assert failed.wait(60)
        make_topics([topic])
        made.set()
        got = pubsub.subscriber.pull(
            subscription=pubsub.subscription("later"), max_messages=1, timeout=60
        )
    assert [json.loads(each.message.data)["text"] for each in got.received_messages] == ["Late!"]


def test_webhooks_that_are_not_chatwoots(chatwoot, relay):
    late = created(7, "Late!")
    with relay(chatwoot.address, topic=NOWHERE, secrets=("x" * 16, DESK_SECRET)) as address:
        hook = f"{address}chatwoot"
        note = {**late, "private": True}
        assert deliver(hook, note).status_code == 200
        assert deliver(hook, note, secret="x" * 16).status_code == 200
        assert deliver(hook, note, secret="y" * 16).status_code == 401
        assert deliver(hook, late, at=-302).status_code == 401
        assert deliver(hook, late, at=302).status_code == 401
        assert deliver(f"{hook}?secret={DESK_SECRET}", late, secret="y").status_code == 401
        wrong = {"X-Chatwoot-Timestamp": str(int(time.time())), "X-Chatwoot-Signature": "é"}
        assert requests.post(hook, json=late, headers=wrong, timeout=30).status_code == 401
        assert requests.post(hook, json=late, timeout=30).status_code == 401
        assert send(hook, DRAFT).status_code == 401  # chatflow's come elsewhere
        assert deliver(address, late).status_code == 401


def test_an_old_chatwoot_has_the_secret_in_its_address(chatwoot, relay, capfd):
    note = {**created(7, "A difficult one"), "private": True}
    with relay(chatwoot.address, topic=NOWHERE) as address:
        hook = f"{address}chatwoot?secret="
        assert requests.post(hook + DESK_SECRET, json=note, timeout=30).status_code == 200
        for wrong in ("", "x", DESK_SECRET[:-1], DESK_SECRET + "x", "%ff"):
            assert requests.post(hook + wrong, json=note, timeout=30).status_code == 401
    said = capfd.readouterr()
    assert DESK_SECRET[:-1] not in said.err + said.out
    assert '"POST /chatwoot?… HTTP/1.1" 200' in said.err


@pytest.mark.parametrize(
    ("payload", "code", "said"),
    [
        (b"rubbish", 400, "not JSON"),
        (b"\xff", 400, "not UTF-8"),
        (b"[]", 400, "not an object"),
        (b"[" * 100_000, 400, "not JSON"),
        ({}, 422, "it has no event"),
        ({"event": 7}, 422, "it has no event"),
        (chat("Late!").to_json().encode(), 422, "it has no event"),
        ({**created("../1", "Late!")}, 422, "no conversation number"),
        ({**created(7, "Late!"), "conversation": {}}, 422, "no conversation number"),
        ({**created(7, "Late!"), "account": {"id": 6}}, 422, "account 6, not of --account 5"),
        (status(7, "open"), 200, "left out: conversation_status_changed"),
        (status(7, "snoozed"), 200, "left out: conversation_status_changed"),
        ({"event": "webwidget_triggered", "id": 1}, 200, "left out: webwidget_triggered"),
        ({"event": "contact_created", "account": {"id": 5}}, 200, "left out: contact_created"),
    ],
)
def test_what_is_no_message_and_no_closing(chatwoot, relay, payload, code, said):
    with relay(chatwoot.address, topic=NOWHERE) as address:
        answer = deliver(f"{address}chatwoot", payload)
    assert (answer.status_code, said in answer.text) == (code, True), answer.text


def test_a_note_that_was_not_kept_private_does_not_loop(chatwoot, relay):
    chatwoot.private = False
    with relay(chatwoot.address, topic=NOWHERE) as address:
        chatwoot.hook = f"{address}chatwoot"
        assert send(address, of("1")).status_code == 200
    with relay(chatwoot.address, topic=NOWHERE) as address:
        chatwoot.hook = f"{address}chatwoot"
        assert send(address, of("2", text=None, flag="ungrounded")).status_code == 200
    assert chatwoot.answers == [(200, "left out: message_created")] * 2


@pytest.mark.parametrize("path", ["/", "/chatwoot"])
@pytest.mark.parametrize(("length", "code"), [("4000001", 413), ("-1", 411), ("", 411)])
def test_a_body_is_limited(chatwoot, relay, path, length, code):
    with relay(chatwoot.address, topic=NOWHERE) as address:
        client = http.client.HTTPConnection(address.split("/")[2], timeout=30)
        client.putrequest("POST", path)
        if length:
            client.putheader("Content-Length", length)
        client.endheaders()
        answer = client.getresponse()
        answer.read()
        client.close()
    assert answer.status == code


def test_what_cannot_be_kept_is_to_be_sent_again(chatwoot, relay, tmp_path):
    with relay(chatwoot.address, topic=NOWHERE) as address:
        with contextlib.closing(sqlite3.connect(tmp_path / "spool.sqlite3")) as other:
            other.execute("DROP TABLE spool")
        answer = deliver(f"{address}chatwoot", created(7, "Late!"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (500, "0.1")


def test_without_a_topic_only_drafts_are_taken(chatwoot, relay):
    with relay(chatwoot.address) as address:
        answer = deliver(f"{address}chatwoot", created(7, "Late!"))
    assert (answer.status_code, "--topic" in answer.text) == (404, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topic=events"], "'events' is not projects/PROJECT/topics/NAME"),
        (["--topic=projects/p/topics/t"], "--chatwoot_secret=env:CHATWOOT_SECRET: there is no"),
        (["--topic=projects/p/topics/t", "--chatwoot_secret=env:SHORT"], "of at least 16"),
    ],
)
def test_what_a_topic_needs_is_said(monkeypatch, capsys, flags, said):
    monkeypatch.setenv("CHATWOOT_TOKEN", "t0ken")
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    monkeypatch.setenv("SHORT", "0123456789abcdef short")
    monkeypatch.delenv("CHATWOOT_SECRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["chatwoot.py", "--chatwoot=https://x", "--account=5", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(RELAY, run_name="__main__")
    error = capsys.readouterr().err
    assert (ended.value.code, said in error) == (2, True), error
