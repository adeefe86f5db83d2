"""What `chatflow publish` reads and sends: every line, whole files, in bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import threading
import tracemalloc

import pytest
from conftest import chat

from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.running import publishing
from chatflow.running.publishing import Replay, as_they_are, chats_in, chats_of, read_lines

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
