"""The first results of files, and what a run says, while the model still answers."""

import contextlib
import io
import json
import sqlite3
import subprocess
import sys
import threading
import time

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to
from conftest import ROOT
from rich.console import Console

from chatflow import metrics
from chatflow.models.gemma.handler import GemmaModelHandler
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.options import Batching
from chatflow.records import Analysis, now
from chatflow.running.runner import beam_options
from chatflow.running.terminal import lines, progress

ONE = {"messages": [{"user_id": "u", "role": "customer", "text": "Too late!"}]}


@pytest.mark.slow
def test_results_are_shown_and_written_while_the_model_still_answers(tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"chat_id": name, **ONE}) + "\n" for name in "123")
    )
    answer = {"task": "analysis", "answer": {"sentiment": 0, "summary": "It came too late."}}
    rules = [{**answer, "times": 2}, {**answer, "stall_seconds": 600}]  # the third
    (tmp_path / "script.jsonl").write_text("".join(json.dumps(rule) + "\n" for rule in rules))
    database = tmp_path / "results.db"
    command = [
        sys.executable, "-m", "chatflow", "run", f"--input={tmp_path}/chats.jsonl",
        f"--output={tmp_path}/out", f"--database=sqlite:///{database}", "--max_batch_size=1",
        f"--model=scripted:{tmp_path}/script.jsonl",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        try:
            assert " u: " in next(line for line in run.stderr if "neutral" in line)
            while not analyses_in(database):
                assert run.poll() is None
                time.sleep(0.1)
            assert analyses_in(database) < 3
        finally:
            run.kill()


def analyses_in(database):
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ((count,),) = connection.execute("SELECT count(*) FROM analyses")
        return count


def analysis(number):
    return Analysis(
        analysis_id=str(number), chat_id=f"chat-{number}", user_id="u", revision=0, sentiment=-1,
        summary="Too [late].", model="m", prompt_version="p", analysed_at=now(),
    )  # fmt: skip


class Said(io.StringIO):
    """A terminal or a file, which tells when a text has been printed."""

    def __init__(self, awaited, terminal=False):
        super().__init__()
        self.awaited, self.terminal, self.arrived = awaited, terminal, threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        written = super().write(text)
        if self.awaited in self.getvalue():
            self.arrived.set()
        return written


def test_lines_say_the_first_result_once_and_what_the_run_waits_for():
    said = Said("loading big")
    with (
        lines(
            Console(file=said, width=200),
            lambda: "; ".join(what for what, _ in metrics.waits()),
            every=0.3,
            first=lambda: "the first",
        ),
        metrics.waiting("loading big"),
    ):
        assert said.arrived.wait(60)
    assert said.getvalue().count("the first") == 1
    assert metrics.waits() == []


@pytest.mark.parametrize("results", [True, False])
def test_a_terminal_shows_parts_of_batches_waits_and_the_newest_results(results):
    said = Said("compiling, once: ", terminal=True)
    console = Console(file=said, force_terminal=True, width=100, height=30)
    with progress(console, results), metrics.waiting("compiling, once"):
        for number in range(9):
            metrics.result(analysis(number))
        metrics.note("requests_read", 4)
        metrics.note("tokens", 1234)
        assert said.arrived.wait(60)
    shown = said.getvalue()
    assert ("chat-8" in shown) == ("Too [late]." in shown) == results
    assert "chat-3" not in shown
    assert "1234/1234" in shown
    assert "4/" in shown


def test_batches_of_texts_that_are_read_begin_small():
    handler = GemmaModelHandler(heads="support-2", batching=Batching(max_batch_duration_secs=0))
    with beam.Pipeline(options=beam_options([])) as pipeline:
        numbers = pipeline | beam.Create([list(range(100))]) | beam.FlatMap(lambda all: all)
        batches = numbers | beam.BatchElements(**handler.batch_elements_kwargs())
        assert_that(batches | beam.Map(len), equal_to([4, 4, 8, 16, 32, 32, 4]))


def test_batches_of_streams_and_of_texts_that_are_written_are_full():
    for handler in (
        GemmaModelHandler(heads="support-2", batching=Batching()),
        GemmaModelHandler(batching=Batching(max_batch_duration_secs=0)),
    ):
        assert handler.batch_elements_kwargs()["min_batch_size"] == 32


class Ahead(ScriptedModelHandler):
    """Loads ahead, and counts its loads."""

    loads_ahead = True

    def load(self, *version):
        self.loads = getattr(self, "loads", 0) + 1
        if self.name == "broken":
            raise RuntimeError("no weights")
        return super().load(*version)


def test_a_model_that_is_loaded_ahead_is_the_one_that_is_used():
    handler = Ahead(lambda request: "answer")
    with handler.ahead():
        model = handler.load_model()
        assert handler.load_model() is model
    assert handler.loads == 1
    with handler.ahead():
        pass
    handler.load_model()
    assert handler.loads >= 1


def test_what_a_model_raises_that_is_loaded_ahead_is_raised_where_it_is_used():
    handler = Ahead(lambda request: "answer")
    handler.name = "broken"
    with handler.ahead(), pytest.raises(RuntimeError, match="no weights"):
        handler.load_model()
