"""Results as tables: a row a record, whole and once, and no formulas for spreadsheets."""

import csv
import io
import json
import os
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

import apache_beam as beam
import pyarrow.parquet as pq
import pytest
from conftest import ANALYSIS, DRAFT, ROOT, chat
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow import WriteRecords, launch, new_pipeline
from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.options import SinkSettings
from chatflow.records import DeadLetter, FieldValue, Quotation, record_id
from chatflow.sinks import tables
from chatflow.sinks.files import AppendFiles, Files, _AppendDoFn, result_files, whole_file
from chatflow.sinks.staging import open_results
from chatflow.sinks.tables import CsvWriter, Layout, as_table, guarded
from chatflow.sinks.write import split_destinations

FIELDS = ("topic", "grievances")
CHOSEN = ANALYSIS.model_copy(
    update={
        "fields": {
            "topic": FieldValue(value="delivery", confidence=0.9),
            "grievances": FieldValue(value=("late", "rude"), confidence=0.7),
            "mood": FieldValue(value="grey"),
        },
        "quotations": (Quotation(message=0, text="Late!"), Quotation(message=2, text="Again!")),
        "tone_scores": {"angry": -0.1},
        "unproven_language": True,
    }
)


def csv_rows(content):
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def parquet_rows(content):
    return pq.read_table(io.BytesIO(content)).to_pylist()


def table(ending, layout, *records):
    lines = "".join(record.to_json() + "\n" for record in records)
    return as_table(f"x{ending}", layout, lines.encode())


def test_the_columns_are_the_fields_in_their_order():
    assert list(Layout(type(ANALYSIS), FIELDS).columns) == [
        "analysis_id", "chat_id", "user_id", "revision", "sentiment", "summary", "summary_source",
        "quotations", "field.topic", "field.grievances", "confidence.topic",
        "confidence.grievances", "fields", "language", "unproven_language", "tone_scores",
        "confidence", "dropped_messages", "cut_messages", "first", "redacted", "repairs",
        "model", "prompt_version", "analysed_at",
    ]  # fmt: skip
    assert list(Layout(DeadLetter).columns)[:3] == ["dead_letter_id", "stage", "reason"]


def test_a_row_of_csv_is_for_people():
    content = table(".csv", Layout(type(ANALYSIS), FIELDS), CHOSEN)
    assert content.startswith(b"\xef\xbb\xbfanalysis_id,")
    assert content.endswith(b"\r\n")
    (row,) = csv_rows(content)
    assert {name: value for name, value in row.items() if value} == {
        "analysis_id": "a1", "chat_id": "7", "user_id": "c", "revision": "3", "sentiment": "-1",
        "summary": "It is late.", "summary_source": "model", "quotations": "Late!\nAgain!",
        "field.topic": "delivery", "field.grievances": "late, rude", "confidence.topic": "0.9",
        "confidence.grievances": "0.7", "fields": '{"mood":{"value":"grey"}}',
        "unproven_language": "true", "tone_scores": '{"angry":-0.1}', "dropped_messages": "0",
        "cut_messages": "0", "model": "m", "prompt_version": "v",
        "analysed_at": "2026-03-01 10:00:00",
    }  # fmt: skip


def test_a_row_of_parquet_has_types():
    (row,) = parquet_rows(table(".parquet", Layout(type(ANALYSIS), FIELDS), CHOSEN))
    assert row["analysed_at"] == datetime(2026, 3, 1, 10, 0, 0, 250_000, UTC)
    assert (row["sentiment"], row["revision"], row["unproven_language"]) == (-1, 3, True)
    assert (row["confidence.topic"], row["confidence"], row["first"]) == (0.9, None, None)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=50)
LETTERS = st.builds(
    DeadLetter,
    stage=st.sampled_from(["read", "model"]),
    reason=TEXTS,
    error=TEXTS,
    payload=TEXTS,
    attributes=st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2),
    failed_at=st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),
)


