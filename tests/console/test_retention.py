"""What is deleted after a time, and what is not."""

import random
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from consoles import Visitor, angry_chat, served, write

from chatflow.console import app, retention
from chatflow.console.outbox import Publisher
from chatflow.console.retention import forget
from chatflow.database import tables
from chatflow.database.answers import Kept, keep_answer, kept_answers
from chatflow.database.connections import Database
from chatflow.database.raw import forget_raw, values_of
from chatflow.records import Chat, DeadLetter, RawChat

TABLES = [table for table in tables.metadata.sorted_tables if table is not tables.keys]
NOW = datetime.now(UTC)
LONG_AGO = NOW - timedelta(days=100)
OF_CHATS = ("chats", "chat_attributes", "customers", "analyses", "drafts", "history", "outbox")


class Sent:
    def send(self, replies, seconds):
        pass


def age(database, *chat_ids, moment=LONG_AGO):
    """As if all that happened to some chats had happened long ago."""
    times = (tables.chats.c.stored_at, tables.analyses.c.analysed_at, tables.drafts.c.changed_at)
    with database.write() as connection:
        for time in times:
            change = sa.update(time.table).where(time.table.c.chat_id.in_(chat_ids))
            connection.execute(change.values({time: moment}))


def counts(database):
    with database.read() as connection:
        return {
            table.name: connection.execute(
                sa.select(sa.func.count()).select_from(table)
            ).scalar_one()
            for table in TABLES
        }


@pytest.fixture
def decided(database):
    """Chats 0 to 5: approved and sent, approved, dismissed, waiting, two without a draft."""
    for number in range(6):
        chat, analysis, draft = angry_chat(number)
        write(database, chat, analysis, *([draft] if number < 4 else []))
    with served(database, undo_seconds=0) as address:
        visitor = Visitor(address)
        visitor.decide("d0r0", "approve", text="Sorry!")
        assert Publisher(database, Sent()).publish() == 1
        visitor.decide("d1r0", "approve", text="Sorry!")
        visitor.decide("d2r0", "dismiss", reason="other")
    letter = {"stage": "read", "reason": "not_json", "error": "x"}
    write(database, DeadLetter(payload="old", failed_at=LONG_AGO, **letter))
    write(database, DeadLetter(payload="new", failed_at=NOW, **letter))
    return database


def kept_chats(database):
    with database.read() as connection:
        return sorted(connection.execute(sa.select(tables.chats.c.chat_id)).scalars())


def test_what_is_old_is_deleted_with_all_that_is_known_of_it(decided):
    before = counts(decided)
    assert forget(decided, NOW - timedelta(days=90)) == 0
    assert counts(decided) == before | {"dead_letters": 1}
    age(decided, *(f"chat-{number}" for number in range(5)))
    assert forget(decided, NOW - timedelta(days=90)) == 3
    # One has a reply to be sent, one a draft to be reviewed, and one is new.
    assert kept_chats(decided) == ["chat-1", "chat-3", "chat-5"]
    expected = dict.fromkeys(OF_CHATS, 3) | {"drafts": 2, "history": 1, "outbox": 1}
    assert counts(decided) == expected | {
        "dead_letters": 1, "sessions": 0, "answers": 0, "spending": 0, "raw_chats": 0,
        "audit": 3,
    }  # fmt: skip
    with served(decided) as address:
        for path in ("/", "/?status=dismissed", "/history", "/dashboard", "/drafts/d3r0"):
            assert Visitor(address).get(path).status_code == 200, path


@pytest.mark.parametrize("what", ["chat", "analysis", "draft"])
def test_what_something_happened_to_is_kept(decided, what):
    age(decided, "chat-2")
    table, time = {
        "chat": (tables.chats, "stored_at"),
        "analysis": (tables.analyses, "analysed_at"),
        "draft": (tables.drafts, "changed_at"),
    }[what]
    with decided.write() as connection:
        newer = sa.update(table).where(table.c.chat_id == "chat-2").values({time: NOW})
        connection.execute(newer)
    assert forget(decided, NOW - timedelta(days=90)) == 0
    assert "chat-2" in kept_chats(decided)


