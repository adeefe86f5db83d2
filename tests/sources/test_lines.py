"""Files as they come: each for itself, as far as it can be read, within a limit of memory."""

import bz2
import functools
import gzip
import json
import lzma
import os
import random
import tracemalloc
import zipfile

import apache_beam as beam
import pytest
from conftest import chat, run_stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatflow.dead_letters import Outcome
from chatflow.errors import BadInputError, UsageError
from chatflow.records import Range
from chatflow.sources import lines as lines_module
from chatflow.sources.lines import fault_of, ranges_of, read_lines
from chatflow.sources.read import ReadLines, check_input

LINES = [json.dumps({"chat_id": str(number), "text": "é late"}) for number in range(5)]
TEXT = "".join(line + "\n" for line in LINES).encode()
PARSED = [json.loads(line) for line in LINES]


@pytest.fixture
def file(tmp_path):
    def write(content, name="chats.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write


def read(path, most=1000, **options):
    """The values of a file's lines, and its faults."""
    found = [*read_lines(Range(path), most, **options)]
    values = [json.loads(arrival.line) for arrival in found if arrival.fault is None]
    return values, [arrival.fault for arrival in found if arrival.fault is not None]


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        TEXT.replace(b"\n", b"\r\n"),
        TEXT.replace(b"\n", b"\n \n\n"),
        TEXT.rstrip(),
        b"\xef\xbb\xbf" + TEXT,
        gzip.compress(TEXT),
        gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:]),
        bz2.compress(TEXT),
        lzma.compress(TEXT),
        TEXT.decode().encode("utf-16"),
        TEXT.decode().encode("utf-16-le"),
        TEXT.decode().encode("utf-16-be"),
        TEXT.decode().encode("utf-32"),
        gzip.compress(TEXT.decode().encode("utf-16")),
        json.dumps(PARSED).encode(),
        json.dumps(PARSED, indent=2).encode(),
        b"\n".join(json.dumps(value, indent=2).encode() for value in PARSED),
        b"[" + b",\n".join(map(str.encode, LINES)) + b"]",
    ],
    ids=["lines", "CRLF", "blank", "no-end", "mark", "gzip", "members", "bzip2", "xz", "utf-16",
         "utf-16-le", "utf-16-be", "utf-32", "gzip-utf-16", "array", "indented-array", "indented",
         "array-of-lines"],
)  # fmt: skip
def test_what_it_is_is_found_by_its_content(file, content):
    for name in ("chats.jsonl", "chats"):
        values, faults = read(file(content, name))
        assert [value["chat_id"] for value in values] == ["0", "1", "2", "3", "4"]
        assert faults == []
        assert values[0]["text"] == "é late"


@pytest.mark.parametrize(
    "compress", [gzip.compress, functools.partial(bz2.compress, compresslevel=1), lzma.compress]
)
def test_of_a_file_that_ends_too_early_the_rest_is_read_and_the_end_said(file, compress):
    noise = random.Random(0)
    many = b"".join(b'{"n": "%d"}\n' % noise.getrandbits(64) for _ in range(30_000))
    whole = compress(many)
    values, faults = read(file(whole[: len(whole) // 2], "half.jsonl.gz"))
    assert compress is lzma.compress or 5_000 < len(values) < 30_000
    (fault,) = faults
    assert fault.reason == "truncated_file"
    assert "half.jsonl.gz ends too early" in fault.message
    assert not values or f"{len(values)} lines of it were read" in fault.message
    assert fault.part.start == sum(len(json.dumps(value)) + 1 for value in values)


def test_a_file_that_breaks_off_at_the_end_of_a_line_is_not_taken_for_whole(file):
    import zlib

    packer = zlib.compressobj(wbits=31)
    flushed = packer.compress(TEXT) + packer.flush(zlib.Z_FULL_FLUSH)
    values, faults = read(file(flushed, "quiet.jsonl.gz"))
    assert len(values) == 5
    assert [fault.reason for fault in faults] == ["truncated_file"]


def test_a_damaged_file_says_so(file):
    packed = bytearray(gzip.compress(os.urandom(100_000).hex().encode() + b"\n" + TEXT))
    packed[-8] ^= 255  # the checksum
    _, faults = read(file(bytes(packed)), most=10)
    assert [fault.reason for fault in faults] == ["line_too_long"] * 6 + ["corrupt_file"]
    packed[50_000:50_010] = b"0123456789"
    assert read(file(bytes(packed)))[1][-1].reason == "corrupt_file"
    assert read(file(gzip.compress(TEXT) + b"trailing"))[1][-1].reason == "corrupt_file"


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"a,b,c\n1,2,3\n", "x.csv", "which column is the chat and the text: there are a, b, c"),
        (b"chat_id;b\n1;2\n", "x.csv", "say which, e.g. --columns=text=COLUMN"),
        (b"<!DOCTYPE html><p>404", "x.jsonl", "HTML"),
        (b"<html>404</html>", "x.jsonl.gz", "is not gzip, although its name says so"),
        (b"PAR1abc", "x", "Parquet"),
        (b"SQLite format 3\0abc", "x", "a SQLite database"),
        (b"%PDF-1.7", "x", "a PDF"),
        (b"\x28\xb5\x2f\xfdabc", "x.zst", "zstd -d"),
        (bytes(range(256)) * 10 + b"\0" * 10, "x", "not text"),
    ],
)
def test_another_kind_of_file_is_told_in_one_sentence(file, content, name, says):
    path = file(content, name)
    values, (fault,) = read(path)
    assert values == []
    assert path in fault.message
    assert says in fault.message
    assert fault_of(path) == fault
    with pytest.raises(UsageError, match="--input"):
        check_input(path)


