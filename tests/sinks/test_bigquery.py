"""Records to BigQuery: Google's client against a stand-in for the Storage Write API."""

import base64
import json
import random

import grpc
import pytest
from apache_beam.utils.timestamp import Timestamp
from conftest import ANALYSIS, DRAFT, ROOT, chat, job_service, mistake
from fakes.bigquery import FakeBigQuery, Table

from chatflow import network
from chatflow.dead_letters import join
from chatflow.options import Options
from chatflow.records import (
    KINDS,
    Analysis,
    DeadLetter,
    Draft,
    FieldValue,
    Quotation,
    now,
    record_id,
)
from chatflow.running.launch import execute
from chatflow.sinks import bigquery

SCHEMAS = ROOT / "infra" / "terraform" / "schemas"


@pytest.fixture
def tables(monkeypatch):
    """The stand-in, with the three tables as Terraform makes them."""
    with FakeBigQuery() as fake:
        for name, kind in KINDS.items():
            schema = json.loads((SCHEMAS / f"{name}.json").read_text())
            fake.tables[f"proj-1.chatflow.{name}"] = Table(schema, bigquery.id_column(kind))
        monkeypatch.setenv(bigquery.HOST_VARIABLE, fake.host)
        monkeypatch.setattr(network, "FIRST_PAUSE", 0.01)
        yield fake


RULES = (
    {"task": "analysis", "match": "late", "answer": {"sentiment": -1, "summary": "It is late."}},
    {"task": "analysis", "answer": {"sentiment": 1, "summary": "All is well."}},
    {"task": "apology", "answer": "We are sorry that it is late."},
)


@pytest.fixture
def analyse(lines, script):
    """Analyses four chats, two of them angry, and a line that is none."""

    def run(*flags, suffix="", **fields):
        chats = [chat(("It is late.", "Thanks.")[i % 2], chat_id=f"c{i}") for i in range(4)]
        to = {kind: f"bigquery://proj-1.chatflow.{kind}{suffix}" for kind in KINDS}
        options = Options(**to | {"input": lines(*chats, "no json"), "model": script(*RULES)})
        return execute(options, flags)

    return run


def rows(fake, name):
    return fake.tables[f"proj-1.chatflow.{name}"].rows


@pytest.mark.slow
def test_each_kind_has_its_table(tables, analyse):
    summary = analyse()
    assert summary.lost == 0
    assert sorted((row["chat_id"], row["sentiment"]) for row in rows(tables, "analyses")) == [
        ("c0", "-1"), ("c1", "1"), ("c2", "-1"), ("c3", "1")
    ]  # fmt: skip
    assert {row["text"] for row in rows(tables, "drafts")} == {"We are sorry that it is late."}
    (letter,) = rows(tables, "dead_letters")
    assert (letter["reason"], letter["payload"]) == ("not_json", "no json")
    uri = "bigquery://proj-1.chatflow.analyses"
    assert summary.to_dict()["other_destinations"]["analyses"] == [uri]


@pytest.mark.parametrize("suffix", ["", "?upsert=true"])
@pytest.mark.slow
def test_the_same_input_twice_leaves_each_row_once(tables, analyse, suffix):
    analyse(suffix=suffix)
    first = {row["analysis_id"] for row in rows(tables, "analyses")}
    analyse(suffix=suffix)
    assert [len(rows(tables, name)) for name in KINDS] == [4, 2, 1]
    assert {row["analysis_id"] for row in rows(tables, "analyses")} == first


@pytest.mark.slow
def test_rows_are_appended_where_a_table_has_no_key(tables, analyse):
    for table in tables.tables.values():
        table.key = ""
    analyse(suffix="?upsert=false")
    analyse(suffix="?upsert=false")
    assert [len(rows(tables, name)) for name in KINDS] == [8, 4, 2]


CODES = grpc.StatusCode


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        [CODES.UNAVAILABLE, CODES.UNAVAILABLE, CODES.INTERNAL],
        [CODES.RESOURCE_EXHAUSTED, CODES.ABORTED, CODES.DEADLINE_EXCEEDED],
        ["lost", "lost"],
        ["lost", CODES.UNAVAILABLE, CODES.NOT_FOUND, "lost", "hang"],
    ],
    ids=str,
)
def test_faults_of_the_service_lose_nothing_and_repeat_nothing(
    tables, analyse, monkeypatch, faults
):
    monkeypatch.setattr(bigquery, "ANSWER_SECONDS", 1)
    tables.faults.extend(faults)
    assert analyse().lost == 0
    assert not tables.faults
    assert [len(rows(tables, name)) for name in KINDS] == [4, 2, 1]


