"""Flags: declared once, on the settings that use them; booleans in each spelling."""

import dataclasses

import pytest

from chatflow.errors import UsageError
from chatflow.options import (
    Batching,
    Options,
    Parser,
    RemoteSettings,
    Rules,
    SinkSettings,
    WorkerSettings,
    add_flags,
    from_flags,
)


def parsed(*arguments):
    parser = Parser(allow_abbrev=False)
    parser.add_argument("file", nargs="?")
    add_flags(parser)
    return parser.parse_known_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], True),
        (["--large_model"], True),
        (["--large_model=true"], True),
        (["--large_model", "true"], True),
        (["--large_model=false"], False),
        (["--large_model", "false"], False),
        (["--large_model=False"], False),
        (["--nolarge_model"], False),
        (["--nolarge_model", "--large_model"], True),
    ],
)
def test_a_boolean_is_taken_in_each_spelling(arguments, value):
    found, rest = parsed(*arguments)
    assert (from_flags(found).large_model, rest) == (value, [])


def test_a_boolean_takes_no_file_for_its_value_and_leaves_beams_flags_alone():
    found, rest = parsed("--prompt_updates", "chats.jsonl", "--no_use_public_ips", "--streaming")
    assert (found.prompt_updates, found.file) == (True, "chats.jsonl")
    assert rest == ["--no_use_public_ips", "--streaming"]


@pytest.mark.parametrize("argument", ["--large_model=maybe", "--max_messages=many"])
def test_a_value_of_another_type_names_its_flag(argument):
    with pytest.raises(UsageError, match=argument.split("=")[0]):
        parsed(argument)


def test_the_negative_of_a_boolean_has_no_value():
    assert parsed("--nolarge_model=true")[1] == ["--nolarge_model=true"]


def test_flags_are_written_as_they_are_read():
    options = Options(input="x", large_model=False, prompt_updates=True, quiet_seconds=3.0)
    found, rest = parsed(*options.flags())
    assert from_flags(found) == options
    assert not rest


@pytest.mark.parametrize("kind", [SinkSettings, Rules, Batching, WorkerSettings, RemoteSettings])
def test_options_are_the_settings_of_all_kinds(kind):
    assert Options().take(kind) == kind()
    changed = {
        name: known["choices"][-1] if known["choices"] and isinstance(known["default"], str) else
        not known["default"] if isinstance(known["default"], bool) else
        known["default"] + 1 if isinstance(known["default"], (int, float)) else "5"
        for name, known in kind.defaults().items()
        if name not in ("large_model", "vllm_args")
    }  # fmt: skip
    assert Options(**changed).take(kind) == dataclasses.replace(kind(), **changed)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Rules, {"quiet_seconds": 0}, "--quiet_seconds=0: must be at least 0.001"),
        (Rules, {"quiet_seconds": 90_000}, "must be less than --retention_hours=24.0"),
        (WorkerSettings, {"dtype": "int3"}, "--dtype=int3: must be one of auto, float32"),
        (Batching, {"batch_buckets": "a"}, "--batch_buckets=a: must be numbers"),
        (RemoteSettings, {"max_in_flight": 0}, "--max_in_flight=0: must be at least 1"),
    ],
)
def test_settings_are_checked_wherever_they_are_made(kind, values, message):
    for make in (kind, Options):
        with pytest.raises(UsageError, match=message):
            make(**values)


def test_where_a_secret_is_said_to_be_is_not_printed():
    """Somebody may give the secret itself."""
    assert "hunter2" not in repr(Options(webhook_secret="hunter2", database_password="hunter2"))