def test_a_zip_archive_is_read_file_by_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.jsonl", "w") as archive:  # stored, so that lines show
        archive.writestr("chats.jsonl", TEXT)
        archive.writestr("a/more.jsonl.gz", gzip.compress(TEXT))
        archive.writestr("a/.hidden.jsonl", TEXT)
        archive.writestr("__MACOSX/a/._chats.jsonl", b"\0\5\26\7")
        archive.writestr("a/photo.pdf", b"%PDF-1.7")
    path = str(tmp_path / "x.jsonl")
    values, (fault,) = read(path)
    assert values == PARSED * 2
    assert (fault.reason, fault.part) == ("wrong_format", Range(path))
    assert f"{path}/a/photo.pdf is a PDF" in fault.message
    assert fault_of(path) is None


@pytest.mark.parametrize(
    "first", [b"[", b"{", b"[broken", b'{"broken",', b"a,b,c\n1,2,3", b"<html>", b"\0" * 9, b"x"]
)
def test_a_bad_line_at_the_start_costs_no_other(file, first):
    found = [*read_lines(Range(file(first + b"\n" + TEXT)), 1000)]
    assert [arrival.line for arrival in found][-5:] == TEXT.splitlines()
    assert all(arrival.fault is None for arrival in found)


def test_an_empty_file_has_no_lines(file):
    for content in (b"", b"\n\r\n \t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", gzip.compress(b"")):
        assert read(file(content)) == ([], [])


def test_a_line_that_is_too_long_is_left_out_where_it_is(file):
    path = file(LINES[0].encode() + b"\n" + b"x" * 5000 + b"\n" + TEXT)
    values, (fault,) = read(path, most=100)
    assert len(values) == 6
    assert fault.reason == "line_too_long"
    assert "5001 bytes, more than --max_line_bytes=100" in fault.message
    assert fault.part == Range(path, len(LINES[0].encode()) + 1, len(LINES[0].encode()) + 5002)
    (again,) = read_lines(fault.part, 6000)
    assert again.line == b"x" * 5000
    exact = file(b"y" * 100 + b"\r\n" + b"z" * 100)
    assert [len(arrival.line) for arrival in read_lines(Range(exact), 100)] == [100, 100]