def test_a_service_that_stays_away_fails_the_bundle(tables, analyse, monkeypatch, capsys):
    monkeypatch.setattr(bigquery, "APPEND_SECONDS", 0.5)
    tables.faults.extend([CODES.UNAVAILABLE] * 1000)
    with pytest.raises(SystemExit):
        analyse()
    assert "the pipeline failed" in capsys.readouterr().err
    assert rows(tables, "analyses") == []


@pytest.mark.slow
def test_workers_in_other_processes_write_too(tables, analyse, warm):
    assert analyse(*job_service(warm.folder / "python")).lost == 0
    assert [len(rows(tables, name)) for name in KINDS] == [4, 2, 1]


def write(fake, records, kind, refused=None):
    """Writes records as a runner would, in one bundle; `refused` gets their dead letters."""
    name = next(name for name, known in KINDS.items() if known is kind)
    stream = bigquery.stream_of(f"bigquery://proj-1.chatflow.{name}")
    fn = bigquery._AppendRowsDoFn(stream, upsert=True)
    fn.start_bundle()
    letters = [one for record in records for one in fn.process(record, Timestamp(0), "window")]
    letters += [found.value for found in fn.finish_bundle()]
    fn.teardown()
    assert letters == [] if refused is None else refused.extend(letters) is None
    return rows(fake, name)


def test_a_row_holds_all_of_its_record(tables):
    analysis = Analysis(
        analysis_id="a1", chat_id="7 😡", user_id="c", revision=1_772_359_200_003, sentiment=-1,
        summary="“Late”\n\0", tone_scores={"angry": -0.5, "happy": float("-inf")},
        dropped_messages=2, repairs=("json", "summary_cut"), model="m", prompt_version="v",
        analysed_at="2026-03-01T10:00:00.250001Z",
    )  # fmt: skip
    (row,) = write(tables, [analysis], Analysis)
    assert json.loads(row.pop("tone_scores")) == {"angry": -0.5, "happy": None}
    assert row.pop("analysed_at") == "1772359200250001"
    assert row == {
        "analysis_id": "a1", "chat_id": "7 😡", "user_id": "c", "revision": "1772359200003",
        "fields": "{}", "quotations": "[]",
        "sentiment": "-1", "summary": "“Late”\n\0", "summary_source": "model",
        "dropped_messages": "2", "cut_messages": "0", "repairs": ["json", "summary_cut"],
        "model": "m", "prompt_version": "v",
    }  # fmt: skip


def test_a_flagged_draft_is_a_row_without_a_text(tables):
    flagged = Draft(
        draft_id="d1", analysis_id="a1", chat_id="7", user_id="c", revision=0, flag="ungrounded",
        model="m", prompt_version="v", drafted_at="2026-03-01T10:00:00Z",
    )  # fmt: skip
    (row,) = write(tables, [flagged], Draft)
    assert (row["flag"], "text" in row) == ("ungrounded", False)


def test_a_table_that_requires_what_records_may_leave_out_is_said_at_launch(
    tables, lines, script, capsys, tmp_path
):
    """As of drafts before there were flags: it would refuse each row without a text."""
    table = "proj-1.chatflow.drafts"
    tables.tables[table].columns["text"]["mode"] = "REQUIRED"
    error = mistake(
        ["run", "--input", lines(chat("Hello")), "--model", script(*RULES), "--output",
         str(tmp_path), "--drafts", f"bigquery://{table}"], {}, capsys,
    )  # fmt: skip
    assert f"{table} requires column text; infra/terraform/schemas/drafts.json" in error


def letter(payload):
    return DeadLetter(stage="read", reason="x", error="x", payload=payload, failed_at=now())


def test_a_bundle_that_is_too_large_for_a_request_is_divided(tables):
    noise = random.Random(1)
    letters = [letter(f"{noise.random()}" + "x" * 4_000_000) for _ in range(5)]
    assert len(write(tables, letters, DeadLetter)) == 5
    assert tables.appends == 3
    assert tables.connections == 1


def test_threads_that_append_one_after_the_other_share_a_connection(tables):
    stream = bigquery.stream_of("bigquery://proj-1.chatflow.dead_letters")
    threads = [bigquery._AppendRowsDoFn(stream, upsert=True) for _ in range(5)]
    for number in range(20):
        thread = threads[number % 5]
        thread.start_bundle()
        assert list(thread.process(letter(f"{number}"), Timestamp(0), "window")) == []
        assert list(thread.finish_bundle()) == []
    assert len(rows(tables, "dead_letters")) == 20
    assert tables.connections == 1
    threads[0].teardown()


