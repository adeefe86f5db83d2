"""What `chatflow publish` reads and sends: every line, whole files, in bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import re
import threading
import tracemalloc

import pytest
from conftest import chat

from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.running import publishing
from chatflow.running.publishing import Replay, as_they_are, chats_in, chats_of, read_lines
from chatflow.sources.chats import customs_of

ODD = [
    {"chat_id": "1", "messages": [{"role": "customer", "text": "x", "sent_at": at}]}
    for at in ("0001-01-01T00:00:00+02:00", "9999-12-31T23:59:59-02:00", "", 10**30, [1], None)
]
LINES = [
    *(json.dumps(line).encode() for line in ODD),
    b"[" * 100_000, b"\xff\xfe", bytes(9), b"null", b'"\\ud800"', b'{"chat_id": "\\ud800"}',
    b'{"chat_id": {}, "messages": 5}', b'{"chat_id": "1", "event": "closed", "sent_at": -1e999}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_sent_as_it_is_whatever_the_parser_raises(line):
    assert [sent.data for sent in as_they_are([line])] == [line]


@pytest.mark.parametrize("error", [OverflowError, RecursionError, AttributeError, KeyError])
def test_an_error_of_the_parser_stops_nothing(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(publishing, "parse_arrival", fail)
    assert [sent.data for sent in as_they_are([b"{}", b"x"])] == [b"{}", b"x"]
    assert chats_of([b"{}"]) == ([], [b"{}"])


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("x.jsonl", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.jsonl.bz2", bz2.compress),
        ("x.jsonl.xz", lzma.compress),
    ],
)
def test_lines_are_read_again_each_time_and_to_the_end(name, compress, tmp_path):
    text = b"a\r\n\n  \nb" + (b"\n" + b"x" * 5_000_000) * 4 + b"\nlast"
    (tmp_path / name).write_bytes(compress(text))
    lines = read_lines(str(tmp_path / name))
    for _ in range(2):
        found = list(lines)
        assert (found[:2], found[-1], len(found)) == ([b"a", b"b"], b"last", 7)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_compressed_file_that_was_cut_is_named(compress, share, tmp_path):
    whole = compress(os.urandom(20_000).hex().encode())
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UsageError, match=rf"FILE: .*{path.name} (ends too early|is damaged)"):
        list(read_lines(str(path)))


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"a\nb\n",))
    writer.start()
    lines = read_lines(str(tmp_path / "pipe"))
    writer.join()
    assert [list(lines), list(lines)] == [[b"a", b"b"]] * 2


def test_memory_does_not_grow_with_the_file(tmp_path):
    line = chat("x" * 1000).to_json().encode() + b"\n"
    peaks = []
    for count in (200, 4000):
        (tmp_path / "x.jsonl").write_bytes(line * count)
        tracemalloc.start()
        assert sum(1 for _ in Replay(chats_in(read_lines(str(tmp_path / "x.jsonl"))))) == 2 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_publish_goes_on_after_a_line_that_is_not_a_chat(pubsub, lines, capsys):
    source = lines(chat("x", chat_id="c"), *LINES, chat("y", chat_id="d"))
    topic = pubsub.topic("events")
    assert main(["publish", source, "--topic", topic, "--as_messages", "--summary=json"]) == 0
    said = json.loads(capsys.readouterr().out)
    chats, others = chats_of(read_lines(source))
    assert said["published"] == sum(len(each.messages) + 1 for each in chats) + len(others)
    pulled = pubsub.subscriber.pull(
        subscription=pubsub.subscription("events"), max_messages=100, timeout=30
    )
    assert {m.message.data for m in pulled.received_messages} >= set(others)


TABLE = b"ticket,role,said\n7,customer,It is late\n8,customer,Thanks\n7,agent,Sorry\n"


def test_an_export_is_published_chat_by_chat_and_lines_stay_as_they_are(pubsub, tmp_path, capsys):
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "tickets.csv").write_bytes(TABLE)
    spaced = b'{ "chat_id" : "9",  "messages": [{"role": "user", "text": "\\u00e9"}] }'
    openai = b'{"id": 5, "messages" : [{"role": "user", "content": "Late"}]}'
    (folder / "chats.jsonl").write_bytes(b"\n".join((spaced, openai, b"not json", b"")))
    topic, columns = pubsub.topic("events"), "--columns=chat=ticket,text=said"
    assert main(["publish", str(folder), "--topic", topic, columns]) == 0
    pulled = pubsub.subscriber.pull(
        subscription=pubsub.subscription("events"), max_messages=100, timeout=30
    )
    found = {m.message.data for m in pulled.received_messages}
    assert found >= {spaced, openai, b"not json"}
    chats = [json.loads(data) for data in found - {spaced, openai, b"not json"}]
    assert {one["chat_id"]: len(one["messages"]) for one in chats} == {"7": 2, "8": 1}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--columns=chat=none", "FILE: .*tickets.csv: --columns: there is no column 'none'"),
        ("--input_format=xml", "--input_format=xml: must be one of auto, chatflow"),
        ("--summary=json", "FILE: .*tickets.csv: it is not clear which column is the text: "),
    ],
)
def test_an_export_that_is_not_clear_is_not_published(tmp_path, capsys, flag, said):
    (tmp_path / "tickets.csv").write_bytes(TABLE)
    arguments = ["publish", str(tmp_path / "tickets.csv"), "--topic=projects/p/topics/x", flag]
    assert main(arguments) == 2
    assert re.search(said, capsys.readouterr().err)


def test_lines_of_an_export_are_published_as_they_are_if_the_format_says_so(tmp_path):
    (tmp_path / "tickets.csv").write_bytes(TABLE)
    customs = customs_of("", "", "chatflow")
    assert [*read_lines(str(tmp_path / "tickets.csv"), customs=customs)] == TABLE.splitlines()


def test_chats_to_replay_may_be_a_table_with_roles_of_its_own(tmp_path):
    (tmp_path / "tickets.csv").write_bytes(TABLE.replace(b"customer", b"patron"))
    customs = customs_of("patron=customer", "", "auto", "chat=ticket,text=said")
    chats, others = chats_of(read_lines(str(tmp_path / "tickets.csv"), customs=customs), customs)
    assert [(one.chat_id, one.messages[0].role) for one in chats] == [
        ("7", "customer"), ("8", "customer"),
    ]  # fmt: skip
    assert others == []