@given(letters=st.lists(LETTERS, max_size=5))
@settings(deadline=None)
def test_there_are_as_many_rows_as_records_and_each_says_the_same(letters):
    layout = Layout(DeadLetter)
    found = parquet_rows(table(".parquet", layout, *letters))
    assert [row["dead_letter_id"] for row in found] == [record_id(one) for one in letters]
    assert [row["payload"] for row in found] == [one.payload for one in letters]
    assert [row["failed_at"] for row in found] == [one.failed_at for one in letters]
    shown = csv_rows(table(".csv", layout, *letters))
    assert [row["dead_letter_id"] for row in shown] == [row["dead_letter_id"] for row in found]
    assert [row["payload"] for row in shown] == [guarded(one.payload) for one in letters]


def test_a_row_group_is_written_before_memory_is_full(monkeypatch):
    monkeypatch.setattr(tables, "GROUP_ROWS", 2)
    content = table(".parquet", Layout(type(DRAFT)), *[DRAFT] * 5)
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups == 3
    assert len(parquet_rows(content)) == 5


# Formulas.


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", " =1", "\t=1", "\t1", "\r1", "\n1", "＝1",
     "－1", "﹢1", "\u200b=1", "\ufeff@x", "\xa0-1", "−1", "\0=1"],
)  # fmt: skip
def test_what_could_be_a_formula_begins_with_an_apostrophe(text):
    assert guarded(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", " ", "late", "1-1", "a=b", "'=1", "(-1)", "😡", "é", "„=1“"])
def test_what_is_no_formula_stays_as_it_is(text):
    assert guarded(text) == text


@given(
    text=st.text(st.characters(codec="utf-8")) | st.text("=+-@ \t\r\n'\"＝－\u200b1a,;", max_size=6)
)
@settings(deadline=None)
def test_no_cell_of_a_table_is_a_formula(text):
    file, name = io.BytesIO(), f"{text}|"
    writer = CsvWriter(file, {"": "STRING", name: "STRING"})
    writer.write({"": text, name: text})
    rows = list(csv.reader(io.StringIO(file.getvalue().decode("utf-8-sig"), newline="")))
    assert [len(row) for row in rows] == [2, 2]
    for found, meant in zip((*rows[0], *rows[1]), ("", name, text, text), strict=True):
        assert found in (meant, f"'{meant}")
        seen = "".join(c for c in found if unicodedata.category(c)[0] not in "ZC")
        assert not unicodedata.normalize("NFKC", seen).startswith(("=", "+", "-", "@"))
        assert not found.startswith(("\t", "\r", "\n"))


def test_numbers_stay_numbers():
    (row,) = csv_rows(table(".csv", Layout(type(ANALYSIS)), ANALYSIS))
    assert row["sentiment"] == "-1"


# Files of a batch.


def test_a_run_writes_the_files_that_are_named(tmp_path, lines, script, capsys):
    path = lines(chat("late", chat_id="1"), chat("late", chat_id="2"), "no json")
    answer = {"sentiment": -1, "summary": "=It is late."}
    model = script({"task": "analysis", "answer": answer}, {"task": "apology", "answer": "Sorry."})
    out = tmp_path / "out"
    arguments = [
        "run", "--input", path, "--analyses", f"{out}/a.csv,{out}/a.parquet,{out}/a", "--drafts",
        f"{out}/d.parquet", "--dead_letters", f"{out}/l.CSV", "--model", model, "--summary=json",
    ]  # fmt: skip
    for _ in range(2):  # the second run replaces the files of the first
        assert main(arguments) == 0
        files = json.loads(capsys.readouterr().out)["files"]
        assert files["analyses"] == [
            f"{out}/a.csv", f"{out}/a.parquet", f"{out}/a-00000-of-00001.jsonl",
        ]  # fmt: skip
        assert (files["drafts"], files["dead_letters"]) == (
            [f"{out}/d.parquet"], [f"{out}/l.CSV"],
        )  # fmt: skip
        shown = csv_rows((out / "a.csv").read_bytes())
        assert sorted(row["chat_id"] for row in shown) == ["1", "2"]
        assert all(row["summary"].startswith(("'=", "Customer")) for row in shown)
        assert len(parquet_rows((out / "a.parquet").read_bytes())) == 2
        assert [row["text"] for row in parquet_rows((out / "d.parquet").read_bytes())]
        (letter,) = csv_rows((out / "l.CSV").read_bytes())
        assert (letter["reason"], letter["payload"]) == ("not_json", "no json")
    manifest = json.loads((out / "manifest.json").read_text())
    counts = {result["path"]: result["records"] for result in manifest["results"]}
    assert counts == {
        "a.csv": 2, "a.parquet": 2, "a-00000-of-00001.jsonl": 2, "d.parquet": 2, "l.CSV": 1,
    }  # fmt: skip
    assert not [name for name in os.listdir(out) if name.startswith(("beam-", ".chatflow-new"))]


def test_a_table_is_shown_by_its_name_alone(tmp_path, lines, script, capsys):
    """Not by its content, which is not read back."""
    model = script({"task": "analysis", "answer": {"sentiment": 1, "summary": "All is well."}})
    arguments = ["run", "--input", lines(chat("thanks")), "--model", model, "--output"]
    assert main([*arguments, f"{tmp_path}/out", "--analyses", f"{tmp_path}/out/a.csv"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/out/a.csv" in shown.replace("\n", "")


def test_an_empty_table_has_its_columns(tmp_path):
    pipeline = new_pipeline()
    records = pipeline | beam.Create([]).with_output_types(type(DRAFT))
    records | WriteRecords([f"{tmp_path}/d.csv", f"{tmp_path}/d.parquet"])
    launch(pipeline)
    assert (tmp_path / "d.csv").read_text("utf-8-sig").startswith("draft_id,analysis_id,chat_id,")
    assert pq.read_schema(tmp_path / "d.parquet").names == list(Layout(type(DRAFT)).columns)


def test_fields_have_columns_in_a_pipeline_of_ones_own(tmp_path):
    pipeline = new_pipeline()
    records = pipeline | beam.Create([CHOSEN]).with_output_types(type(CHOSEN))
    records | WriteRecords([f"{tmp_path}/a.csv"], SinkSettings(fields=("topic",)))
    launch(pipeline)
    (row,) = csv_rows((tmp_path / "a.csv").read_bytes())
    assert row["field.topic"] == "delivery"
    assert json.loads(row["fields"])["grievances"]["value"] == ["late", "rude"]


def test_records_of_no_known_kind_make_no_table(tmp_path):
    with pytest.raises(UsageError, match=r"with_output_types\(Analysis\)"):
        new_pipeline() | beam.Create([ANALYSIS, DRAFT]) | WriteRecords([f"{tmp_path}/a.csv"])


# Files of a stream.


def appended(do, *records):
    do.start_bundle()
    for record in records:
        do.process(record)
    do.finish_bundle()


@pytest.mark.parametrize(("ending", "read"), [(".csv", csv_rows), (".parquet", parquet_rows)])
def test_a_streams_table_appears_whole(tmp_path, ending, read):
    uri = f"{tmp_path}/a{ending}"
    do = _AppendDoFn(uri, 600, 2, Layout(type(ANALYSIS)))
    do.setup()
    appended(do, ANALYSIS)
    assert result_files(uri) == []
    appended(do, ANALYSIS.model_copy(update={"analysis_id": "a2"}))  # full
    (found,) = result_files(uri)
    assert Path(found).name.startswith("a-20260301T100000Z-")
    assert [row["analysis_id"] for row in read(Path(found).read_bytes())] == ["a1", "a2"]
    appended(do, ANALYSIS)
    do.teardown()
    assert len(result_files(uri)) == 2 == len(os.listdir(tmp_path))


def test_a_streams_table_elsewhere_is_the_same_when_it_is_written_again(tmp_path):
    sink = AppendFiles(f"{tmp_path}/a.parquet")
    given = [record.to_json() + "\n" for record in (ANALYSIS, CHOSEN)]
    layout = Layout(type(ANALYSIS))
    one, again = sink.write("", given, layout), sink.write("", given[::-1], layout)
    assert one == again
    assert os.listdir(tmp_path) == [Path(one).name]
    assert len(parquet_rows(Path(one).read_bytes())) == 2


def killed_stream(warm, uri):
    """The process of a stream that has acknowledged one record, and begun a second."""
    program = (
        "import os, conftest; from chatflow.sinks.files import _AppendDoFn;"
        "from chatflow.sinks.tables import Layout; from chatflow.records import Analysis;"
        f"do = _AppendDoFn({uri!r}, 30, 10, Layout(Analysis, ('topic',))); do.setup();"
        "do.start_bundle(); do.process(conftest.ANALYSIS); do.finish_bundle();"
        "do.file.write(b'{half'); do.file.flush(); os.kill(os.getpid(), 9)"
    )
    done = warm.run("-c", program, cwd=ROOT)
    assert done.returncode == -9, done.complained


def test_what_a_killed_stream_wrote_becomes_a_table(tmp_path, monkeypatch, warm):
    uri = f"{tmp_path}/a.csv"
    killed_stream(warm, uri)
    (left,) = tmp_path.glob("*.part")
    with monkeypatch.context() as patch:  # the next run is killed while it makes the table
        patch.setattr("chatflow.sinks.files.move", interrupted)
        with pytest.raises(KeyboardInterrupt), open_results([uri], [], True, True, "test"):
            pass
    assert left.exists()
    for _ in range(2):
        with open_results([uri], [], True, True, "test"):
            (found,) = result_files(uri)
    (row,) = csv_rows(Path(found).read_bytes())
    assert (row["analysis_id"], row["field.topic"]) == ("a1", "")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".chatflow-lock", Path(found).name}


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_table_that_cannot_be_made_now_is_made_by_the_next_run(tmp_path, monkeypatch, caplog):
    """Its records are on the disk: the bundle ends well, and they are not written again."""
    uri = f"{tmp_path}/a.csv"
    do = _AppendDoFn(uri, 600, 1, Layout(type(ANALYSIS)))
    do.setup()
    with monkeypatch.context() as patch:
        patch.setattr("chatflow.sinks.files.move", full_disk)
        appended(do, ANALYSIS)
    assert "the next run does it" in caplog.text
    assert "No space left on device" in caplog.text
    appended(do, ANALYSIS.model_copy(update={"analysis_id": "a2"}))
    do.teardown()
    assert len(result_files(uri)) == 1
    with open_results([uri], [], True, True, "test"):
        found = [csv_rows(Path(path).read_bytes()) for path in result_files(uri)]
    assert sorted(row["analysis_id"] for rows in found for row in rows) == ["a1", "a2"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_leftover_that_is_no_stream_of_tables_is_told(tmp_path):
    (tmp_path / f"a.csv-{'0' * 32}.part").write_text("{}\n{}\n")
    with (
        pytest.raises(UsageError, match="cannot be turned into a table"),
        open_results([f"{tmp_path}/a.csv"], [], True, True, "test"),
    ):
        pass


def test_a_file_that_fails_half_way_is_not_there(tmp_path):
    (tmp_path / "x").write_text("before")
    opened = whole_file(f"{tmp_path}/x")
    opened.__enter__().write(b"half")
    assert opened.__exit__(OSError, OSError("the disk is full"), None) is False
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "before"}


def test_a_table_holds_one_kind_of_records(tmp_path):
    (uri,) = split_destinations("drafts", f"{tmp_path}/x.csv", "")
    with pytest.raises(UsageError, match=r"--analyses, --drafts: '.*' is a table of one kind"):
        Files().check({uri: ["analyses", "drafts"]}, SinkSettings(streaming=True), True, True)
