"""Records to databases: SQLite, and a real PostgreSQL."""

import itertools
import json
import random
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from conftest import chat, job_service, mistake

from chatflow import dead_letters, network
from chatflow.cli import main
from chatflow.database import tables
from chatflow.database.connections import Database, parse_uri
from chatflow.database.upserts import upsert
from chatflow.dead_letters import fitted, join
from chatflow.errors import UsageError
from chatflow.options import Options
from chatflow.records import Analysis, DeadLetter, Draft
from chatflow.running.launch import execute
from chatflow.sinks import database as sql

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def analysis(chat_id="7", revision=0, sentiment=-1, **fields):
    values = {
        "analysis_id": f"a-{chat_id}-{revision}", "chat_id": chat_id, "user_id": "c",
        "revision": revision, "sentiment": sentiment, "summary": "It is late.", "model": "m",
        "prompt_version": "v", "analysed_at": NOON,
    }  # fmt: skip
    return Analysis(**values | fields)


def draft(chat_id="7", revision=0, **fields):
    values = {
        "draft_id": f"d-{chat_id}-{revision}", "analysis_id": f"a-{chat_id}-{revision}",
        "chat_id": chat_id, "user_id": "c", "revision": revision, "model": "m",
        "prompt_version": "v", "drafted_at": NOON,
    }  # fmt: skip
    return Draft(**values | ({} if "flag" in fields else {"text": "We are sorry."}) | fields)


def letter(payload="no json", **fields):
    return DeadLetter(
        stage="read", reason="not_json", error="x", payload=payload, failed_at=NOON, **fields
    )


def write(database, *records):
    with database.write() as connection:
        upsert(connection, records)


def rows(database, table, *columns):
    with database.read() as connection:
        found = connection.execute(sa.select(table).order_by(*table.primary_key.columns))
        taken = [dict(row) for row in found.mappings()]
    if not columns:
        return taken
    return [tuple(row[name] for name in columns) for row in taken]


def statuses(database):
    return dict(rows(database, tables.drafts, "draft_id", "status"))


def test_the_migrations_lead_to_the_tables(database):
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_many_make_the_tables_at_once(new_database):
    errors = []

    def upgrade():
        try:
            Database(new_database).upgrade()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=upgrade) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert rows(Database(new_database), tables.drafts) == []


def test_a_database_of_a_newer_chatflow_is_refused(database):
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UsageError, match="made by a newer chatflow"):
        database.upgrade()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("mysql://h/db", "chatflow does not write to"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////nowhere/at/all.db", "there is no folder /nowhere/at"),
        ("postgresql://me@h", "names no database"),
        ("what", "is not a database"),
    ],
)
def test_other_uris_are_refused(uri, said):
    with pytest.raises(UsageError, match=said):
        parse_uri(uri)


def test_a_password_is_never_shown():
    database = Database("postgresql://me:s3cret@127.0.0.1:1/db")
    with pytest.raises(UsageError, match="cannot be used") as error:
        database.upgrade()
    assert "s3cret" not in database.uri + str(error.value) + repr(database)
    for uri in (
        "mysql://me:s3cret@h/db",
        "postgresql://me:s3cret@h:port/db",
        "postgresql:me:s3cret@h/db",
        "postgresql://me@h/db?password=s3cret",
        "postgresql://me@h/db?sslpassword=s3cret",
    ):
        with pytest.raises(UsageError) as error:
            parse_uri(uri)
        assert "s3cret" not in str(error.value)
    for password in ("s3cret", "s3/cret", "s@3cret"):
        assert sql.Database().shown(f"postgresql://me:{password}@h/db,results/a@b") == (
            "postgresql://me:***@h/db,results/a@b"
        )


