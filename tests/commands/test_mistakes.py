"""Faults of the user and of the machine, on each command: one line, and the right exit code."""

import errno
import gzip
import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import ANGRY, APOLOGY, ROOT, chat, mistake

from chatflow.cli import ShortFormatter, explained, main
from chatflow.commands import size

TOPIC = "--topic=projects/my-project/topics/t"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("rnu", "unknown command 'rnu'; did you mean run?"),
        ("walk", "unknown command 'walk'; see chatflow --help"),
        ("model ftech", "unknown command 'ftech'; did you mean fetch?"),
        ("--versoin", "unknown flag --versoin; did you mean --version?"),
        ("--input x run", "unknown flag --input; flags follow the command"),
        ("run --inptu x --output y", "unknown flag --inptu; did you mean --input?"),
        ("run --inptu=x --output=y", "unknown flag --inptu=x; did you mean --input?"),
        ("run -input x --output y", "unknown flag -input; did you mean --input?"),
        ("run --max-batch-size=3", "did you mean --max_batch_size?"),
        ("run --nolarge_modl", "did you mean --nolarge_model?"),
        ("run --runer=DataflowRunner", "did you mean --runner?"),
        ("run --region=r --projct p", "unknown flag --projct; did you mean --project?"),
        ("run --xyzzy", "unknown flag --xyzzy; it is neither chatflow's nor Beam's"),
        ("replay --otuput x", "did you mean --output?"),
        ("stream --raet 3", "did you mean --rate?"),
        ("evaluate --compair x", "did you mean --compare?"),
        ("publish --tpic x", "did you mean --topic?"),
        ("tail --cuont 3", "did you mean --count?"),
        ("tune --epoch 3", "did you mean --epochs?"),
        ("console --databse x", "did you mean --database?"),
        ("size --modle x", "did you mean --model?"),
        ("model fetch --sumary x", "did you mean --summary?"),
        ("publish", "FILE is missing: JSON Lines"),
        ("publish x.jsonl", "--topic is missing: projects/PROJECT/topics/NAME"),
        ("tail", "PATH is missing"),
        ("model convert", "SOURCE is missing: see chatflow model convert --help"),
        ("run --inference cloud", "--inference: invalid choice: 'cloud' (choose from 'on_worker'"),
    ],
)
def test_what_was_mistyped_is_said_first(command, says, capsys):
    assert says in mistake(command.split(), {}, capsys)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("run --input ONE TWO --output o", "put it into quotes: --input 'DIR/*.jsonl'"),
        ("run --input=ONE TWO --output o", "put it into quotes: --input 'DIR/*.jsonl'"),
        ("run --output o --input ONE TWO", "the shell expanded a pattern"),
        ("run --input ONE gone.jsonl.gz --output o", "quotes: --input '*.gz'"),
        ("replay --input ONE TWO TWO --output o", "unexpected argument 'TWO': the shell"),
        ("publish ONE TWO --topic t", "put it into quotes: 'DIR/*.jsonl'"),
        ("publish --topic t ONE TWO", "put it into quotes: 'DIR/*.jsonl'"),
        ("stream --chats ONE TWO", "put it into quotes: --chats 'DIR/*.jsonl'"),
        ("run ONE --output o", "unexpected argument 'ONE'; did you mean --input 'ONE'?"),
        ("run --input ONE --output my folder", "'folder'; --output takes one value"),
        ("evaluate ONE TWO", "unexpected argument 'TWO'; LABELLED.jsonl takes one value"),
        ("console ONE", "unexpected argument 'ONE'; see chatflow console --help"),
        ("run --input ONE --runner=DirectRunner TWO --output o", "unexpected argument 'TWO'"),
    ],
)
def test_a_pattern_without_quotes_is_recognised(command, says, lines, tmp_path, capsys):
    places = {"ONE": lines(name="one.jsonl"), "TWO": lines(name="two.jsonl")}
    for name, path in {**places, "DIR": str(tmp_path)}.items():
        says = says.replace(name, path)
    assert says in mistake(command.split(), places, capsys)


