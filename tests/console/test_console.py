"""The console by HTTP: decisions, who may do what, and what is refused."""

import ipaddress
import json
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import httpx
import pytest
import sqlalchemy as sa
from conftest import mistake
from consoles import Visitor, angry_chat, decided_in, served, write

from chatflow.cli import main
from chatflow.commands.console import listen
from chatflow.console import dashboard, decisions, outbox, people
from chatflow.console.outbox import Publisher, ReplyFile
from chatflow.console.people import People
from chatflow.database import connections as connect
from chatflow.database import tables
from chatflow.errors import UsageError
from chatflow.records import DeadLetter, Message, Reply, Sentiment
from chatflow.running.console import console_beside
from chatflow.sinks import pubsub as publishing


def rows(database, table, *columns):
    with database.read() as connection:
        found = connection.execute(sa.select(table)).mappings().all()
    return [tuple(row[name] for name in columns) for row in found]


def statuses(database):
    return dict(rows(database, tables.drafts, "draft_id", "status"))


def actions(database):
    return rows(database, tables.history, "who", "action")


# What people decide.


def test_an_approved_draft_is_sent_once_and_says_who_approved_it(database, tmp_path):
    write(database, *angry_chat(1))
    path = tmp_path / "replies.jsonl"
    with served(database, replies=ReplyFile(str(path)), undo_seconds=0) as address:
        answer = Visitor(address).decide("d1r0", "approve", text="We are really sorry.\r\nBye")
        assert answer.status_code == 303
        assert decided_in(answer) == "d1r0"
        wait_for(lambda: rows(database, tables.outbox, "published_at")[0][0])
    (reply,) = map(Reply.model_validate_json, path.read_text().splitlines())
    assert (reply.text, reply.edited, reply.approved_by) == (
        "We are really sorry.\nBye", True, "ada",
    )  # fmt: skip
    assert (reply.chat_id, reply.user_id, reply.draft_id) == ("chat-1", "customer-1", "d1r0")
    assert statuses(database) == {"d1r0": "approved"}
    assert actions(database) == [("ada", "approved")]
    ((distance, seen),) = rows(database, tables.drafts, "edit_distance", "seen")
    assert 0 < distance < 1
    assert seen["messages"][0]["text"] == "My food is late!"


def wait_for(condition, seconds=20):
    """Waits for another thread; it looks often."""
    happened = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        happened.wait(0.05)
    pytest.fail(f"did not happen in {seconds} s")


def test_an_unchanged_draft_is_not_edited(sqlite):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        Visitor(address).decide("d1r0", "approve", text="We are sorry, customer-1.")
    ((distance, text),) = rows(sqlite, tables.drafts, "edit_distance", "edited_text")
    assert (distance, text) == (0, None)
    ((reply,),) = rows(sqlite, tables.outbox, "reply")
    assert reply["edited"] is False


def test_a_flagged_draft_is_written_by_a_person(sqlite):
    write(sqlite, *angry_chat(1, flag="ungrounded"))
    with served(sqlite) as address:
        visitor = Visitor(address)
        assert "write the reply yourself" in visitor.get("/drafts/d1r0").text
        empty = visitor.decide("d1r0", "approve", text=" \n")
        assert (empty.status_code, "Write a reply before you approve." in empty.text) == (409, True)
        visitor.decide("d1r0", "approve", text="We are so sorry.")
    ((status, distance),) = rows(sqlite, tables.drafts, "status", "edit_distance")
    assert (status, distance) == ("approved", None)


def test_dismissing_needs_a_reason(sqlite):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        visitor = Visitor(address)
        assert visitor.decide("d1r0", "dismiss", reason="because").status_code == 409
        visitor.decide("d1r0", "dismiss", reason="bad_draft", comment="It is about tea.")
        assert "Draft not usable" in visitor.get("/drafts/d1r0").text
    assert rows(sqlite, tables.history, "action", "reason", "comment") == [
        ("dismissed", "bad_draft", "It is about tea.")
    ]
    assert rows(sqlite, tables.outbox, "draft_id") == []


@pytest.mark.parametrize("action", ["approve", "dismiss"])
def test_a_decision_can_be_undone(database, action):
    write(database, *angry_chat(1))
    with served(database) as address:
        visitor = Visitor(address)
        visitor.decide("d1r0", action, text="Sorry!", reason="other")
        assert visitor.decide("d1r0", "undo").status_code == 303
    assert statuses(database) == {"d1r0": "waiting"}
    assert rows(database, tables.outbox, "draft_id") == []
    done = {"approve": "approved", "dismiss": "dismissed"}[action]
    assert actions(database) == [("ada", done), ("ada", "undone")]


def test_a_reply_that_was_sent_cannot_be_undone(sqlite, tmp_path):
    write(sqlite, *angry_chat(1))
    publisher = Publisher(sqlite, ReplyFile(str(tmp_path / "replies.jsonl")))
    with served(sqlite, undo_seconds=0) as address:
        visitor = Visitor(address)
        visitor.decide("d1r0", "approve", text="Sorry!")
        form = visitor.form("/drafts/d1r0")
        assert publisher.publish() == 1
        answer = visitor.post("/drafts/d1r0/undo", form)
        assert answer.status_code == 409
        assert "too late to undo" in answer.text
    assert statuses(sqlite) == {"d1r0": "approved"}


def test_what_is_undone_after_the_customer_wrote_again_is_superseded(database):
    write(database, *angry_chat(1))
    with served(database) as address:
        visitor = Visitor(address)
        visitor.decide("d1r0", "dismiss", reason="other")
        write(database, *angry_chat(1, revision=1)[:2])
        visitor.decide("d1r0", "undo")
    assert statuses(database) == {"d1r0": "superseded"}