def test_a_dead_letter_that_is_too_large_for_a_row_is_compressed(tables):
    """Its id is that of the whole letter, as in Pub/Sub."""
    large = letter("x" * 12_000_000)
    write(tables, [large], DeadLetter)
    (row,) = write(tables, [large], DeadLetter)
    assert row["payload_encoding"] == "gzip"
    assert row["dead_letter_id"] == record_id(large)
    assert DeadLetter(**row | {"failed_at": now()}).payload_bytes() == b"x" * 12_000_000


@pytest.mark.slow
def test_a_dead_letter_that_stays_too_large_is_several_rows(tables):
    noise = base64.b64encode(random.Random(1).randbytes(12_000_000)).decode()
    whole = letter(noise).model_copy(update={"answer": "rubbish", "attributes": {"tenant": "a"}})
    write(tables, [whole], DeadLetter)
    found = write(tables, [whole.model_copy(update={"failed_at": now()})], DeadLetter)  # again
    assert len({row["dead_letter_id"] for row in found}) == len(found) == 3
    parts = [DeadLetter(**row | {"failed_at": whole.failed_at}) for row in found]
    assert join(parts) == whole


def test_what_was_chosen_and_quoted_is_json_in_its_columns(tables):
    quoted = (Quotation(message=0, text="It is late.", message_id="m0"),)
    topic = FieldValue(value="delivery", confidence=0.75)
    some = FieldValue(value=("late_delivery", "no_reply"))
    chosen = ANALYSIS.model_copy(
        update={
            "quotations": quoted, "fields": {"topic": topic, "grievances": some},
            "language": "de", "unproven_language": True, "summary_source": "quotations",
        }
    )  # fmt: skip
    (row,) = write(tables, [chosen], Analysis)
    assert json.loads(row["quotations"]) == [json.loads(quoted[0].to_json())]
    assert json.loads(row["fields"]) == {
        "topic": {"value": "delivery", "confidence": 0.75},
        "grievances": {"value": ["late_delivery", "no_reply"], "confidence": None},
    }
    assert (row["language"], row["unproven_language"]) == ("de", True)
    composed = DRAFT.model_copy(
        update={"grievances": ("late_delivery",), "evidence": quoted, "confidence": 0.5}
    )
    (row,) = write(tables, [composed], Draft)
    assert row["grievances"] == ["late_delivery"]
    assert json.loads(row["evidence"])[0]["text"] == "It is late."
    assert row["confidence"] == 0.5


def test_a_row_that_is_refused_is_a_dead_letter_and_fails_no_other(tables):
    tables.tables["proj-1.chatflow.analyses"].columns["chat_id"]["maxLength"] = "10"
    analyses = [
        ANALYSIS.model_copy(update={"analysis_id": chat_id, "chat_id": chat_id})
        for chat_id in ("1", "long" * 10, "2", "longer" * 10, "3")
    ]
    refused = []
    assert len(write(tables, analyses, Analysis, refused)) == 3
    assert {(one.stage, one.reason) for one in refused} == {("write", "bigquery_refused")}
    assert [one.error for one in refused] == ["field chat_id is too long"] * 2
    held = [Analysis.model_validate_json(one.payload) for one in refused]
    assert held == [analyses[1], analyses[3]]


def test_a_record_that_is_too_large_is_a_dead_letter_and_fails_no_other(tables):
    large = DRAFT.model_copy(update={"draft_id": "large", "text": "x" * 10_000_000})
    refused = []
    assert [row["draft_id"] for row in write(tables, [large, DRAFT], Draft, refused)] == ["d1"]
    (one,) = refused
    assert (one.stage, one.reason) == ("write", "too_large")
    assert Draft.model_validate_json(one.payload) == large


@pytest.mark.parametrize(
    ("analyses", "said"),
    [
        ("bigquery://proj-1.chatflow", "is not a table; write bigquery://PROJECT.DATASET.TABLE"),
        (
            "bigquery://proj-1.chatflow.t?upsert=maybe",
            "is not a table; write bigquery://PROJECT.DATASET.TABLE",
        ),
        ("bigquery://proj-1.chatflow.nowhere", "cannot be written to: 404"),
        ("bigquery://proj-1.chatflow.drafts", "has no column sentiment, summary, summary_source"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_at_launch(
    tables, lines, script, capsys, tmp_path, analyses, said
):
    error = mistake(
        ["run", "--input", lines(chat("Hello")), "--model", script(*RULES), "--output",
         str(tmp_path), "--analyses", analyses], {}, capsys,
    )  # fmt: skip
    assert said in error
    assert analyses in error