def test_the_letter_of_a_draft_that_waits_is_kept(database):
    write(database, *angry_chat(1, flag="failed"))
    letter = {"stage": "draft_model", "reason": "x", "error": "x", "failed_at": LONG_AGO}
    for chat_id in ("chat-1", "chat-2"):
        write(database, DeadLetter(payload=chat_id, chat_id=chat_id, **letter))
    age(database, "chat-1")
    forget(database, NOW - timedelta(days=90))
    with database.read() as connection:
        kept = connection.execute(sa.select(tables.dead_letters.c.chat_id)).scalars().all()
    assert kept == ["chat-1"]


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_a_customer_who_comes_just_then_is_kept(database):
    """Of a chat that is being deleted, and whose messages are not here."""
    first = angry_chat(1)[1]
    second = angry_chat(1)[1:]
    second = [each.model_copy(update={"user_id": "second", "analysis_id": "b"}) for each in second]
    write(database, first)
    age(database, "chat-1")

    def write_meanwhile(connection, cursor, statement, *_):
        if statement.startswith("DELETE FROM chats") and second:
            records = [*second]
            second.clear()
            write(database, *records)

    sa.event.listen(database._engine, "before_cursor_execute", write_meanwhile)
    assert forget(database, NOW - timedelta(days=90)) == 1
    with database.read() as connection:
        kept = connection.execute(sa.select(tables.analyses.c.user_id)).scalars().all()
    assert kept == ["second"]
    assert counts(database) == dict.fromkeys(counts(database), 0) | {
        "analyses": 1, "drafts": 1, "customers": 1,
    }  # fmt: skip


def test_without_chats_the_rest_is_deleted_too(database):
    write(database, *angry_chat(1)[1:])
    with served(database) as address:
        Visitor(address).decide("d1r0", "dismiss", reason="other")
    age(database, "chat-1")
    with database.write() as connection:
        connection.execute(sa.update(tables.audit).values(at=LONG_AGO))
    assert forget(database, NOW - timedelta(days=90)) == 1
    assert set(counts(database).values()) == {0}


def test_the_console_deletes_while_it_runs(decided, monkeypatch):
    found_none = threading.Event()

    def forget_one(*given):
        count = forget(*given)
        if not count:
            found_none.set()
        return count

    def wait_for_a_look():
        for _ in range(2):  # the first one may have begun before
            found_none.clear()
            assert found_none.wait(30)

    monkeypatch.setattr(retention, "MOST", 1)
    monkeypatch.setattr(app, "FORGET_SECONDS", 0.05)
    monkeypatch.setattr(app, "forget", forget_one)
    age(decided, "chat-0", "chat-2", "chat-4")
    with served(decided, keep=timedelta(days=90)):
        wait_for_a_look()
        assert kept_chats(decided) == ["chat-1", "chat-3", "chat-5"]
        age(decided, "chat-5")
        wait_for_a_look()
    assert kept_chats(decided) == ["chat-1", "chat-3"]


@pytest.mark.slow
def test_what_comes_meanwhile_is_kept_whole(database):
    """Workers write newer revisions of chats that are about to be deleted."""
    number_of = range(30)
    for number in number_of:
        write(database, *angry_chat(number)[:2])
    age(database, *(f"chat-{number}" for number in number_of))
    ended = threading.Event()
    failed = []

    def work(seed):
        try:
            noise = random.Random(seed)
            for number in noise.sample(number_of, len(number_of)):
                write(database, *angry_chat(number, revision=seed)[:2])
        except Exception as error:
            failed.append(error)

    def delete():
        try:
            while not ended.is_set():
                forget(database, NOW - timedelta(days=90))
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    deleting = threading.Thread(target=delete)
    for thread in (deleting, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    ended.set()
    deleting.join()
    assert failed == []
    found = counts(database)
    assert [found[name] for name in ("chats", "chat_attributes", "customers")] == [30, 30, 30]
    with database.read() as connection:
        newest = sa.select(sa.func.count()).where(tables.analyses.c.revision == 3)
        assert connection.execute(newest).scalar_one() == 30


def test_answers_of_models_are_deleted_when_they_are_old(database):
    for number in range(2):
        keep_answer(database, Kept(f"q{number}", "7", "m", "{}"))
    with database.write() as connection:
        old = tables.answers.c.question_id == "q0"
        connection.execute(
            sa.update(tables.answers).where(old).values(answered_at=NOW - timedelta(days=99))
        )
    forget(database, NOW - timedelta(days=90))
    assert kept_answers(database, ["q0", "q1"]) == {"q1": "{}"}


def test_raw_chats_go_with_their_chats(decided, tmp_path):
    """Also where they are in a database of their own."""
    raw = Database(f"sqlite:///{tmp_path}/raw.db")
    raw.upgrade()
    for chat_id in ("chat-0", "chat-1", "gone"):
        for revision in (0, 1):
            one = Chat(chat_id=chat_id, revision=revision, messages=())
            hidden = {"[EMAIL_1]": "a@x.org"}
            record = RawChat(chat_id=chat_id, revision=revision, chat=one, placeholders=hidden)
            write(raw, record)
    assert forget_raw(raw, decided, LONG_AGO) == 0
    age(decided, "chat-0")
    assert forget(decided, NOW - timedelta(days=90)) == 1
    assert forget_raw(raw, decided, NOW + timedelta(days=1)) == 4
    assert set(values_of(raw, [(c, 1) for c in ("chat-0", "chat-1", "gone")])) == {("chat-1", 1)}
    raw.close()