def test_an_edit_is_kept_for_others(sqlite):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        Visitor(address).decide("d1r0", "save", text="Half a")
        page = Visitor(address).get("/drafts/d1r0").text
    assert ">Half a</textarea>" in page
    assert "Original draft" in page
    assert rows(sqlite, tables.history, "action", "text") == [("edited", "Half a")]


def test_of_many_who_approve_the_same_draft_one_does(database, tmp_path):
    write(database, *angry_chat(1))
    path = tmp_path / "replies.jsonl"
    with served(database, replies=ReplyFile(str(path)), undo_seconds=0) as address:
        visitors = [Visitor(address) for _ in range(8)]
        forms = [visitor.form("/drafts/d1r0") for visitor in visitors]
        answers = []

        def approve(number):
            text = f"Sorry, says {number}."
            answers.append(
                visitors[number].post("/drafts/d1r0/approve", forms[number] | {"text": text})
            )

        threads = [threading.Thread(target=approve, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: rows(database, tables.outbox, "published_at")[0][0])
    assert sorted(answer.status_code for answer in answers) == [303] + [409] * 7
    assert all("was approved by ada" in a.text for a in answers if a.status_code == 409)
    # And what the others had typed is still there.
    assert all("Sorry, says" in a.text for a in answers if a.status_code == 409)
    assert len(path.read_text().splitlines()) == 1
    assert actions(database) == [("ada", "approved")]


CHANGES = {
    "somebody edited it": (
        lambda database, visitor: visitor.decide("d1r0", "save", text="Other"),
        "Somebody changed this draft",
    ),
    "the customer wrote": (
        lambda database, _: write(database, angry_chat(1, revision=1)[0]),
        "There are new messages",
    ),
    "the customer wrote in a chat without revisions": (
        lambda database, _: write(
            database, angry_chat(1, revision=1)[0].model_copy(update={"revision": 0})
        ),
        "There are new messages",
    ),
    "the model wrote something else": (
        lambda database, _: write(
            database, angry_chat(1, text="Other.")[2].model_copy(update={"text": "Hm."})
        ),
        "Somebody changed this draft",
    ),
    "a newer analysis": (
        lambda database, _: write(database, angry_chat(1, revision=1)[1]),
        "The customer wrote again",
    ),
    "somebody dismissed it": (
        lambda database, visitor: visitor.decide("d1r0", "dismiss", reason="other"),
        "was dismissed by ada",
    ),
}


def test_a_draft_that_came_after_all_comes_before_what_a_person_writes(sqlite):
    chat, analysis, draft = angry_chat(1)
    failed = {"draft_id": "failed", "text": None, "flag": "failed"}
    write(sqlite, chat, analysis, draft.model_copy(update=failed))
    with served(sqlite) as address:
        visitor = Visitor(address)
        page = visitor.get("/drafts/failed").text
        assert "something went wrong" in page
        assert "Draft by" not in page
        form = visitor.form("/drafts/failed") | {"text": "My words."}
        write(sqlite, draft)
        answer = visitor.post("/drafts/failed/approve", form)
        assert answer.status_code == 409
        assert "There is a newer draft" in answer.text
        assert 'href="/drafts/d1r0"' in answer.text
        assert "My words." in answer.text


def test_a_comment_that_comes_too_late_is_shown(sqlite):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        visitor = Visitor(address)
        form = visitor.form("/drafts/d1r0") | {"reason": "bad_draft", "comment": "It is of tea."}
        write(sqlite, angry_chat(1, revision=1)[0])
        answer = visitor.post("/drafts/d1r0/dismiss", form)
        assert (answer.status_code, 'value="It is of tea."' in answer.text) == (409, True)
        assert '<option value="bad_draft" selected>' in answer.text
        write(sqlite, angry_chat(1, revision=1)[1])
        answer = visitor.post("/drafts/d1r0/dismiss", form)
        assert (answer.status_code, "It is of tea." in answer.text) == (409, True)


@pytest.mark.parametrize("name", CHANGES)
def test_nobody_approves_what_they_have_not_seen(sqlite, name):
    change, said = CHANGES[name]
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        visitor = Visitor(address)
        form = visitor.form("/drafts/d1r0")
        change(sqlite, Visitor(address))
        answer = visitor.post("/drafts/d1r0/approve", form | {"text": "My words."})
    assert answer.status_code == 409
    assert said in answer.text
    assert "My words." in answer.text
    assert rows(sqlite, tables.outbox, "draft_id") == []


# The outbox.


def approved(database, count):
    for number in range(count):
        write(database, *angry_chat(number))
    with served(database, undo_seconds=0) as address:
        visitor = Visitor(address)
        for number in range(count):
            visitor.decide(f"d{number}r0", "approve", text=f"Sorry, {number}.")


def test_a_publisher_that_is_killed_between_commit_and_publish_loses_and_doubles_nothing(
    database, tmp_path, monkeypatch
):
    """Killed before it publishes, in the middle of it, and before it notes that it has."""
    approved(database, 3)
    path = tmp_path / "replies.jsonl"

    class Killed(BaseException):
        pass

    class Killing(ReplyFile):
        def __init__(self, before, after):
            super().__init__(str(path))
            self.before, self.after = before, after

        def send(self, replies, seconds):
            if replies and self.before:
                raise Killed
            super().send(replies, seconds)
            if replies and self.after:
                raise Killed

    monkeypatch.setattr(outbox, "LEASE_SECONDS", 0.0)
    for replies in (Killing(True, False), Killing(False, True)):
        with pytest.raises(Killed):
            Publisher(database, replies).publish()
    with path.open("ab") as file:
        file.write(b'{"reply_id": "cut o')  # a process that was killed while it wrote
    publisher = Publisher(database, ReplyFile(str(path)))
    while publisher.publish():
        pass
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(reply["text"] for reply in found) == ["Sorry, 0.", "Sorry, 1.", "Sorry, 2."]
    assert all(at for (at,) in rows(database, tables.outbox, "published_at"))


@pytest.mark.slow
def test_several_publishers_send_each_reply_once(database, tmp_path):
    approved(database, 20)
    sent = []

    class Kept:
        def send(self, replies, seconds):
            sent.extend(reply.draft_id for reply in replies)

    publishers = [Publisher(database, Kept()) for _ in range(4)]
    threads = [threading.Thread(target=publisher.publish) for publisher in publishers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for publisher in publishers:
        publisher.publish()
    assert sorted(sent) == sorted(f"d{number}r0" for number in range(20))


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_a_console_whose_clock_is_fast_takes_no_others_replies(database, monkeypatch):
    class Killed(BaseException):
        pass

    class Killing:
        def send(self, replies, seconds):
            raise Killed

    approved(database, 1)
    with pytest.raises(Killed):
        Publisher(database, Killing()).publish()
    fast = datetime.now(UTC) + timedelta(hours=1)
    for module in (outbox, decisions, connect):
        monkeypatch.setattr(module, "now", lambda: fast)
    assert Publisher(database, Killing()).publish() == 0
    write(database, *angry_chat(1))
    with served(database, undo_seconds=0) as address:
        Visitor(address).decide("d1r0", "approve", text="Sorry!")
    with pytest.raises(Killed):  # it is due at once all the same
        Publisher(database, Killing()).publish()


def test_a_place_that_takes_no_replies_is_tried_again_and_shown(sqlite):
    approved(sqlite, 1)

    class Away:
        def send(self, replies, seconds):
            raise ConnectionError("the topic is away")

    with pytest.raises(ConnectionError):
        Publisher(sqlite, Away()).publish()
    with served(sqlite) as address:
        visitor = Visitor(address)
        assert "Replies are not sent: the topic is away" in visitor.get("/dashboard").text
        assert "not sent yet: the topic is away" in visitor.get("/drafts/d0r0").text
    sent = []

    class Back:
        def send(self, replies, seconds):
            sent.extend(replies)

    assert Publisher(sqlite, Back()).publish() == 1
    assert [reply.text for reply in sent] == ["Sorry, 0."]


def test_a_reply_is_not_sent_again_because_the_database_was_away(sqlite, monkeypatch):
    approved(sqlite, 1)
    sent, faults = [], iter([sa.exc.OperationalError("UPDATE", {}, Exception("away"))] * 2)
    write_to = sqlite.write

    def away():
        if sent and (fault := next(faults, None)):
            raise fault
        return write_to()

    class Kept:
        def send(self, replies, seconds):
            sent.extend(replies)

    monkeypatch.setattr(outbox, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(sqlite, "write", away)
    publisher = Publisher(sqlite, Kept())
    assert (publisher.publish(), publisher.publish(), len(sent)) == (1, 0, 1)
    assert all(at for (at,) in rows(sqlite, tables.outbox, "published_at"))


def test_replies_go_to_a_topic(sqlite, pubsub):
    approved(sqlite, 2)
    topic = pubsub.topic("analyses")
    publisher = Publisher(sqlite, outbox.replies_to(topic))
    assert publisher.publish() == 2
    pulled = pubsub.subscriber.pull(subscription=pubsub.subscription("analyses"), max_messages=10)
    found = [message.message for message in pulled.received_messages]
    replies = [Reply.model_validate_json(message.data) for message in found]
    assert {reply.draft_id for reply in replies} == {"d0r0", "d1r0"}
    assert [m.attributes["id"] for m in found] == [reply.reply_id for reply in replies]
    assert {m.attributes["kind"] for m in found} == {"Reply"}
    assert {m.ordering_key for m in found} == {"chat-0", "chat-1"}
    assert {reply.text for reply in replies} == {"Sorry, 0.", "Sorry, 1."}


def test_what_pubsub_took_is_not_sent_again_with_what_it_did_not(sqlite, monkeypatch):
    """Three replies of two chats; one chat fails, and the client pauses it as Google's does."""
    approved(sqlite, 2)
    with sqlite.write() as connection:
        (reply,) = connection.execute(
            sa.select(tables.outbox.c.reply).where(tables.outbox.c.draft_id == "d1r0")
        ).scalars()
        more = {"draft_id": "other", "reply": {**reply, "reply_id": "other", "draft_id": "other"}}
        connection.execute(sa.insert(tables.outbox).values(**more, publish_after=datetime.now(UTC)))
    sent, paused, failing = [], set(), {"chat-1"}

    class Client:
        def publish(self, topic, data, ordering_key, timeout, **attributes):
            future = Future()
            if ordering_key in failing | paused:
                paused.add(ordering_key)
                future.set_exception(ConnectionError("the topic is away"))
            else:
                sent.append(Reply.model_validate_json(data).draft_id)
                future.set_result("1")
            return future

        def resume_publish(self, topic, key):
            if key not in paused:
                raise RuntimeError("Ordering key is not paused.")
            paused.remove(key)

    monkeypatch.setattr(publishing, "publisher", Client)
    publisher = Publisher(sqlite, outbox.ReplyTopic("projects/p/topics/t"))
    for _ in range(2):
        with pytest.raises(outbox.PartlySentError, match="the topic is away"):
            publisher.publish()
        assert sent == ["d0r0"]
    failing.clear()
    assert publisher.publish() == 2
    assert sorted(sent) == ["d0r0", "d1r0", "other"]
    assert publisher.publish() == 0


@pytest.mark.parametrize("text", ["My only notes.", '{"reply": 1}', "12\n", '{"a": '])
def test_a_file_of_something_else_is_left_as_it_is(text, tmp_path):
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(UsageError, match="has a line that is not a reply"):
        ReplyFile(str(path))
    assert path.read_text() == text


def test_a_reply_whose_line_end_an_editor_took_is_kept(sqlite, tmp_path):
    approved(sqlite, 2)
    path = tmp_path / "replies.jsonl"
    replies = [Reply(**reply) for (reply,) in rows(sqlite, tables.outbox, "reply")]
    ReplyFile(str(path)).send(replies[:1], 1)
    path.write_text(path.read_text().rstrip("\n"))
    ReplyFile(str(path)).send(replies, 1)
    assert [Reply.model_validate_json(line) for line in path.read_text().splitlines()] == replies


# Lists.


def listed(address, query=""):
    page = Visitor(address).get(f"/{query}").text
    return re.findall(r'id="draft-([^"]+)"', page)


def test_the_inbox_has_the_oldest_and_angriest_first(sqlite):
    for number, confidence in enumerate((0.5, 0.99, 0.9, 0.99)):
        write(sqlite, *angry_chat(number, confidence=confidence))
    write(sqlite, *angry_chat(36_000, confidence=0.5))  # an hour later
    with served(sqlite) as address:
        assert listed(address) == ["d1r0", "d3r0", "d2r0", "d0r0", "d36000r0"]
        assert listed(address, "?sort=oldest") == ["d0r0", "d1r0", "d2r0", "d3r0", "d36000r0"]
        assert listed(address, "?sort=newest")[0] == "d36000r0"
        assert listed(address, "?sort=angriest")[:2] == ["d1r0", "d3r0"]
        assert listed(address, "?sort=nonsense&page=-1&status=odd") == listed(address)


def test_search_and_filters(sqlite):
    write(sqlite, *angry_chat(1, text="Where is my PIZZA, ÄRGER 100%?"))
    write(sqlite, *angry_chat(2, text="The bag is lost."))
    write(sqlite, *angry_chat(3, flag="ungrounded"))
    other, *rest = angry_chat(4)
    write(sqlite, other.model_copy(update={"attributes": {"a=b": "c="}}), *rest)
    with served(sqlite) as address:
        for query, wanted in (
            ("?q=pizza", ["d1r0"]),
            ("?q=ärger", ["d1r0"]),
            ("?q=100%25", ["d1r0"]),
            ("?q=%25", ["d1r0"]),
            ("?q=summary 2", ["d2r0"]),
            ("?q=sorry, customer-2", ["d2r0"]),
            ("?q=CHAT-3", ["d3r0"]),
            ("?q=' OR 1=1", []),
            ("?kind=flag", ["d3r0"]),
            ("?kind=text", ["d1r0", "d2r0", "d4r0"]),
            ("?attribute=tenant%3Dbolt", ["d1r0", "d3r0"]),
            ("?attribute=tenant%3Dbolt&q=pizza", ["d1r0"]),
            ("?attribute=a%3Db%3Dc%3D", ["d4r0"]),
            ("?attribute=tenant", []),
            ("?status=approved", []),
        ):
            assert listed(address, query) == wanted, query


def test_pages_of_the_inbox(sqlite):
    write(sqlite, *(record for number in range(51) for record in angry_chat(number)))
    with served(sqlite) as address:
        assert len(listed(address)) == 50
        assert listed(address, "?page=1") == ["d50r0"]


@pytest.mark.slow
def test_a_draft_far_down_the_list_has_neighbours(sqlite):
    write(sqlite, *(record for number in range(1100) for record in angry_chat(number)))
    with served(sqlite) as address:
        page = Visitor(address).get("/?page=21").text
        assert 'href="/drafts/d1060r0?page=21"' in page
        page = Visitor(address).get("/drafts/d1060r0?page=21").text
    found = {rel: re.search(rf'href="([^"]+)" rel="{rel}"', page)[1] for rel in ("prev", "next")}
    assert found == {"prev": "/drafts/d1059r0?page=21", "next": "/drafts/d1061r0?page=21"}


def test_after_a_decision_comes_the_first_one(sqlite):
    write(sqlite, *(record for number in range(52) for record in angry_chat(number)))
    with served(sqlite) as address:
        visitor = Visitor(address)
        for number in (50, 51):
            form = visitor.form(f"/drafts/d{number}r0?page=1&sort=oldest") | {"text": "Sorry!"}
            answer = visitor.post(f"/drafts/d{number}r0/approve?page=1&sort=oldest", form)
            location = f"/drafts/d0r0?sort=oldest&decided=d{number}r0"
            assert answer.headers["location"] == location
        page = visitor.get("/?page=1").text
        assert "Nothing more" in page
        assert "All caught up" not in page
        # One that is not in the list leads there, too.
        found = re.search(r'href="([^"]+)" rel="next"', visitor.get("/drafts/d51r0?page=1").text)
        assert found[1] == "/drafts/d0r0?page=1"


def test_the_history_says_who_did_what(sqlite):
    write(sqlite, *angry_chat(1), *angry_chat(2))
    with served(sqlite, People("ada")) as address:
        Visitor(address).decide("d1r0", "approve", text="Sorry!")
    with served(sqlite, People("grace")) as address:
        visitor = Visitor(address)
        visitor.decide("d2r0", "dismiss", reason="already_answered")
        page = visitor.get("/history").text
        assert page.index("grace") < page.index("ada")
        assert "Already answered" in page
        assert "ada" not in visitor.get("/history?who=grace").text


def test_the_dashboards_figures(database):
    for number in range(4):
        write(database, *angry_chat(number))
    chat, analysis, _ = angry_chat(9)
    write(database, chat, analysis.model_copy(update={"sentiment": Sentiment.HAPPY}))
    write(
        database,
        DeadLetter(
            stage="read", reason="not_json", error="x", payload="x", failed_at=datetime.now(UTC)
        ),
    )
    with served(database) as address:
        visitor = Visitor(address)
        visitor.decide("d0r0", "approve", text="We are sorry, customer-0.")
        visitor.decide("d1r0", "approve", text="We are SORRY, customer-1.")
        visitor.decide("d2r0", "dismiss", reason="bad_draft")
        page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", visitor.get("/dashboard").text))
        for said in (
            "Drafts waiting 1 oldest waiting 50 min",
            "Analyses 5 of 5 chats",
            "Angry 80% 4 of 5",
            "Last message to analysis 2.0 s p95 2.0 s",
            "Approved 67% 2 approved, 1 dismissed",
            "Edited, median 10%",
            "2 not sent yet",
            "acme 100% of 2",
            "bolt 67% of 3",
            "as written 1",
            "up to 30% 1",
            "Draft not usable 1",
            "gemma p1 2 (67%) 10% 1 0",
            "read/not_json 1",
        ):
            assert said in page, said
        for period in ("week", "month", "quarter", "nonsense"):
            assert "Analyses 5" in re.sub(
                r"\s+",
                " ",
                re.sub(r"<[^>]+>", " ", visitor.get(f"/dashboard?period={period}").text),
            )


def test_of_each_customer_the_newest_analysis_counts(database):
    """Of two models, and of two revisions in whatever order they came."""
    moment = datetime.now(UTC)
    for number, (revision, sentiment) in enumerate([(0, -1), (0, 1), (2, 0), (1, -1)]):
        chat, analysis, _ = angry_chat(revision=revision)
        of_model = {"analysis_id": str(number), "sentiment": Sentiment(sentiment)}
        at = {"analysed_at": moment + timedelta(seconds=number)}
        write(database, chat, analysis.model_copy(update=of_model | at))
        with database.read() as connection:
            found = dashboard.figures(connection, "day", "tenant", moment)["by_attribute"]
        assert found == [("acme", 1, (1, 0, 0, 0)[number])]


def test_what_people_decided_is_labelled_data(sqlite, tmp_path, capsys):
    """Of the newest decision of each chat and user; as `chatflow evaluate` reads it."""
    from chatflow.evaluation.labels import read_labels

    for number in range(5):
        write(sqlite, *angry_chat(number))
    with served(sqlite) as address:
        visitor = Visitor(address)
        visitor.decide("d0r0", "approve", text="We are sorry.")
        visitor.decide("d1r0", "dismiss", reason="not_angry_neutral")
        visitor.decide("d2r0", "dismiss", reason="not_angry_happy")
        visitor.decide("d3r0", "dismiss", reason="bad_draft")
        write(sqlite, *angry_chat(0, revision=1))
        visitor.decide("d0r1", "dismiss", reason="not_angry_neutral")
        downloaded = visitor.get("/labelled.jsonl").text
    path = tmp_path / "labelled.jsonl"
    assert main(["console", "--database", sqlite.uri, "--export", str(path)]) == 0
    assert "3 labelled chats" in capsys.readouterr().out
    assert path.read_text() == downloaded
    labels = read_labels(str(path))
    assert {key: int(label.sentiment) for key, label in labels.items()} == {
        ("chat-0", "customer-0"): 0, ("chat-1", "customer-1"): 0, ("chat-2", "customer-2"): 1,
    }  # fmt: skip
    assert len(labels["chat-0", "customer-0"].chat.messages) == 3


def test_an_approved_reply_is_exported_beside_what_the_model_wrote(sqlite):
    write(sqlite, *angry_chat(0))
    with served(sqlite) as address:
        visitor = Visitor(address)
        visitor.decide("d0r0", "approve", text="Ever so sorry.")
        (line,) = visitor.get("/labelled.jsonl").text.splitlines()
    found = json.loads(line)
    assert (found["sentiment"], found["reply"], found["draft"], found["source"]) == (
        -1, "Ever so sorry.", "We are sorry, customer-0.", "console",
    )  # fmt: skip


# What is refused.


@pytest.fixture
def console(sqlite):
    write(sqlite, *angry_chat(1))
    with served(sqlite) as address:
        yield address


def test_pages_say_what_browsers_may_do_with_them(console):
    for path in ("/", "/drafts/d1r0", "/history", "/dashboard", "/static/console.js", "/nothing"):
        headers = Visitor(console).get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
    cookie = Visitor(console).get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie


def test_a_form_of_another_site_is_refused(console, sqlite):
    visitor = Visitor(console)
    form = visitor.form("/drafts/d1r0") | {"text": "Evil"}
    path = "/drafts/d1r0/approve"
    assert visitor.post(path, form | {"csrf": "0" * 64}).status_code == 403
    assert visitor.post(path, {k: v for k, v in form.items() if k != "csrf"}).status_code == 403
    assert visitor.post(path, form, Origin="https://evil.example").status_code == 403
    assert visitor.post(path, form, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert Visitor(console).post(path, form).status_code == 403  # without the cookie
    assert visitor.get(path).status_code == 405
    assert statuses(sqlite) == {"d1r0": "waiting"}
    assert visitor.post(path, form, Origin=console).status_code == 303


def test_another_name_is_refused(console):
    """As when a page of another site has its own name point to this machine (DNS rebinding)."""
    assert Visitor(console, Host="evil.example").get("/").status_code == 400
    assert Visitor(console, Host="localhost:1").get("/").status_code == 200


def test_forms_that_are_not_complete_are_refused(console):
    visitor = Visitor(console)
    form = visitor.form("/drafts/d1r0")
    assert visitor.post("/drafts/d1r0/approve", form | {"version": "x"}).status_code == 400
    assert visitor.post("/drafts/nothing/approve", form | {"text": "x"}).status_code == 404
    assert visitor.post("/drafts/d1r0/approve", form | {"text": "x" * 10_001}).status_code == 409
    assert visitor.get("/drafts/nothing").status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/drafts/%00", 400),
        ("/?q=a%00", 400),
        ("/history?who=%00", 400),
        ("/?page=" + "9" * 5000, 200),
        ("/history?page=" + "9" * 5000, 200),
        ("/drafts/a%2Fb%3F%23", 404),
        ("/?q=%ED%A0%80&attribute=nothing&decided=nothing", 200),
        ("/dashboard?attribute=nothing", 200),
    ],
)
def test_odd_addresses_are_no_errors_of_the_console(database, path, status):
    with served(database) as address:
        assert Visitor(address).get(path).status_code == status


def test_odd_forms_and_hosts_are_no_errors_of_the_console(console):
    visitor = Visitor(console)
    form = visitor.form("/drafts/d1r0") | {"text": "x"}
    path = "/drafts/d1r0/approve"
    assert visitor.post(path, form | {"csrf": "é"}).status_code == 403
    for number in ("9" * 30, "-1", "9" * 5000):
        assert visitor.post(path, form | {"version": number}).status_code == 400
    assert visitor.post(path, form | {str(i): "x" for i in range(30)}).status_code == 400
    assert visitor.post(path, form, Origin="http://[").status_code == 400
    for host in ("[", "[zz]", ""):
        assert Visitor(console, Host=host).get("/").status_code == 400


def test_an_error_of_the_console_is_guarded_too(sqlite, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("of a bug")

    monkeypatch.setattr("chatflow.console.inbox.events", fail)
    with served(sqlite) as address:
        answer = Visitor(address).get("/history")
    assert answer.status_code == 500
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "of a bug" not in answer.text


TOKENS = {name: people.new_token(name, name) for name in people.ROLES}


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.toml"
    path.write_text("".join(entry for _, entry in TOKENS.values()))
    return str(path)


def by_token(users, **fields):
    return People("", people.read_users(users), redacted=frozenset({"observer"}), **fields)


def signed_in(address, name):
    visitor = Visitor(address)
    form = visitor.form("/sign-in") | {"token": TOKENS[name][0]}
    assert visitor.post("/sign-in", form).status_code == 303
    return visitor


def test_without_signing_in_there_is_nothing(sqlite, users):
    write(sqlite, *angry_chat(1, text="Secret food"))
    with served(sqlite, by_token(users)) as address:
        visitor = Visitor(address)
        for path in ("/", "/drafts/d1r0", "/history", "/dashboard", "/labelled.jsonl"):
            answer = visitor.get(path)
            to = f"?to={quote(path, safe='')}" if path != "/" else ""
            assert (answer.status_code, answer.headers["location"]) == (303, f"/sign-in{to}")
        assert httpx.get(f"{address}/changes").status_code == 401
        form = visitor.form("/sign-in")
        assert visitor.post("/drafts/d1r0/approve", form | {"text": "x"}).status_code == 401
        wrong = visitor.post("/sign-in", form | {"token": "guess"})
        assert wrong.status_code == 403
        assert "That token isn&#39;t valid, or it has expired." in wrong.text
        assert visitor.get("/").status_code == 303


@pytest.mark.parametrize(
    ("to", "goes_to"),
    [
        ("/drafts/d1r0?q=a b", "/drafts/d1r0?q=a%20b"),
        ("", "/"),
        ("//elsewhere.example/", "/"),
        ("/\\elsewhere.example/", "/"),
        ("/\t/elsewhere.example/", "/%09/elsewhere.example/"),
        ("https://elsewhere.example/", "/"),
    ],
)
def test_signing_in_leads_to_the_console_alone(sqlite, users, to, goes_to):
    with served(sqlite, by_token(users)) as address:
        visitor = Visitor(address)
        fields = visitor.form("/sign-in") | {"token": TOKENS["lead"][0], "to": to}
        assert visitor.post("/sign-in", fields).headers["location"] == goes_to


def test_after_a_wrong_token_the_way_is_still_known(sqlite, users):
    with served(sqlite, by_token(users)) as address:
        visitor = Visitor(address)
        form = visitor.form("/sign-in") | {"to": "/drafts/d1r0?q=x"}
        page = visitor.post("/sign-in", form | {"token": "guess"}).text
        assert 'name="to" value="/drafts/d1r0?q=x"' in page
        # Who asks for the address of a form gets its page.
        location = visitor.get("/drafts/d1r0/approve?q=x").headers["location"]
        assert location == "/sign-in?to=%2Fdrafts%2Fd1r0%3Fq%3Dx"


def test_a_form_of_another_session_leads_back_to_its_page(sqlite, users):
    write(sqlite, *angry_chat(1))
    with served(sqlite, by_token(users)) as address:
        form = signed_in(address, "agent").form("/drafts/d1r0")
        visitor = signed_in(address, "agent")
        answer = visitor.post("/drafts/d1r0/approve?q=x", form | {"text": "Sorry!"})
        assert answer.status_code == 403
        assert '<a href="/drafts/d1r0?q=x">Back</a>' in answer.text


def test_signing_in_and_out(sqlite, users):
    write(sqlite, *angry_chat(1))
    with served(sqlite, by_token(users)) as address:
        visitor = signed_in(address, "agent")
        assert visitor.decide("d1r0", "approve", text="Sorry!").status_code == 303
        cookie = visitor.client.cookies["chatflow_session"]
        visitor.post("/sign-out", visitor.form("/"))
        again = httpx.get(f"{address}/", cookies={"chatflow_session": cookie})
        assert again.status_code == 401  # the cookie is worth nothing any more
        bearer = httpx.get(f"{address}/", headers={"Authorization": f"Bearer {TOKENS['lead'][0]}"})
        assert bearer.status_code == 200
    assert actions(sqlite) == [("agent", "approved")]
    assert rows(sqlite, tables.sessions, "who") == []


def test_a_new_token_ends_the_sessions_of_the_old_one(sqlite, users, tmp_path):
    with served(sqlite, by_token(users)) as address:
        cookies = dict(signed_in(address, "lead").client.cookies)
        assert httpx.get(f"{address}/", cookies=cookies).status_code == 200
    _, entry = people.new_token("lead", "lead")
    (tmp_path / "users.toml").write_text(entry)
    with served(sqlite, by_token(users)) as address:
        assert httpx.get(f"{address}/", cookies=cookies).status_code == 401


def test_probes_may_come_by_any_name(console):
    assert Visitor(console, Host="10.0.0.7:8080").get("/healthz").text == "ok\n"


@pytest.mark.slow
def test_a_console_beside_another_process_ends_with_it(sqlite):
    """Also where that process is killed."""
    with console_beside([f"--database={sqlite.uri}"], 0) as address:
        assert Visitor(address).get("/healthz").text == "ok\n"
        port = httpx.URL(address).port
    missing = console_beside(["--database=sqlite:////nowhere/x.db"], 0)
    with pytest.raises(UsageError, match="there is no folder"), missing:
        pass
    code = (
        "import sys, time; from chatflow.running.console import console_beside\n"
        f"with console_beside(['--database={sqlite.uri}'], {port}) as address:\n"
        "    print(address, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        address = process.stdout.readline().decode().strip()
        assert Visitor(address).get("/").status_code == 200
        process.kill()
    wait_for(lambda: refuses(address))


def refuses(address):
    try:
        httpx.get(address)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it is just ending
        return False
    return False


def test_roles_may_do_what_they_may(sqlite, users):
    write(sqlite, *angry_chat(1))
    with served(sqlite, by_token(users)) as address:
        observer, agent, lead = (signed_in(address, name) for name in people.ROLES)
        form = agent.form("/drafts/d1r0") | {"csrf": observer.form("/")["csrf"], "text": "x"}
        assert observer.post("/drafts/d1r0/approve", form).status_code == 403
        assert "textarea" not in observer.get("/drafts/d1r0").text
        assert agent.get("/labelled.jsonl").status_code == 403
        assert lead.get("/labelled.jsonl").status_code == 200
        assert agent.decide("d1r0", "approve", text="Sorry!").status_code == 303


def test_notes_and_what_systems_add_are_told_from_what_was_said(sqlite):
    chat, analysis, draft = angry_chat(1)
    note = Message(user_id="kim", role="agent", text="a known fraudster", private=True)
    joined = Message(user_id="desk", role="system", text="Kim joined the chat")
    mail = Message(user_id="customer-1", role="customer", text="late", original="<p>late</p>")
    image = Message(user_id="customer-1", role="customer", text="", original="[image]")
    messages = (*chat.messages, note, joined, mail, image)
    write(sqlite, chat.model_copy(update={"messages": messages}), analysis, draft)
    with served(sqlite) as address:
        page = Visitor(address).get("/drafts/d1r0").text
    assert page.count("internal note") == 1
    assert page.count('class="unsaid"') == 2
    assert page.count("Original message") == 2
    assert "&lt;p&gt;late&lt;/p&gt;" in page
    assert "(no text)" in page


def test_a_redacted_role_reads_no_texts_and_finds_none(sqlite, users):
    write(sqlite, *angry_chat(1, text="My password is hunter2"), *angry_chat(2))
    with served(sqlite, by_token(users)) as address:
        agent, observer = signed_in(address, "agent"), signed_in(address, "observer")
        agent.decide("d2r0", "save", text="An edited reply")
        agent.decide("d1r0", "dismiss", reason="other", comment="A private comment")
        pages = [
            observer.get(path).text
            for path in (
                "/",
                "/?status=dismissed",
                "/drafts/d1r0",
                "/drafts/d2r0",
                "/history",
                "/dashboard",
            )
        ]
        for text in (
            "hunter2",
            "have a look",
            "Summary",
            "We are sorry",
            "edited reply",
            "private",
        ):
            assert not any(text in page for page in pages), text
        assert "•••" in pages[0]
        # Nor does a search tell what is in them.
        assert re.findall(r'id="draft-', observer.get("/?status=dismissed&q=hunter2").text) == []
        assert re.findall(r'id="draft-', observer.get("/?status=dismissed&q=chat-1").text)


def test_a_redacted_agent_does_not_approve_what_they_cannot_read(sqlite, users):
    write(sqlite, *angry_chat(1))
    hidden = People("", people.read_users(users), redacted=frozenset({"agent", "lead"}))
    with served(sqlite, hidden) as address:
        agent, lead = signed_in(address, "agent"), signed_in(address, "lead")
        form = {"csrf": agent.form("/")["csrf"], "version": "0", "seen_chat": "", "text": "x"}
        assert agent.post("/drafts/d1r0/approve", form).status_code == 403
        assert lead.get("/labelled.jsonl").status_code == 403


def test_a_proxys_header_counts_only_from_the_proxy(sqlite):
    write(sqlite, *angry_chat(1))
    here, elsewhere = (ipaddress.ip_network(n) for n in ("127.0.0.0/8", "10.0.0.0/8"))
    ada = {"X-Forwarded-User": "ada@example.com", "X-Forwarded-Proto": "https"}
    known = {"identity_header": "X-Forwarded-User", "default_role": "agent"}
    with served(sqlite, People("", proxies=[here], **known)) as address:
        visitor = Visitor(address, **ada)
        page = visitor.get("/")
        assert "ada@example.com" in page.text
        assert "Secure" in page.headers["set-cookie"]
        assert Visitor(address).get("/").status_code == 403
    with served(sqlite, People("", proxies=[elsewhere], **known)) as address:
        assert Visitor(address, **ada).get("/").status_code == 403


def test_a_header_that_comes_twice_is_not_believed(sqlite):
    """From the browser, and from a proxy that adds its own to it."""
    here = ipaddress.ip_network("127.0.0.0/8")
    known = People("", identity_header="X-User", proxies=[here], default_role="agent")
    with served(sqlite, known) as address:
        names = [("X-User", "mallory"), ("X-User", "ada"), ("Accept", "text/html")]
        assert httpx.get(address, headers=names).status_code == 403
        assert httpx.get(address, headers=names[1:]).status_code == 200


def test_behind_a_proxy_users_have_the_roles_of_the_file(sqlite, users):
    here = ipaddress.ip_network("127.0.0.0/8")
    with served(sqlite, by_token(users, identity_header="X-User", proxies=[here])) as address:
        assert "observer" in Visitor(address, **{"X-User": "observer"}).get("/").text
        assert Visitor(address, **{"X-User": "mallory"}).get("/").status_code == 403


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--host 0.0.0.0", "--host=0.0.0.0: others can reach it, so they must sign in"),
        ("--host nowhere.invalid", "--host=nowhere.invalid: "),
        (
            "--allowed_hosts Desk.example.com",
            "--allowed_hosts=desk.example.com: others can reach it by that name, so they must",
        ),
        ("--allowed_hosts *", "--allowed_hosts=*: others can reach it"),
        ("--users /nowhere.toml", "--users=/nowhere.toml: cannot be read"),
        ("--users BAD", "ada: needs a role: observer, agent, lead"),
        ("--new_token ada:boss", "roles are observer, agent, lead"),
        ("--undo_seconds nan", "--undo_seconds"),
        ("--undo_seconds -1", "--undo_seconds"),
        ("--keep_days 0", "--keep_days"),
        ("--redact boss", "--redact: 'boss' is not a role"),
        ("--trusted_proxies x", "--trusted_proxies: 'x' does not appear to be"),
        ("--replies gs://b/replies", "--replies=gs://b/replies: must be a topic"),
        (
            "--replies /nowhere-at-all/replies.jsonl",
            "--replies=/nowhere-at-all/replies.jsonl: there is no folder",
        ),
        ("--replies BAD", "has a line that is not a reply"),
        ("--database sqlite:////nowhere/x.db", "there is no folder /nowhere"),
        ("--what", "unknown flag --what"),
    ],
)
def test_wrong_flags_are_said(arguments, said, tmp_path, capsys):
    bad = tmp_path / "bad.toml"
    bad.write_text('[ada]\nrole = "boss"\n')
    given = ["console", "--port", "0"]
    if "--database" not in arguments:
        given += ["--database", f"sqlite:///{tmp_path}/console.db"]
    assert said in mistake([*given, *arguments.split()], {"BAD": str(bad)}, capsys)


def test_a_taken_port_is_said(console, sqlite, capsys):
    port = console.rpartition(":")[2]
    arguments = ["console", "--database", sqlite.uri, "--port", port]
    assert f"--port={port}: Address already in use" in mistake(arguments, {}, capsys)


def test_answers_do_not_wait_for_acknowledgements():
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_new_token_is_shown_once_and_kept_as_a_hash(capsys, tmp_path):
    assert main(["console", "--new_token", "ada b:lead"]) == 0
    said = capsys.readouterr()
    token = said.err.split()[-1]
    assert token not in said.out
    path = tmp_path / "users.toml"
    path.write_text(said.out)
    known = People("", people.read_users(str(path)))
    assert known.of_token(token) == known.person("ada b")
    assert known.of_token(token + "x") is None


@pytest.mark.slow
def test_the_command_serves_and_logs_no_secrets(sqlite, users, tmp_path):
    write(sqlite, *angry_chat(1, text="Very private food"))
    command = [
        sys.executable, "-m", "chatflow", "console", "--database", sqlite.uri, "--port", "0",
        "--users", users, "--replies", str(tmp_path / "replies.jsonl"), "--debug",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for(lambda: "console: http" in log.read_text(), 60)
            address = re.search(r"http://\S+:\d+", log.read_text())[0]
            wait_for(lambda: httpx.get(f"{address}/healthz").text == "ok\n")
            visitor = signed_in(address, "lead")
            assert "Very private food" in visitor.get("/drafts/d1r0?q=private").text
            cookie = visitor.client.cookies["chatflow_session"]
        finally:
            process.terminate()
            process.wait(20)
    said = log.read_text()
    for secret in (TOKENS["lead"][0], cookie, "private", "Traceback"):
        assert secret not in said, said
