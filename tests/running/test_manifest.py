"""What a manifest says of a run, and what it never says."""

import hashlib
import os

import pytest

from chatflow.options import Options
from chatflow.records import now
from chatflow.running.manifest import Manifest, shown_flags


def test_inputs_have_sizes_and_hashes_if_they_are_files_of_this_machine(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    os.mkfifo(tmp_path / "pipe")  # to read it again would wait for ever
    inputs = [str(path), str(tmp_path / "pipe"), str(tmp_path / "gone")]
    assert Manifest(now(), inputs).content({})["inputs"] == [
        {"path": inputs[0], "bytes": 3_000_000,
         "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        {"path": inputs[1], "bytes": 0},
        {"path": inputs[2]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("database", "postgresql+psycopg://me:pa:ss@h/n", "postgresql+psycopg://me:***@h/n"),
        ("analyses", "out/a,https://h/p?token=x", "out/a,https://h/p?…"),
        ("webhook_secret", "whsec_x", "***"),
        ("database_password", "hunter2", "***"),
        ("summary", "json", "json"),
    ],
)
def test_flags_are_shown_without_secrets(flag, value, shown):
    assert shown_flags(Options(**{flag: value})) == [f"--{flag}={shown}"]
