"""Prism, Beam's portable runner in Go, makes the same records as the local runner."""

import importlib.metadata
import json
import random
import shutil
import subprocess

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


def run(capsys, source, output, model, *flags):
    """Runs `chatflow run` and returns its counts and records, the records without times."""
    arguments = ["run", f"--input={source}", f"--output={output}", f"--model={model}"]
    assert main([*arguments, "--summary=json", *flags]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    records = {kind: sorted(map(timeless, read(output, kind))) for kind in KINDS}
    return {name: summary[name] for name in COUNTED}, records


def timeless(record):
    times = ("analysed_at", "drafted_at", "failed_at")
    return json.dumps({k: v for k, v in record.items() if k not in times}, sort_keys=True)


@pytest.mark.parametrize("whole", [True, False], ids=["chats", "messages"])
def test_prism_makes_the_same_records(whole, prism, lines, script, tmp_path, capsys):
    source = SAMPLES
    if not whole:
        chats, _ = chats_of(SAMPLES.read_bytes().splitlines())
        events = [line.data for line in Replay(chats)]
        random.Random(7).shuffle(events)
        source = lines(*events)
    model = script(BROKEN, HAPPY, ANGRY, APOLOGY)
    here = run(capsys, source, tmp_path / "here", model)
    flags = ("--runner=PrismRunner", f"--prism_location={prism}")
    there = run(capsys, source, tmp_path / "there", model, *flags)
    assert there == here
    counts, records = there
    assert counts["lost"] == 0
    assert (counts["chats_read"], counts["messages_read"]) == ((52, 0) if whole else (0, 220))
    assert [len(records[kind]) for kind in KINDS] == [52, 35, 1] if whole else [57, 38, 1]
