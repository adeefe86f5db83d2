"""Prism, Beam's portable runner in Go, makes the same records as the local runner."""

import importlib.metadata
import itertools
import json
import random
import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from conftest import ANGRY, APOLOGY, SAMPLES, read, required

from chatflow.cli import main
from chatflow.records import KINDS
from chatflow.running.publishing import Replay, chats_of

PACKAGE = "github.com/apache/beam/sdks/v2/go/cmd/prism"
HAPPY = {"match": "(?i)thank", "answer": {"sentiment": 1, "summary": "The customer says thanks."}}
BROKEN = {"chat_id": "pizza-late", "task": "analysis", "error": "overloaded"}
COUNTED = (
    "lines_read", "chats_read", "messages_read", "chats_assembled", "asked", "analysed",
    "sentiment", "summaries", "drafted", "drafts_flagged", "dead_letters_by_reason", "lost",
    "reduced", "repaired", "prompt_tokens", "answer_tokens",
)  # fmt: skip
"""The parts of a summary that do not depend on the runner."""


@pytest.fixture(scope="module")
def prism():
    """Returns the path of Prism's binary: in PATH, or where Go installs."""
    found = shutil.which("prism")
    if not found and shutil.which("go"):
        folder = subprocess.check_output(["go", "env", "GOPATH"], text=True).strip()
        found = shutil.which(f"{folder}/bin/prism")
    if not found:
        version = importlib.metadata.version("apache-beam")
        required("Prism", f"install Go, then: go install {PACKAGE}@v{version}")
    return found


SAME = ("lines_read", "chats_read", "messages_read", "lost")
"""Those that do not depend on the order in which messages arrive."""
START = datetime(2026, 3, 1, 10, tzinfo=UTC)


def run(capsys, source, output, model, *flags):
    """Runs `chatflow run` and returns its counts and records, the records without times."""
    arguments = ["run", f"--input={source}", f"--output={output}", f"--model={model}"]
    assert main([*arguments, "--summary=json", *flags]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    records = {kind: [timeless(record) for record in read(output, kind)] for kind in KINDS}
    return {name: summary[name] for name in COUNTED}, records


def timeless(record):
    times = ("analysed_at", "drafted_at", "failed_at")
    return {k: v for k, v in record.items() if k not in times}


@pytest.fixture
def runs(prism, script, tmp_path, capsys):
    """Returns a function that runs a file here and on Prism: counts and records of both."""

    def both(source):
        model = script(BROKEN, HAPPY, ANGRY, APOLOGY)
        here = run(capsys, source, tmp_path / "here", model)
        flags = ("--runner=PrismRunner", f"--prism_location={prism}")
        return here, run(capsys, source, tmp_path / "there", model, *flags)

    return both


def in_order(records):
    return {
        kind: sorted(json.dumps(record, sort_keys=True) for record in found)
        for kind, found in records.items()
    }


def test_prism_makes_the_same_records(runs):
    (here, here_records), (counts, records) = runs(SAMPLES)
    assert counts == here
    assert in_order(records) == in_order(here_records)
    assert counts["lost"] == 0
    assert (counts["chats_read"], counts["messages_read"]) == (52, 0)
    assert [len(records[kind]) for kind in KINDS] == [52, 35, 1]


def shuffled():
    """Returns the samples as messages in any order, and the revision that has all of a chat's."""
    chats, _ = chats_of(SAMPLES.read_bytes().splitlines())
    events, whole = [], {}
    for number, line in enumerate(Replay(chats)):
        event = json.loads(line.data)
        if "text" in event:  # a close has no time: it is that of the newest message so far
            event["sent_at"] = (START + timedelta(milliseconds=number)).isoformat()
        events.append(event)
    for one in chats:
        times = [e["sent_at"] for e in events if e["chat_id"] == one.chat_id and "text" in e]
        assert len(times) == len(one.messages)
        newest = datetime.fromisoformat(times[-1])
        whole[one.chat_id] = round(newest.timestamp() * 1000) + len(times)
    random.Random(7).shuffle(events)
    return events, whole


def revision(record):
    return record["revision"] if "revision" in record else json.loads(record["payload"])["revision"]


def newest(records):
    """Returns the records of each chat's newest revision."""
    last = {}
    for record in itertools.chain(*records.values()):
        chat_id = record["chat_id"]
        last[chat_id] = max(last.get(chat_id, 0), revision(record))
    kept = {
        kind: [record for record in found if revision(record) == last[record["chat_id"]]]
        for kind, found in records.items()
    }
    return last, in_order(kept)


def test_prism_loses_no_message(runs, lines):
    """A close that overtakes messages makes one more revision; how many do is up to the runner."""
    events, whole = shuffled()
    (here, here_records), (counts, records) = runs(lines(*events))
    assert {name: counts[name] for name in SAME} == {name: here[name] for name in SAME}
    assert (counts["chats_read"], counts["messages_read"], counts["lost"]) == (0, 220, 0)
    assert counts["analysed"] == len(records["analyses"])
    last, kept = newest(records)
    assert last == whole
    assert newest(here_records) == (last, kept)
    assert [len(kept[kind]) for kind in KINDS] == [52, 35, 1]