@pytest.mark.slow
def test_a_password_is_read_from_where_the_flag_says(database, lines, script, monkeypatch, capsys):
    if database.is_sqlite:
        pytest.skip("a file has no password")
    with database.write() as connection:
        connection.execute(sa.text("DROP ROLE IF EXISTS guarded"))
        connection.execute(sa.text("CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 's3cret'"))
    uri = database.uri.replace("chatflow@", "guarded@")
    given = ["run", "--input", lines(chat("It is late.")), "--model", script(*RULES)]
    given += ["--database", uri, "--summary", "json"]
    assert "cannot be used" in mistake(given, {}, capsys)
    place = "--database_password=env:THE_PASSWORD"
    assert f"{place}: there is no such variable" in mistake([*given, place], {}, capsys)
    monkeypatch.setenv("THE_PASSWORD", "s3cret")
    assert main([*given, place]) == 0
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err
    assert len(rows(database, tables.analyses)) == 1


def test_what_is_written_is_not_in_errors(database):
    """They are logged, and what chats say is not for logs."""
    row = {"chat_id": "7", "revision": 0, "messages": [], "attributes": {}, "stored_at": NOON}
    insert = sa.insert(tables.chats).values(**row, search_text="hunter2")
    with database.write() as connection:
        connection.execute(insert)
    with pytest.raises(sa.exc.IntegrityError) as error, database.write() as connection:
        connection.execute(insert)
    assert "hunter2" not in str(error.value)


def test_all_fields_of_records_come_back(database):
    records = (
        analysis(
            tone_scores={"angry": -0.5, "happy": float("-inf")}, confidence=0.9, repairs=("json",),
            summary="“Late”\n😡", dropped_messages=2, revision=2**63 - 1,
        ),
        draft(repairs=("lead",)),
        letter(attributes={"tenant": "t"}, chat_id="7", answer="?"),
    )  # fmt: skip
    write(database, *records)
    (found,) = rows(database, tables.analyses)
    assert found.pop("tone_scores") == {"angry": -0.5, "happy": None}
    assert Analysis(**found) == records[0].model_copy(update={"tone_scores": None})
    (found,) = rows(database, tables.drafts)
    assert Draft(**found) == records[1].model_copy(update={"revision": 0})
    (found,) = rows(database, tables.dead_letters)
    assert DeadLetter(**found) == records[2]


def test_the_same_records_twice_are_there_once(database):
    records = [analysis(), draft(), letter(), chat("Late!", attributes={"tenant": "t"})]
    for _ in range(2):
        write(database, *records, *records)
    for table in (tables.analyses, tables.drafts, tables.dead_letters, tables.chats):
        assert len(rows(database, table)) == 1
    assert rows(database, tables.chat_attributes, "name", "value") == [("tenant", "t")]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_of_a_chat_the_newest_revision_is_kept(database, order):
    for revision in order:
        texts = ["Hello"] * revision
        attributes = {"tenant": f"t{revision}"} | ({"old": "yes"} if revision == 1 else {})
        write(database, chat(*texts, revision=revision, attributes=attributes))
    assert rows(database, tables.chats, "revision") == [(3,)]
    assert len(rows(database, tables.chats)[0]["messages"]) == 3
    assert rows(database, tables.chat_attributes, "name", "value") == [("tenant", "t3")]


def test_attributes_of_any_length_are_kept(database):
    noise = random.Random(1)
    long = "".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(5000))
    write(database, chat("Late!", attributes={"a" + long: long, "b": "c"}))
    assert rows(database, tables.chats)[0]["attributes"] == {"a" + long: long, "b": "c"}
    assert ("b", "c") in rows(database, tables.chat_attributes, "name", "value")
    assert len(rows(database, tables.chat_attributes)) == 2


