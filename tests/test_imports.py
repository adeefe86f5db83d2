"""A run imports neither other frameworks nor plots, also where they are installed."""

import concurrent.futures
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT, required

from chatflow.imports import without

NEEDLESS = ("torch", "matplotlib", "tensorflow", "scipy.optimize", "rouge_score")

PROGRAM = """
import json, sys
from chatflow.cli import main
code = main(sys.argv[1:])
print(json.dumps([name for name, module in sys.modules.items() if module]), file=sys.stderr)
sys.exit(code)
"""


def imported(tmp_path, *flags):
    """Returns the names of the modules that a run has imported."""
    chats = [
        {"chat_id": "1", "messages": [{"user_id": "u", "role": "customer", "text": "Too late!"}]}
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    command = ["run", f"--input={tmp_path}/chats.jsonl", f"--output={tmp_path}/out", *flags]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stderr.splitlines()[-1]))


def of(names):
    return {n for n in names if any(f"{n}.".startswith(f"{top}.") for top in NEEDLESS)}


def test_a_run_imports_what_it_needs(tmp_path):
    (tmp_path / "script.jsonl").write_text(
        '{"task": "analysis", "answer": {"sentiment": -1, "summary": "Late."}}\n'
        '{"task": "apology", "answer": "We are sorry."}\n'
    )
    names = imported(tmp_path, f"--model=scripted:{tmp_path}/script.jsonl")
    assert "apache_beam" in names
    assert not of(names)
    assert not names & {"jax", "keras"}


@pytest.mark.gemma
def test_a_run_with_gemma_imports_what_it_needs(tmp_path):
    if not importlib.util.find_spec("keras_hub"):
        required("keras_hub", "pip install 'chatflow[gemma]'")
    names = imported(tmp_path)
    assert {"jax", "keras", "keras_hub"} <= names
    assert not of(names)


def test_what_is_hidden_can_be_imported_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with without("wave", "json"):
        importlib.import_module("json")  # imported before, so that it stays
        with pytest.raises(ImportError):
            importlib.import_module("wave")
        with concurrent.futures.ThreadPoolExecutor() as others:  # e.g. who loads another model
            assert others.submit(importlib.import_module, "wave").result().__name__ == "wave"
        monkeypatch.delitem(sys.modules, "wave")
    assert importlib.import_module("wave").__name__ == "wave"
