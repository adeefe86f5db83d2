"""Results of an earlier run stay until the new ones are whole, wherever a run is stopped."""

import contextlib
import hashlib
import io
import json
import uuid
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.io.filesystem import BeamIOError, FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems
from conftest import ANALYSIS, ROOT

from chatflow import WriteRecords, launch, new_pipeline
from chatflow.errors import UsageError
from chatflow.options import SinkSettings
from chatflow.sinks import staging
from chatflow.sinks.files import AppendFiles, result_files
from chatflow.sinks.staging import open_results

SHARD = "-00000-of-00001.jsonl"


class MemoryFiles(FileSystem):
    """Files in memory, as an object store has them: no folders, renames one by one."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    @classmethod
    def scheme(cls):
        return "memory"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def has_dirs(self):
        return False

    def mkdirs(self, path):
        pass

    def _list(self, dir_or_prefix):
        for path in [path for path in self.files if path.startswith(dir_or_prefix)]:
            yield self.metadata(path)

    def create(self, path, mime_type="", compression_type=None):
        files = self.files

        class Writer(io.BytesIO):
            def close(self):
                files[path] = self.getvalue()
                super().close()

        return Writer()

    def open(self, path, mime_type="", compression_type=None):
        return io.BytesIO(self.files[path])

    def copy(self, source_file_names, destination_file_names):
        for source, target in zip(source_file_names, destination_file_names, strict=True):
            self.files[target] = self.files[source]

    def rename(self, source_file_names, destination_file_names):
        for source, target in zip(source_file_names, destination_file_names, strict=True):
            if target in self.files:
                raise BeamIOError(f"{target} is there")
            self.files[target] = self.files.pop(source)

    def exists(self, path):
        return path in self.files

    def size(self, path):
        return len(self.files[path])

    def last_updated(self, path):
        return 0.0

    def checksum(self, path):
        return str(self.files[path])

    def metadata(self, path):
        return FileMetadata(path, len(self.files[path]), 0.0)

    def delete(self, paths):
        for path in paths:
            self.files.pop(path, None)


@pytest.fixture(params=["here", "memory"])
def root(request, tmp_path):
    """A folder for results: on this machine, and where there are neither folders nor locks."""
    MemoryFiles.files.clear()
    return str(tmp_path) if request.param == "here" else "memory://bucket"


def put(path, text):
    with FileSystems.create(path) as file:
        file.write(text.encode())


def files_in(folder):
    """The text of each file by its path in a folder, without the lock."""
    if "://" in folder:
        files = MemoryFiles.files.items()
        found = {path: text.decode() for path, text in files if path.startswith(folder + "/")}
    else:
        found = {str(path): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}
    names = {path.removeprefix(folder + "/"): text for path, text in found.items()}
    return {name: text for name, text in names.items() if not name.endswith(".chatflow-lock")}


def opened(*prefixes, inputs=(), streaming=False, local=True):
    return open_results(prefixes, inputs, streaming, local, "chatflow test")


def about():
    return {"versions": {"chatflow": "0"}}


def wrote(results, **texts):
    """Writes what a pipeline writes to the staging folders; names are the prefixes' last parts."""
    for folder, names in results.prefixes.items():
        for name in names:
            for shard, text in enumerate(texts[name]):
                prefix = results.staged_prefix(str(FileSystems.join(folder, name)))
                put(f"{prefix}-{shard:05}-of-{len(texts[name]):05}.jsonl", text)


def run(*prefixes, fault=None, **texts):
    """A whole run, or one that ends with a fault before its results are put in place."""
    with opened(*prefixes) as results:
        wrote(results, **texts)
        if fault:
            raise fault
        results.commit(about)


OLD = {"a/x-00000-of-00002.jsonl": "1\n", "a/x-00001-of-00002.jsonl": "2\n", "b/y" + SHARD: "3\n"}


@pytest.fixture
def prefixes(root):
    """Two prefixes in two folders, with results of an earlier run of two shards."""
    for name, text in OLD.items():
        put(f"{root}/{name}", text)
    return f"{root}/a/x", f"{root}/b/y"