HISTORY = {
    "newer analysis, not angry": (
        [analysis(revision=1), draft(revision=1), analysis(revision=2, sentiment=0)],
        {"d-7-1": "superseded"},
    ),
    "newer draft": (
        [analysis(revision=1), draft(revision=1), analysis(revision=2), draft(revision=2)],
        {"d-7-1": "superseded", "d-7-2": "waiting"},
    ),
    "another model, the same revision": (
        [analysis(), draft(), draft(draft_id="d-other", drafted_at=NOON + timedelta(hours=1))],
        {"d-7-0": "superseded", "d-other": "waiting"},
    ),
    "another user of the same chat": (
        [draft(revision=1), analysis(revision=2, user_id="else")],
        {"d-7-1": "waiting"},
    ),
    "a flag": ([draft(flag="ungrounded")], {"d-7-0": "waiting"}),
    "a failure before a draft, or after it": (
        [
            draft(draft_id="d-before", drafted_at=NOON - timedelta(hours=1), flag="failed"),
            draft(),
            draft(draft_id="d-after", drafted_at=NOON + timedelta(hours=1), flag="failed"),
        ],
        {"d-before": "superseded", "d-7-0": "waiting", "d-after": "superseded"},
    ),
    "a failure, twice": (
        [
            draft(flag="failed"),
            draft(draft_id="d-2", drafted_at=NOON + timedelta(hours=1), flag="failed"),
        ],
        {"d-7-0": "superseded", "d-2": "waiting"},
    ),
}


@pytest.mark.parametrize("name", HISTORY)
def test_a_newer_revision_supersedes_in_whatever_order_it_comes(database, name):
    records, wanted = HISTORY[name]
    for order in itertools.permutations(records):
        with database.write() as connection:
            for table in tables.metadata.sorted_tables:
                connection.execute(sa.delete(table))
        for record in order:
            write(database, record)
        assert statuses(database) == wanted, [type(r).__name__ for r in order]


def test_what_people_decided_stays(database):
    write(database, analysis(revision=1), draft(revision=1))
    with database.write() as connection:
        connection.execute(
            sa.update(tables.drafts).values(status="approved", edited_text="Sorry!", version=1)
        )
    other = draft(revision=1, draft_id="d-other", drafted_at=NOON + timedelta(hours=1))
    write(database, draft(revision=1, text="Other"), other, analysis(revision=2))
    assert rows(database, tables.drafts, "draft_id", "status", "edited_text", "text") == [
        ("d-7-1", "approved", "Sorry!", "We are sorry."),
        ("d-other", "superseded", None, "We are sorry."),
    ]


def test_texts_that_databases_do_not_have(database):
    """A NUL character; a dead letter with one can be replayed unchanged."""
    write(database, analysis(summary="a\0b"), draft(text="a\0b"), letter("no\0json"))
    write(database, chat("a\0b", attributes={"x\0": "y\0"}))
    assert rows(database, tables.analyses, "summary") == [("a\N{REPLACEMENT CHARACTER}b",)]
    (found,) = rows(database, tables.dead_letters)
    assert DeadLetter(**found).payload_bytes() == b"no\0json"


@pytest.mark.slow
def test_many_writers_lose_nothing_and_double_nothing(database):
    """Eight workers write the same chats' revisions, all mixed up."""
    records = [
        record
        for number, revision in itertools.product(range(20), range(1, 4))
        for record in (
            chat("Late!", chat_id=f"c{number}", revision=revision),
            analysis(f"c{number}", revision),
            draft(f"c{number}", revision),
        )
    ]
    errors = []

    def work(seed):
        noise = random.Random(seed)
        mine = noise.sample(records, len(records))
        try:
            fn = sql._UpsertDoFn("")
            fn.database = database
            for start in range(0, len(mine), 30):
                assert list(fn.process(mine[start : start + 30])) == []
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert rows(database, tables.chats, "revision") == [(3,)] * 20
    assert len(rows(database, tables.analyses)) == 60
    found = statuses(database)
    assert len(found) == 60
    assert {key for key, status in found.items() if status == "waiting"} == {
        f"d-c{number}-3" for number in range(20)
    }