def test_a_long_line_of_a_compressed_file_can_be_read_again(file):
    path = file(gzip.compress(TEXT + b"x" * 5000 + b"\n" + TEXT))
    _, (fault,) = read(path, most=100)
    (again,) = read_lines(fault.part, 6000)
    assert again.line == b"x" * 5000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file_nor_with_a_line(tmp_path):
    path = str(tmp_path / "big.jsonl")
    with open(path, "wb") as file:
        file.write(b"x" * 50_000_000 + b"\n")
        for _ in range(100_000):
            file.write(b'{"chat_id": "' + b"7" * 300 + b'"}\n')
    tracemalloc.start()
    count = sum(1 for _ in read_lines(Range(path), 1_000_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 100_001
    assert peak < 10_000_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("ab {[\r\0é", max_size=12).map(str.encode), min_size=1),
    st.integers(1, 20),
)
def test_the_parts_of_a_file_hold_each_line_once(tmp_path, lines, size):
    path = tmp_path / "parts.txt"
    content = b"\n".join(lines)
    path.write_bytes(content)
    starts = range(0, max(len(content), 1), size)
    parts = [Range(str(path), start, start + size) for start in starts]
    found = [a.line for part in parts for a in read_lines(part, 1000, plain=True)]
    expected = [line.rstrip(b"\r") for line in lines]
    assert found == [line for line in expected if line.strip()]


def test_large_files_are_read_in_parts_if_they_are_plain_lines(file, monkeypatch):
    monkeypatch.setattr(lines_module, "RANGE", 100)
    path = file(TEXT)
    parts = ranges_of(path, len(TEXT))
    assert len(parts) == -(-len(TEXT) // 100)
    assert [a.line for part in parts for a in read_lines(part, 1000)] == TEXT.splitlines()
    packed = file(gzip.compress(TEXT + os.urandom(200).hex().encode()), "packed")
    assert ranges_of(packed, 1000) == [Range(packed)]
    array = file(json.dumps(PARSED).encode(), "array")
    assert ranges_of(array, 1000) == [Range(array)]


def test_a_file_that_cannot_be_opened_is_a_fault_and_the_others_are_read(tmp_path, file):
    file(TEXT, "good.jsonl")
    os.symlink(tmp_path / "gone", tmp_path / "link.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    os.symlink(tmp_path / "loop.jsonl", tmp_path / "loop.jsonl")
    found = []
    for path in sorted(tmp_path.glob("*.jsonl")):
        found += [a.fault.reason if a.fault else "line" for a in read_lines(Range(str(path)), 100)]
    assert found == ["unreadable_file"] + ["line"] * 5 + ["unreadable_file"] * 2
    bad = file(b"<html>404</html>", "bad.jsonl")
    assert check_input(f"{bad},{tmp_path}/good.jsonl") == [bad, f"{tmp_path}/good.jsonl"]


def test_a_folder_is_its_json_lines_without_copies_and_hidden_files(tmp_path, file):
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl.bz2", "d.jsonl.xz")
    for name in (*names, "a.jsonl.bak", "a.jsonl~", ".a.jsonl", "._a.jsonl", ".a.jsonl.swp",
                 "a.jsonl.md5", "manifest.json", "a.jsonl.part", "#a.jsonl#"):  # fmt: skip
        file(TEXT, name)
    found = check_input(str(tmp_path))
    assert [path.rpartition("/")[2] for path in sorted(found)] == [*names]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=r"no file matches .*looked for \.jsonl"):
        check_input(str(empty))


def test_the_stage_reads_files_and_faults(file):
    class Read(beam.PTransform):
        def expand(self, nothing):
            return Outcome(nothing.pipeline | ReadLines(path, max_line_bytes=100), None)

    path = file(TEXT + b"x" * 500)
    found = run_stage(Read(), [], ["ok"])["ok"]
    assert len(found) == 6
    (bad,) = [arrival for arrival in found if arrival.fault]
    with pytest.raises(BadInputError, match="500 bytes"):
        bad.read()


def test_a_dead_letter_says_where_the_line_is(file):
    from datetime import timedelta

    from chatflow.sources.parse import ParseArrivals

    path = file(TEXT + b"not json\n" + json.dumps({"chat_id": "1"}).encode())
    parse = ParseArrivals(1000, timedelta(hours=1)).parse
    errors = []
    for arrival in [*read_lines(Range(path), 1000)][5:]:
        with pytest.raises(BadInputError) as caught:
            [*parse(arrival)]
        errors.append(str(caught.value))
    assert f"({path}, line 6)" in errors[0]
    assert f"({path}, line 7)" in errors[1]


def test_a_chat_of_any_kind_is_read_the_same(file):
    whole = chat("It is late.")
    line = whole.to_json().encode()
    for content in (line, b"[" + line + b"]", json.dumps(json.loads(line), indent=1).encode()):
        assert read(file(content))[0] == [json.loads(line)]