def test_new_files_take_the_place_of_old_ones_of_another_number(root, prefixes):
    put(f"{root}/a/x.jsonl", "mine")
    with opened(*prefixes) as results:
        assert results.earlier == 3
        wrote(results, x=["new\n"], y=["newer\n"])
        assert {name: files_in(root)[name] for name in OLD} == OLD
        results.commit(about)
    found = files_in(root)
    manifests = {name: json.loads(found.pop(f"{name}/manifest.json")) for name in "ab"}
    assert found == {"a/x" + SHARD: "new\n", "b/y" + SHARD: "newer\n", "a/x.jsonl": "mine"}
    assert manifests["b"]["results"] == [
        {"path": "y" + SHARD, "records": 1, "bytes": 6,
         "sha256": hashlib.sha256(b"newer\n").hexdigest()}
    ]  # fmt: skip


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_leaves_everything_as_it_was(root, prefixes, fault):
    with pytest.raises(fault):
        run(*prefixes, x=["new\n"], y=["newer\n"], fault=fault)
    assert files_in(root) == OLD


@pytest.mark.parametrize("shards", [3, 1])
def test_a_pipeline_writes_beside_and_then_replaces(root, shards):
    for shard in range(shards):
        put(f"{root}/x-{shard:05}-of-{shards:05}.jsonl", "old\n")
    pipeline = new_pipeline()
    pipeline | beam.Create([ANALYSIS]) | WriteRecords([f"{root}/x"])
    launch(pipeline)
    found = files_in(root)
    assert set(found) == {"x" + SHARD, "manifest.json"}
    assert found["x" + SHARD] == ANALYSIS.to_json() + "\n"


def test_tables_are_written_beside_and_then_replace_the_earlier(root):
    put(f"{root}/x.csv", "old\n")
    put(f"{root}/x-other.csv", "of somebody else\n")
    pipeline = new_pipeline()
    records = pipeline | beam.Create([ANALYSIS]).with_output_types(type(ANALYSIS))
    records | WriteRecords([f"{root}/x.csv"])
    launch(pipeline)
    found = files_in(root)
    assert set(found) == {"x.csv", "x-other.csv", "manifest.json"}
    assert found["x.csv"].splitlines()[1].startswith("a1,7,c,3,-1,It is late.,model,")
    (result,) = json.loads(found["manifest.json"])["results"]
    assert (result["path"], result["records"]) == ("x.csv", 1)


def test_a_streams_tables_are_whole_files_in_any_file_system(root):
    pipeline = new_pipeline()
    records = pipeline | beam.Create([ANALYSIS]).with_output_types(type(ANALYSIS))
    records | WriteRecords([f"{root}/x.csv"], SinkSettings(streaming=True, fields=("topic",)))
    launch(pipeline)
    ((name, text),) = files_in(root).items()
    assert f"{root}/{name}" in result_files(f"{root}/x.csv")
    header, row = text.splitlines()
    assert "field.topic" in header
    assert row.startswith("a1,7,c,3,")


class KilledError(BaseException):
    """Stands for the end of the process: nothing is cleared up after it."""


def killed(*_):
    raise KilledError


def kill_at(monkeypatch, moment):
    """Lets a number of changes to files happen, and then none."""
    left = [moment]

    def limited(change):
        def changed(*arguments):
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            return change(*arguments)

        return changed

    for name in ("move", "_delete", "write_whole", "remove_tree"):
        monkeypatch.setattr(staging, name, limited(getattr(staging, name)))


@pytest.mark.parametrize("again", ["a/x", "b/y"])
def test_a_run_killed_at_any_change_is_all_old_or_all_new_after_the_next(root, monkeypatch, again):
    """Whichever of the two folders the next run is in."""
    monkeypatch.setattr(staging, "WEEK", -1)  # without locks, only old ones are cleared
    new = {"a/x" + SHARD: "new\n", "b/y" + SHARD: "newer\n"}
    outcomes = []
    for moment in range(100):
        place = f"{root}/{moment}"
        for name, text in OLD.items():
            put(f"{place}/{name}", text)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with contextlib.suppress(KilledError):
                run(f"{place}/a/x", f"{place}/b/y", x=["new\n"], y=["newer\n"])
                break
        with opened(f"{place}/{again}"):
            pass
        with opened(f"{place}/a/x", f"{place}/b/y"):
            pass
        found = {name: text for name, text in files_in(place).items() if "manifest" not in name}
        outcomes.append((OLD, new).index(found))
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1}