@pytest.mark.slow
def test_bundles_of_several_kinds_wait_for_no_bundle_that_waits_for_them(database, caplog):
    """An analysis of one customer beside a draft of another, and the other way round."""

    def work(seed):
        noise = random.Random(seed)
        fn = sql._UpsertDoFn("")
        fn.database = database
        for _ in range(15):
            some = set(noise.sample(range(40), 20))
            list(fn.process([(analysis if i in some else draft)(f"c{i}") for i in range(40)]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.messages == []  # of deadlocks, after which a bundle is written again
    assert len(rows(database, tables.analyses)) == len(rows(database, tables.drafts)) == 40


RULES = (
    {"task": "analysis", "match": "late", "answer": {"sentiment": -1, "summary": "It is late."}},
    {"task": "analysis", "answer": {"sentiment": 1, "summary": "All is well."}},
    {"task": "apology", "answer": "We are sorry that it is late."},
)


@pytest.fixture
def analyse(lines, script, new_database):
    """Analyses four chats, two of them angry, and a line that is none, into a database."""

    def run(*flags, rules=RULES, **fields):
        chats = [
            chat(("It is late.", "Thanks.")[i % 2], chat_id=f"c{i}", attributes={"tenant": "t"})
            for i in range(4)
        ]
        given = {"input": lines(*chats, "no json"), "model": script(*rules)}
        return execute(Options(**{"database": new_database, **given, **fields}), flags)

    return run


COUNTS = {"chats": 4, "chat_attributes": 4, "analyses": 4, "drafts": 2, "dead_letters": 1}


def counts(database):
    return {name: len(rows(database, tables.metadata.tables[name])) for name in COUNTS}


@pytest.mark.slow
def test_a_run_fills_the_database_and_a_second_one_adds_nothing(analyse, new_database, tmp_path):
    summary = analyse(output=str(tmp_path / "results"))
    assert summary.lost == 0
    assert len(summary.files("analyses")) == 1
    assert summary.to_dict()["other_destinations"]["drafts"] == [new_database]
    database = Database(new_database)
    assert counts(database) == COUNTS
    first = statuses(database)
    analyse()
    assert counts(database) == COUNTS
    assert statuses(database) == first


@pytest.mark.slow
def test_single_kinds_go_to_a_database_too(analyse, new_database, tmp_path):
    analyse(database="", output=str(tmp_path), drafts=new_database)
    found = counts(Database(new_database))
    assert found == dict.fromkeys(COUNTS, 0) | {"drafts": 2}


@pytest.mark.parametrize("fails", ["the answer", "the model"])
@pytest.mark.slow
def test_a_person_writes_where_the_model_did_not(fails, analyse, script, new_database, tmp_path):
    task = "apology" if fails == "the answer" else "none"
    rules = (*RULES[:2], {"task": task, "answer": " "})
    output = str(tmp_path / "results")
    assert analyse(output=output, rules=rules).lost == 0
    database = Database(new_database)
    stage = {"the answer": "draft_answer", "the model": "draft_model"}[fails]
    assert sorted(rows(database, tables.dead_letters, "stage")) == [(stage,)] * 2 + [("read",)]
    waiting = rows(database, tables.drafts, "chat_id", "status", "text", "flag")
    assert sorted(waiting) == [(f"c{i}", "waiting", None, "failed") for i in (0, 2)]

    letters = Options(input=f"{output}/dead_letters*", model=script(*RULES), database=new_database)
    execute(letters, [], replay=True)
    found = rows(database, tables.drafts, "chat_id", "status", "flag")
    assert sorted(found, key=str) == [
        (f"c{i}", *what) for i in (0, 2) for what in (("superseded", "failed"), ("waiting", None))
    ]


@pytest.mark.parametrize("kind", ["drafts", "dead_letters"])
@pytest.mark.slow
def test_it_is_where_drafts_are_that_a_person_writes(kind, analyse, new_database, tmp_path):
    rules = (*RULES[:2], {"task": "apology", "answer": " "})
    analyse(**{"database": "", "output": str(tmp_path), kind: new_database}, rules=rules)
    found = counts(Database(new_database))
    assert found == dict.fromkeys(COUNTS, 0) | {kind: {"drafts": 2, "dead_letters": 3}[kind]}


def test_who_has_no_draft_waits_since_it_failed_first(database):
    """And what a person began to write stays, when it fails again."""
    first = draft(flag="failed")
    write(database, analysis(), first)
    with database.write() as connection:
        connection.execute(sa.update(tables.drafts).values(edited_text="Half a"))
    write(database, first.model_copy(update={"drafted_at": NOON + timedelta(hours=1)}))
    columns = "drafted_at", "edited_text", "status"
    assert rows(database, tables.drafts, *columns) == [(NOON, "Half a", "waiting")]


@pytest.mark.slow
def test_workers_in_other_processes_write_too(analyse, new_database, warm):
    assert analyse(*job_service(warm.folder / "python")).lost == 0
    assert counts(Database(new_database)) == COUNTS


def test_an_outage_is_waited_for(database, monkeypatch):
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.01)
    if database.is_sqlite:
        pytest.skip("a file has no connections to lose")
    fn = sql._UpsertDoFn("")
    fn.database = database
    assert list(fn.process([analysis(), draft()])) == []
    with database.write() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    assert list(fn.process([analysis(revision=1), draft(revision=1)])) == []
    assert statuses(database) == {"d-7-0": "superseded", "d-7-1": "waiting"}


def test_a_database_that_stays_away_fails_the_bundle(monkeypatch):
    monkeypatch.setattr(sql, "UPSERT_SECONDS", 0.2)
    fn = sql._UpsertDoFn("")
    fn.database = Database("postgresql://me:s3cret@127.0.0.1:1/db")
    with pytest.raises(sa.exc.OperationalError) as error:
        list(fn.process([analysis()]))
    assert "s3cret" not in str(error.value)


def test_what_the_database_refuses_is_a_dead_letter_and_fails_no_other(database):
    """PostgreSQL indexes no id of 3,000 random bytes."""
    if database.is_sqlite:
        pytest.skip("SQLite takes all")
    noise = random.Random(1)
    long_id = "".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(1024))
    records = [analysis(f"c{i}") for i in range(5)] + [analysis(long_id)]
    fn = sql._UpsertDoFn("")
    fn.database = database
    (refused,) = fn.process(records)
    assert (refused.stage, refused.reason) == ("write", "sql_refused")
    assert Analysis.model_validate_json(refused.payload) == records[-1]
    assert len(rows(database, tables.analyses)) == 5