@pytest.mark.parametrize(("arguments", "named"), [([], "publish"), (["model"], "convert")])
def test_without_a_command_all_are_listed(arguments, named, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert named in said.err
    assert said.out == ""


def labelled_chat(chat_id="7"):
    return {**json.loads(chat("x", chat_id=chat_id).to_json()), "sentiment": 1}


@pytest.fixture
def files(tmp_path, lines):
    """Files by name that are not what a command expects; `nowhere` is missing."""
    labelled = (json.dumps(labelled_chat(str(n))).encode() + b"\n" for n in range(5000))
    whole = gzip.compress(b"".join(labelled))
    (tmp_path / "folder").mkdir()
    contents = {
        "empty.jsonl": b"",
        "utf16.jsonl": '{"chat_id": "1"}\n'.encode("utf-16"),
        "binary.jsonl": bytes(range(256)) * 9,
        "nul.jsonl": bytes(99),
        "deep.jsonl": b"[" * 100_000,
        "cut.jsonl.gz": whole[: len(whole) // 2],
        "no.jsonl.gz": b"not compressed",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    names = {name: str(tmp_path / name) for name in ("nowhere", "folder", *contents)}
    return {**names, "CHATS": lines(labelled_chat())}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("nowhere", "nowhere cannot be read: No such file or directory"),
        ("folder", "folder cannot be read: Is a directory"),
        ("empty.jsonl", "has no chat with a label"),
        ("utf16.jsonl", "utf16.jsonl:1: chat 1 has no list of messages"),
        ("deep.jsonl", "deep.jsonl:1: "),
        ("cut.jsonl.gz", "cut.jsonl.gz ends too early"),
        ("no.jsonl.gz", "no.jsonl.gz is not gzip, although its name says so"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_a_file_of_labels_that_is_none(command, file, says, files, capsys):
    assert says in mistake([command, files[file]], {}, capsys)


@pytest.mark.parametrize("file", ["binary.jsonl", "nul.jsonl"])
@pytest.mark.parametrize(
    ("command", "says"), [("evaluate", " is not text; JSON is needed"), ("tune", ":1: ")]
)
def test_a_file_of_labels_that_is_not_text(command, says, file, files, capsys):
    assert f"{file}{says}" in mistake([command, files[file]], {}, capsys)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("publish nowhere TOPIC", "FILE: no file matches"),
        ("publish folder TOPIC", "looked for .jsonl, .json, "),
        ("publish cut.jsonl.gz TOPIC", "FILE: PATH ends too early"),
        ("publish no.jsonl.gz TOPIC --as_messages", "FILE: PATH is not gzip"),
        ("publish CHATS TOPIC --rate=nan", "--rate=nan: must be at least 0"),
        ("stream --chats empty.jsonl", "--chats=PATH: has no chats"),
        ("stream --chats binary.jsonl", "--chats: PATH is not text; JSON is needed"),
        ("stream --chats deep.jsonl", "--chats=PATH: 1 lines or rows are not chats"),
        ("stream --chats cut.jsonl.gz", "--chats: PATH ends too early"),
        ("stream --rate inf", "--rate=inf: must be more than 0"),
        ("stream --console_port 70000", "--console_port: must be a whole number"),
        ("replay --input folder --output OUT", "looked for .jsonl, .json, "),
        ("replay --input nowhere --output OUT", "--input: no file matches"),
        ("replay --input x.csv --output OUT", "x.csv is a table, from which dead letters cannot"),
        (
            "run --input CHATS --analyses x.csv --drafts x.csv --dead_letters y --model SCRIPT",
            "'x.csv' is given twice",
        ),
        ("run --input CHATS --output OUT --quiet_seconds=nan", "--quiet_seconds=nan: must be"),
        ("run --input CHATS --output OUT --quiet_seconds=1e300", "--quiet_seconds=1e+300: must be"),
        ("run --input CHATS --output OUT --retention_hours=inf", "--retention_hours=inf: must be"),
        ("run --input CHATS --output binary.jsonl --model SCRIPT", "cannot be written"),
        ("run --input CHATS --output OUT --model scripted:binary.jsonl", "cannot be read"),
        ("run --input CHATS --output OUT --models binary.jsonl", "--models=PATH: cannot be read"),
        ("run --input CHATS --output OUT --model SCRIPT --prices nul.jsonl", "--prices=PATH"),
        ("evaluate CHATS --history folder", "--history=PATH: cannot be written"),
        ("evaluate CHATS --tolerance nan", "--tolerance: must be a number"),
        ("tail projects/my-project/topic/t", "must be projects/PROJECT/topics/NAME"),
        ("tail projects/my-project/topics/t --count=-1", "--count: must be a whole number"),
        ("console --database sqlite:///binary.jsonl", "cannot be used: file is not a database"),
        ("console --database sqlite:///folder", "cannot be used: unable to open database file"),
        ("console --port 70000", "--port: must be a whole number, 0 or above 0, at most 65535"),
        (f"console --database sqlite:///OUT.db --host {'a' * 70}", "label too long"),
        ("console --database sqlite:///OUT.db --users binary.jsonl", "--users=PATH: is not TOML"),
        ("console --database sqlite:///OUT.db --export folder", "--export=PATH: cannot be written"),
        ("size --prices binary.jsonl", "--prices=PATH"),
        ("size --prices nowhere", "--prices=PATH"),
        ("model fetch folder OUT", "there is no such folder, or it is empty"),
        ("model info nul.jsonl", "its size is not known"),
    ],
)
def test_a_fault_is_one_line_on_each_command(command, says, files, tmp_path, script, capsys):
    places = {**files, "OUT": f"{tmp_path}/out", "SCRIPT": script(ANGRY, APOLOGY), "TOPIC": TOPIC}
    path = next((places[word] for word in places if word in command and word != "CHATS"), "")
    said = mistake(command.split(), places, capsys)
    assert says.replace("PATH", path) in said
    assert "internal error" not in said


def test_a_database_of_a_newer_chatflow(sqlite, capsys):
    with sqlite.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    error = mistake(["console", "--database", sqlite.uri, "--port=0"], {}, capsys)
    assert "was made by a newer chatflow (schema 9999" in error


KEYS = {
    "missing": None,
    "folder": None,
    "text": b"no key",
    "utf16": "{}".encode("utf-16"),
    "other": b'{"type": "authorized_user"}',
    "key": json.dumps(
        {
            "type": "service_account",
            "client_email": "a@example.com",
            "token_uri": "http://127.0.0.1:1/token",
            "private_key": "broken",
        }
    ).encode(),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(
    "command",
    [
        f"publish CHATS {TOPIC}",
        "tail projects/my-project/topics/t",
        "run --input projects/my-project/topics/t --output OUT --model SCRIPT",
        "replay --input CHATS --output OUT --model SCRIPT --drafts projects/my-project/topics/t",
        "evaluate CHATS --model gemini-2.5-flash --inference=remote --project=p --location=global",
        "console --database sqlite:///OUT.db --port=0 --replies=projects/my-project/topics/t",
    ],
)
def test_credentials_that_cannot_be_used_are_one_line(
    command, kind, tmp_path, lines, script, monkeypatch, capsys
):
    (tmp_path / "folder").mkdir()
    if KEYS[kind]:
        (tmp_path / kind).write_bytes(KEYS[kind])
    for name in ("PUBSUB_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / kind))
    places = {
        "CHATS": lines(labelled_chat()),
        "OUT": str(tmp_path / "out"),
        "SCRIPT": script(ANGRY),
    }
    said = mistake(command.split(), places, capsys)
    assert str(tmp_path / kind) in said
    assert "internal error" not in said


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: No space left on device; ma"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "/x: Too many open files; `ulimit"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"/x"), "/x: File name too long"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "ConnectionRefusedError: [Errno "),
        (MemoryError(), "not have enough memory"),
        (RecursionError("too deep"), "internal error: RecursionError: too deep; please report it"),
        (ValueError("a\nb", "c"), "internal error: ValueError: a b: c; please report it"),
        (AssertionError(), "internal error: AssertionError; please report it"),
    ],
)
def test_an_error_that_nobody_expected_is_one_line(error, says, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(size, "run", fail)
    assert main(["size"]) == 1
    said = capsys.readouterr().err
    assert said == f"chatflow: {explained(error)}; --debug shows the whole traceback\n"
    assert says in said


def chatflow(*arguments, **kwargs):
    code = "import sys; from chatflow.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        **{"stdout": subprocess.PIPE, **kwargs},
    )


def test_debug_shows_the_traceback():
    code = (
        "import sys; from chatflow import cli; from chatflow.commands import size\n"
        "size.read_machines = None\n"
        "sys.exit(cli.main(['size', *sys.argv[1:]]))"
    )
    shown = {}
    for flags in ((), ("--debug",)):
        command = [sys.executable, "-c", code, *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1
        shown[flags] = done.stderr
    assert shown[()].startswith("chatflow: internal error: TypeError: ")
    assert shown[()].count("\n") == 1
    assert "Traceback (most recent call last)" in shown["--debug",]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = chatflow("size", "--summary=json", stdout=full)
        said = process.communicate()[1].decode()
    assert process.returncode == 1
    assert "No space left on device" in said
    assert said.count("\n") == 1


def test_a_reader_that_leaves_gets_no_traceback():
    with chatflow("size", "--summary=json") as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_any_character_can_be_printed_in_any_locale(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    name = os.fsencode(str(tmp_path / "Grüße-日")) + b"\xff.toml"
    with chatflow("size", "--prices", name, env=environment) as process:
        said = process.stderr.read().decode("ascii")
    assert process.returncode == 2
    assert r"Gr\xfc\xdfe-\u65e5\udcff.toml" in said
    assert said.count("\n") == 1


def test_a_log_has_no_tracebacks():
    formatter = ShortFormatter("%(levelname)s %(name)s: %(message)s")
    try:
        raise ValueError("a fault")
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord("beam", logging.ERROR, "f", 1, "it failed", (), info)
    assert formatter.format(record) == "ERROR beam: it failed … ValueError: a fault"
    text = "Retry: E\n Traceback for above exception (most recent call last):\n  File x\n"
    record = logging.LogRecord("beam", logging.WARNING, "f", 1, text, (), None)
    assert formatter.format(record) == "WARNING beam: Retry: E … File x"
    record = logging.LogRecord("beam", logging.INFO, "f", 1, "two\nlines", (), None)
    assert formatter.format(record) == "INFO beam: two\nlines"


def test_an_emulator_that_is_gone_is_named(lines, script, monkeypatch, capsys):
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    arguments = ["stream", "--chats", lines(chat("x")), "--model", script(ANGRY)]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "PUBSUB_EMULATOR_HOST=127.0.0.1:1: no emulator answers there: " in said.err
    assert "Traceback" not in said.err + said.out