def test_a_folder_that_was_moved_meanwhile_is_finished_all_the_same(tmp_path, monkeypatch):
    put(f"{tmp_path}/one/x" + SHARD, "old\n")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "move", killed)
        with pytest.raises(KilledError):
            run(f"{tmp_path}/one/x", x=["new\n"])
    (tmp_path / "one").rename(tmp_path / "two")
    with opened(f"{tmp_path}/two/x") as results:
        assert results.finished == 2
    assert (tmp_path / "two" / f"x{SHARD}").read_text() == "new\n"


def test_an_interrupt_while_files_are_moved_does_not_stop_half_way(tmp_path, monkeypatch):
    put(f"{tmp_path}/x" + SHARD, "old\n")
    move, moved = staging.move, []

    def interrupted(source, target):
        moved.append(target)
        if len(moved) == 1:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(staging, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(f"{tmp_path}/x", x=["new\n"])
    assert set(files_in(str(tmp_path))) == {"x" + SHARD, "manifest.json"}
    assert (tmp_path / f"x{SHARD}").read_text() == "new\n"


def test_a_stream_finishes_what_a_killed_batch_began(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(staging, "move", killed)
        with pytest.raises(KilledError):
            run(f"{tmp_path}/x", x=["new\n"])
    with opened(f"{tmp_path}/x", streaming=True):
        assert set(files_in(str(tmp_path))) == {"x" + SHARD, "manifest.json"}


def test_a_damaged_marker_is_named(tmp_path):
    put(f"{tmp_path}/.chatflow-new-1/commit.json", "{")
    with pytest.raises(UsageError, match=r"chatflow-new-1/commit.json is damaged"), \
            opened(f"{tmp_path}/x"):  # fmt: skip
        pass


def test_results_that_cannot_be_put_in_place_are_kept_and_named(tmp_path, monkeypatch):
    (tmp_path / f"x{SHARD}").mkdir()
    with pytest.raises(IsADirectoryError):
        run(f"{tmp_path}/x", x=["new\n"])
    with pytest.raises(UsageError, match="cannot be put in place"), opened(f"{tmp_path}/x"):
        pass
    (tmp_path / f"x{SHARD}").rmdir()
    with opened(f"{tmp_path}/x"):
        assert (tmp_path / f"x{SHARD}").read_text() == "new\n"


def test_a_stream_leaves_the_files_that_are_there(tmp_path):
    put(f"{tmp_path}/x" + SHARD, "old\n")
    with opened(f"{tmp_path}/x", streaming=True) as results:
        results.commit(about)
    assert files_in(str(tmp_path)) == {"x" + SHARD: "old\n"}


# What is refused before anything runs.


def test_files_of_another_run_are_refused_where_the_pipeline_runs_elsewhere(root, prefixes):
    with pytest.raises(UsageError, match="is there from another run"), \
            opened(*prefixes, local=False):  # fmt: skip
        pass
    assert files_in(root) == OLD


@pytest.mark.parametrize("written", ["{}", "./{}", "sub/../{}"])
def test_a_result_that_is_an_input_is_refused_however_it_is_written(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    put("x" + SHARD, "old\n")
    inputs = [written.format("x" + SHARD)]
    with pytest.raises(UsageError, match="would be replaced; name another folder"), \
            opened("x", inputs=inputs):  # fmt: skip
        pass


@pytest.mark.parametrize("again", ["out/x", "out/./x", "link/x"])
def test_two_kinds_of_records_in_the_same_files_are_refused(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(UsageError, match="is given twice"), opened("out/x", again):
        pass


def test_a_prefix_that_beam_takes_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must not contain"), opened(f"{tmp_path}/[1]/x"):
        pass
    AppendFiles(f"{tmp_path}/[1]/x").write("", [ANALYSIS.to_json()])
    assert len(result_files(f"{tmp_path}/[1]/x")) == 1


@pytest.mark.parametrize("content", ["{}", "mine", '{"versions": {"npm": "1"}}', "[]"])
def test_a_manifest_of_somebody_else_is_not_replaced(root, content):
    put(f"{root}/manifest.json", content)
    with pytest.raises(UsageError, match=r"manifest\.json is not from chatflow"), \
            opened(f"{root}/x"):  # fmt: skip
        pass
    assert files_in(root) == {"manifest.json": content}


# The lock.

HOLD = """
import sys
from chatflow.sinks.staging import open_results
with open_results([sys.argv[1]], [], sys.argv[2] == "stream", True, "chatflow test"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def hold(warm, prefix, kind):
    """Another process that uses a folder, until it is killed or its input ends."""
    process = warm.start("-c", HOLD, prefix, kind)
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.mark.parametrize("kinds", [("batch", "batch"), ("batch", "stream"), ("stream", "batch")])
@pytest.mark.slow
def test_a_second_run_is_refused_and_told_who_is_there_until_that_one_is_killed(
    tmp_path, kinds, warm
):
    process = hold(warm, f"{tmp_path}/x", kinds[0])
    streaming = kinds[1] == "stream"
    with process:
        says = rf"in use by another run \(process {process.pid} on .*, started 20.*Z\); wait for it"
        with pytest.raises(UsageError, match=says), opened(f"{tmp_path}/y", streaming=streaming):
            pass
        process.kill()
        process.wait()
        with opened(f"{tmp_path}/y", streaming=streaming):
            pass


@pytest.mark.slow
def test_streams_share_a_folder(tmp_path, warm):
    with hold(warm, f"{tmp_path}/x", "stream") as process:
        with opened(f"{tmp_path}/x", streaming=True):
            pass
        process.communicate()


def test_a_run_in_two_folders_holds_both(tmp_path):
    with opened(f"{tmp_path}/a/x", f"{tmp_path}/b/y"), \
            pytest.raises(UsageError, match="in use"), opened(f"{tmp_path}/b/y"):  # fmt: skip
        pass
    with opened(f"{tmp_path}/b/y"):
        pass


def test_where_there_are_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    (tmp_path / ".chatflow-new-1").mkdir()  # may be another run's
    with opened(f"{tmp_path}/x") as results:
        wrote(results, x=["new\n"])
        results.commit(about)
    assert (tmp_path / ".chatflow-new-1").is_dir()
    assert files_in(str(tmp_path))["x" + SHARD] == "new\n"


# What killed runs leave.


def leave(folder):
    """All kinds of leftovers, and files of others that look alike."""
    number = uuid.uuid4().hex
    left = [f"beam-temp-x-{number}/1.x.jsonl", f".chatflow-new-{number}/x-1.jsonl",
            f"x-{number}.part", f".chatflow-can-write-{number}", ".chatflow-can-write"]  # fmt: skip
    kept = ["x.part", f"other-{number}.part", f"beam-temp-other-{number}/1", "x-1.jsonl", "notes"]
    for name in left + kept:
        put(f"{folder}/{name}", "x")
    return set(left), set(kept)


def test_a_batch_clears_up_after_killed_runs(tmp_path):
    _, kept = leave(tmp_path)
    with opened(f"{tmp_path}/x"):
        assert set(files_in(str(tmp_path))) == kept
    assert not list(tmp_path.glob(".chatflow-new-*"))


def test_a_stream_that_is_alone_clears_up_and_beside_another_only_what_is_old(tmp_path):
    with opened(f"{tmp_path}/x", streaming=True):
        left, kept = leave(tmp_path)
        left = {name for name in left if not name.endswith(".part")}
        with opened(f"{tmp_path}/x", streaming=True):
            assert set(files_in(str(tmp_path))) == left | kept
    with opened(f"{tmp_path}/x", streaming=True):
        assert set(files_in(str(tmp_path))) == kept


def test_what_a_killed_stream_wrote_is_put_in_place(tmp_path, warm):
    """A whole line was acknowledged; half a line was not."""
    program = (
        "import os, sys, conftest; from chatflow.sinks.files import AppendFiles, _AppendDoFn;"
        f"do = _AppendDoFn({str(tmp_path / 'x')!r}, 30, 10); do.setup(); do.start_bundle();"
        "do.process(conftest.ANALYSIS); do.finish_bundle();"
        "do.file.write(b'{half'); do.file.flush(); print('written', flush=True); sys.stdin.read()"
    )
    process = warm.start("-c", program, cwd=ROOT)
    assert process.stdout.readline() == "written\n"
    with opened(f"{tmp_path}/x", streaming=True):
        assert result_files(f"{tmp_path}/x") == []  # it lives, and goes on writing
        assert len(list(tmp_path.glob("*.part"))) == 1
    process.kill()
    process.wait()
    with opened(f"{tmp_path}/x", streaming=True):
        (found,) = result_files(f"{tmp_path}/x")
    assert Path(found).read_text() == ANALYSIS.to_json() + "\n"
    assert not list(tmp_path.glob("*.part"))
