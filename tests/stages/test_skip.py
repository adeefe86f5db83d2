"""Chats that are in earlier results are skipped; changed ones are asked about again."""

import pytest
from conftest import APOLOGY, chat, mistake, read

from chatflow.errors import UsageError
from chatflow.options import Options
from chatflow.running.launch import execute

ANGRY = {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}}
FAILING = {"task": "apology", "match": "number 1", "error": "down"}


def run(out, lines, chats, model, name="chats.jsonl", **flags):
    options = Options(input=lines(*chats, name=name), output=str(out), model=model, **flags)
    return execute(options, []).to_dict()


def chats(*numbers, more=""):
    return [chat(f"late, number {n}{more}", chat_id=str(n)) for n in numbers]


@pytest.fixture(params=["files", "database"])
def earlier(request, tmp_path):
    """Where the first run writes, and what the second is told to leave out."""
    if request.param == "files":
        return {}, f"{tmp_path}/one/*.jsonl"
    uri = f"sqlite:///{tmp_path}/results.db"
    return {"database": uri}, uri


def test_only_what_is_not_there_is_asked_about(tmp_path, lines, script, earlier):
    flags, place = earlier
    first = run(tmp_path / "one", lines, chats(1, 2, 3), script(ANGRY, APOLOGY), **flags)
    assert first["analysed"] == 3
    grown = chats(2, more=", and again")
    again = [*chats(1, 3, 4), *grown]
    second = run(tmp_path / "two", lines, again, script(ANGRY, APOLOGY), skip_done=place)
    assert (second["skipped"], second["analysed"], second["lost"]) == (2, 2, 0)
    assert {a["chat_id"] for a in read(tmp_path / "two", "analyses")} == {"2", "4"}
    assert {d["chat_id"] for d in read(tmp_path / "two", "drafts")} == {"2", "4"}


def test_a_draft_that_is_missing_is_written_without_a_new_analysis(
    tmp_path, lines, script, earlier
):
    flags, place = earlier
    model = script(FAILING, ANGRY, APOLOGY)
    first = run(tmp_path / "one", lines, chats(1, 2), model, **flags)
    assert (first["drafted"], first["dead_letters"]) == (1, 1)
    second = run(tmp_path / "two", lines, chats(1, 2), script(ANGRY, APOLOGY), skip_done=place)
    assert (second["skipped"], second["analysed"], second["drafted"], second["lost"]) == (
        2,
        0,
        1,
        0,
    )
    (draft,) = read(tmp_path / "two", "drafts")
    (analysis,) = (a for a in read(tmp_path / "one", "analyses") if a["chat_id"] == "1")
    assert (draft["chat_id"], draft["analysis_id"]) == ("1", analysis["analysis_id"])


def test_another_prompt_asks_anew(tmp_path, lines, script):
    model = script(ANGRY, APOLOGY)
    run(tmp_path / "one", lines, chats(1, 2), model)
    place = f"{tmp_path}/one"
    second = run(
        tmp_path / "two", lines, chats(1, 2), model, skip_done=place, max_prompt_tokens=1000
    )
    assert (second["skipped"], second["analysed"]) == (0, 2)


def test_results_that_would_be_replaced_are_no_earlier_ones(tmp_path, lines, script, capsys):
    run(tmp_path / "one", lines, chats(1), script(ANGRY, APOLOGY))
    path = lines(*chats(1, 2))
    arguments = [
        "run", "--input", path, "--output", f"{tmp_path}/one", "--model", script(ANGRY, APOLOGY),
        "--skip_done", f"{tmp_path}/one",
    ]  # fmt: skip
    error = mistake(arguments, {}, capsys)
    assert "would replace" in error
    assert len(read(tmp_path / "one", "analyses")) == 1


def test_a_table_of_results_cannot_be_read_back_and_is_refused(tmp_path, lines, script, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    path = lines(*chats(1), name="in/chats.jsonl")
    arguments = [
        "run", "--input", path, "--output", f"{tmp_path}/out", "--model", script(ANGRY),
        "--skip_done", f"{tmp_path}/a.parquet",
    ]  # fmt: skip
    error = mistake(arguments, {}, capsys)
    assert "a.parquet is a table, which lacks parts of the results" in error


def test_a_database_that_is_not_there_is_told(tmp_path, lines, script):
    with pytest.raises(UsageError, match=r"--skip_done: .*x\.db: there is no such file"):
        run(
            tmp_path / "one", lines, chats(1), script(ANGRY), skip_done=f"sqlite:///{tmp_path}/x.db"
        )


def test_no_results_and_streams_are_refused(tmp_path, lines, script):
    with pytest.raises(UsageError, match=r"--skip_done: no file matches"):
        run(tmp_path / "one", lines, chats(1), script(ANGRY), skip_done=f"{tmp_path}/none*.jsonl")
    stream = Options(
        input="projects/p/subscriptions/s", output="x", model=script(ANGRY), skip_done="y"
    )
    with pytest.raises(UsageError, match="--skip_done: only with files"):
        execute(stream, [])


def test_a_line_that_is_no_result_is_left_out_and_counted(tmp_path, lines, script):
    broken = lines("{not JSON", {"chat_id": "1"}, name="earlier.jsonl")
    counts = run(tmp_path / "one", lines, chats(1), script(ANGRY, APOLOGY), skip_done=broken)
    assert (counts["analysed"], counts["skipped"], counts["lost"]) == (1, 0, 0)