def test_what_no_statement_can_hold_is_a_dead_letter_and_fails_no_other(database):
    """A lone surrogate and a number of 70 bits, which are errors before the database sees them."""
    broken = [
        analysis("c5").model_copy(update={"summary": "half an emoji: \ud83d"}),
        analysis("c6").model_copy(update={"revision": 1 << 70}),
    ]
    fn = sql._UpsertDoFn("")
    fn.database = database
    found = list(fn.process([*(analysis(f"c{i}") for i in range(5)), *broken]))
    assert [(one.stage, one.reason) for one in found] == [("write", "sql_refused")] * 2
    assert "half an emoji: \\ud83d" in found[0].payload
    assert json.loads(found[1].payload)["revision"] == 1 << 70
    assert len(rows(database, tables.analyses)) == 5


def test_parts_of_a_letter_are_rows_of_their_own(database, monkeypatch):
    monkeypatch.setattr(dead_letters, "PART_BYTES", 300)
    whole = letter(random.Random(1).randbytes(1000).hex())
    parts = fitted(whole, 1000)
    write(database, *parts, *parts)
    found = [DeadLetter(**row) for row in rows(database, tables.dead_letters)]
    assert len(found) == len(parts) > 2
    assert join(found) == whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--drafts mysql://h/db --output OUT", "--drafts: nothing writes to 'mysql://h/db'"),
        ("--drafts sqlite:// --output OUT", "--drafts: sqlite:// names no file"),
        ("--database mysql://me:s3cret@h/db", "--database: mysql://me:***@h/db is a database"),
        ("--database sqlite:////nowhere/at/all.db", "there is no folder /nowhere/at"),
        ("--database postgresql://me:s3cret@127.0.0.1:1/db", "cannot be used: "),
    ],
)
def test_wrong_databases_are_said_at_launch(arguments, said, lines, script, tmp_path, capsys):
    given = ["run", "--input", lines(chat("Hello")), "--model", script(*RULES)]
    error = mistake([*given, *arguments.split()], {"OUT": str(tmp_path)}, capsys)
    assert said in error
    assert "s3cret" not in error
