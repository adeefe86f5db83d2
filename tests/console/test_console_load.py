"""The console under load, with a process killed: nothing is lost, nothing doubled."""

import importlib.util
import sys

import pytest
from conftest import ROOT

BENCH = ROOT / "bench" / "console.py"


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_console", BENCH)
    sys.modules[spec.name] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.slow
def test_a_short_soak_loses_and_doubles_nothing(new_database, tmp_path):
    bench = load_bench()
    load = bench.Load(
        seconds=3, writers=4, readers=10, kill_every=1.5, lease=0.5, undo_seconds=0.5, pause=0.1,
        least=frozenset({"approve", "dismiss", "undo"}), in_processes=False,
    )  # fmt: skip
    figures = bench.soak(new_database, tmp_path, load, lambda _: None)
    assert figures["wrong"] == []
    assert figures["kills"] == 1
    assert figures["replies"] > 0
    assert set(figures["decisions"]) >= {"approved", "dismissed", "undone"}
