"""A pipeline of your own: it is checked, run and let go by `launch`, from public names alone."""

import json

import apache_beam as beam
import pytest
from conftest import read

from chatflow import (
    AskTexts,
    Model,
    ReadLines,
    ScriptedModelHandler,
    UsageError,
    WriteRecords,
    launch,
    load_template,
    new_pipeline,
)


def pipeline_of(folder, pattern="*.txt", results="out", flags=()):
    (folder / "say.jinja").write_text(
        "{% set answer_tokens = 9 %}{% block prompt %}{{ text }}{% endblock %}"
    )
    model = Model(ScriptedModelHandler(lambda request: request.parts[0].prompt.upper()))
    ask = AskTexts(model, load_template(folder / "say.jinja"))
    pipeline = new_pipeline(flags)
    asked = pipeline | ReadLines(f"{folder}/{pattern}") | "AskTexts" >> ask
    asked.ok | "WriteResponses" >> WriteRecords([f"{folder}/{results}/responses"])
    asked.dead_letters | "WriteDeadLetters" >> WriteRecords([f"{folder}/{results}/dead_letters"])
    return pipeline


def fail(element):
    raise RuntimeError("a mistake in a stage")


def test_it_runs_and_replaces_the_results_of_an_earlier_run(tmp_path):
    (tmp_path / "a.txt").write_text("late\nlost\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "responses-00000-of-00007.jsonl").write_text('{"text": "stale"}\n')
    launch(pipeline_of(tmp_path))
    responses = read(tmp_path / "out", "responses")
    assert sorted(found["response"] for found in responses) == ["LATE", "LOST"]
    assert read(tmp_path / "out", "dead_letters") == []
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [result["path"] for result in manifest["results"]] == [
        "responses-00000-of-00001.jsonl", "dead_letters-00000-of-00001.jsonl",
    ]  # fmt: skip
    assert [found["bytes"] for found in manifest["inputs"]] == [10]
    assert manifest["counts"]["answered/say"] == 2


def test_a_pipeline_that_fails_leaves_the_results_of_an_earlier_run(tmp_path):
    (tmp_path / "a.txt").write_text("late\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "responses-00000-of-00007.jsonl").write_text('{"text": "stale"}\n')
    pipeline = pipeline_of(tmp_path)
    pipeline | "One" >> beam.Create([1]) | "Fail" >> beam.Map(fail)
    with pytest.raises(Exception, match="a mistake in a stage"):
        launch(pipeline)
    assert read(tmp_path / "out", "responses") == [{"text": "stale"}]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".chatflow-lock", "responses-00000-of-00007.jsonl",
    ]  # fmt: skip


def test_a_pipeline_that_is_run_without_launch_writes_where_it_says(tmp_path):
    (tmp_path / "a.txt").write_text("late\n")
    pipeline_of(tmp_path).run().wait_until_finish()
    assert [found["response"] for found in read(tmp_path / "out", "responses")] == ["LATE"]


def test_what_cannot_be_read_is_said_before_anything_runs(tmp_path):
    (tmp_path / "out").mkdir()
    earlier = tmp_path / "out" / "responses-00000-of-00001.jsonl"
    earlier.write_text("{}\n")
    with pytest.raises(UsageError, match=r"ReadLines: no file matches '.*/\*\.none'"):
        launch(pipeline_of(tmp_path, "*.none"))
    assert earlier.exists()


def test_what_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "a.txt").write_text("late\n")
    (tmp_path / "taken").write_text("a file, where the folder is to be")
    with pytest.raises(UsageError, match="cannot be written"):
        launch(pipeline_of(tmp_path, results="taken"))


def test_a_flag_that_beam_does_not_know_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown flag --no_such"):
        new_pipeline(["--no_such=1"])
