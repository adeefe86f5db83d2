"""Puts the files of a run in place when all are complete; until then, earlier results stay.

A run writes into `FOLDER/.chatflow-new-ID`. When its pipeline has ended, it writes a marker there
that lists all files, and then moves them. A run that finds the marker of a killed run finishes the
moves. Files without a marker were never complete and are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.pipeline import PTransformOverride

from chatflow.errors import UsageError, one_line
from chatflow.sinks.files import (
    PROBE,
    WriteFiles,
    check_writable,
    files_under,
    is_local,
    move,
    recover,
    result_files,
)
from chatflow.sinks.locks import FolderLock
from chatflow.sinks.tables import count_rows, ending_of

STAGING = ".chatflow-new-"

MARKER = "commit.json"

MANIFEST = "manifest.json"

_PART = re.compile(r"-[0-9a-f]{32}\.part")


HOUR = 3600  # an older scratch file is a leftover, because writing it takes only a moment

WEEK = 7 * 24 * HOUR  # an older staging folder is a leftover, if the file system has no locks

_BLOCK = 1 << 20  # bytes read at once


@dataclasses.dataclass
class Results:
    """The results of a run in files, by folder; see `open_results`.

    Attributes:
      prefixes: the last part of each file prefix, by folder.
      staged: whether files are written to staging folders until `commit` puts them in place.
      earlier: how many files of earlier runs `commit` replaces.
      finished: how many files of a killed run have just been put in place.
    """

    prefixes: Mapping[str, Sequence[str]]
    staged: bool = False
    earlier: int = 0
    finished: int = 0

    def __post_init__(self) -> None:
        self._staging = f"{STAGING}{uuid.uuid4().hex}"

    def staged_prefix(self, prefix: str) -> str:
        """Returns the prefix to write to instead of a final one."""
        folder, name = split_prefix(prefix)
        return str(FileSystems.join(folder, self._staging, name))

    def stage(self, pipeline: beam.Pipeline) -> None:
        """Makes a pipeline write to the staging folders, if these results are staged."""
        if self.staged:
            pipeline.replace_all([_Staged(self)])

    def commit(self, manifest: Callable[[], Mapping[str, Any]]) -> None:
        """Puts all files in place together, and then removes those of earlier runs.

        Each folder gets a manifest with what `manifest` returns and the folder's `results`, each
        with its path, records, bytes and sha256.
        """
        if not self.staged or not self.prefixes:
            return
        about = manifest()
        marker = {}
        for folder, names in self.prefixes.items():
            staging = FileSystems.join(folder, self._staging)
            new = [_name(path) for name in names for path in _files(staging, name)]
            results = [
                {"path": name, **_described(FileSystems.join(staging, name))} for name in new
            ]
            content = json.dumps({**about, "results": results}, ensure_ascii=False, indent=1)
            write_whole(FileSystems.join(staging, MANIFEST), content + "\n")
            old = {_name(path) for name in names for path in _files(folder, name)}
            marker[folder] = {"files": [*new, MANIFEST], "stale": sorted(old - {*new})}
        home, *others = marker
        for folder in others:
            pointer = json.dumps({"home": _relative(home, folder)})
            write_whole(FileSystems.join(folder, self._staging, MARKER), pointer)
        by_folder = {_relative(folder, home): files for folder, files in marker.items()}
        write_whole(
            FileSystems.join(home, self._staging, MARKER), json.dumps({"folders": by_folder})
        )
        roll_forward(home, self._staging)

    def close(self) -> None:
        """Finishes an interrupted `commit`, or removes files that were never complete."""
        if not self.staged or not self.prefixes:
            return
        with contextlib.suppress(Exception):  # after an error, the next run does it
            if read_marker(next(iter(self.prefixes)), self._staging):
                roll_forward(next(iter(self.prefixes)), self._staging)
            else:
                for folder in self.prefixes:
                    remove_tree(FileSystems.join(folder, self._staging))


@contextlib.contextmanager
def open_results(
    prefixes: Collection[str], inputs: Sequence[str], streaming: bool, local: bool, command: str
) -> Iterator[Results]:
    """Locks the folders of file prefixes and cleans up after killed runs; yields the results.

    Args:
      inputs: files that the run will read.
      streaming: whether to add files and replace nothing; other streams can then do the same.
      local: whether the pipeline runs here and now. If not, nothing is replaced, because the
        service may refuse the job, or an earlier job may still write.
      command: what the lock says about this run, without secrets.

    Raises:
      UsageError: a folder is not writable or in use, two prefixes are the same, or an old file is
        an input or must not be replaced.
    """
    by_folder = _by_folder(prefixes, streaming)
    results = Results(by_folder, staged=local and not streaming)
    locks: dict[str, FolderLock] = {}
    with contextlib.ExitStack() as stack:

        def lock(folder: str, shared: bool) -> bool:
            if folder not in locks and is_local(folder):
                try:
                    locks[folder] = FolderLock(folder, shared, command)
                except OSError as error:
                    text = f"--output: {folder!r} cannot be written: {one_line(error)}"
                    raise UsageError(text) from None
                stack.callback(locks[folder].close)
            return folder in locks and locks[folder].alone

        for folder in by_folder:
            check_writable(folder, "--output")
            lock(folder, streaming)
        for folder, names in by_folder.items():
            alone = lock(folder, streaming)
            results.finished += _recover(folder, alone, lock)
            _clear(folder, names, alone)
        if streaming:
            for held in locks.values():
                held.share()
            yield results
            return
        _check_earlier(results, inputs, local)
        stack.callback(results.close)
        yield results


class _Staged(PTransformOverride):
    """Makes a pipeline's `WriteFiles` write to staging folders."""

    def __init__(self, results: Results):
        self.results = results

    def matches(self, applied: Any) -> bool:
        write = applied.transform
        return isinstance(write, WriteFiles) and STAGING not in write.prefix

    def get_replacement_transform_for_applied_ptransform(self, applied: Any) -> WriteFiles:
        write: WriteFiles = applied.transform
        return dataclasses.replace(write, prefix=self.results.staged_prefix(write.prefix))


def _by_folder(prefixes: Collection[str], streaming: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prefix in prefixes:
        folder, name = split_prefix(prefix)
        if not streaming and name in found.get(folder, ()):
            raise UsageError(
                f"--analyses, --drafts, --dead_letters: {prefix!r} is given twice; "
                "name a separate prefix for each"
            )
        if not streaming and any(letter in prefix for letter in "*?["):
            raise UsageError(f"--output: {prefix!r} must not contain any of * ? [")
        found.setdefault(folder, []).append(name)
    # The marker is in the first folder; paths on this machine are relative to that folder.
    return dict(sorted(found.items(), key=lambda item: (not is_local(item[0]), item[0])))


def _check_earlier(results: Results, inputs: Sequence[str], local: bool) -> None:
    read = {_real(path): path for path in inputs}
    for folder, names in results.prefixes.items():
        for path in (path for name in names for path in _files(folder, name)):
            if path in read:
                raise UsageError(
                    f"--output: {read[path]} is an input and would be replaced; name another folder"
                )
            if not local:
                raise UsageError(
                    f"--output: {path} is there from another run; name another folder, or remove it"
                )
            results.earlier += 1
        manifest = FileSystems.join(folder, MANIFEST)
        if local and FileSystems.exists(manifest) and not _is_manifest(manifest):
            raise UsageError(
                f"--output: {manifest} is not from chatflow and would be replaced; "
                "rename it, or name another folder"
            )


def _is_manifest(path: str) -> bool:
    with contextlib.suppress(Exception), FileSystems.open(path) as file:
        return "chatflow" in json.loads(file.read())["versions"]
    return False


def _recover(folder: str, alone: bool, lock: Callable[[str, bool], bool]) -> int:
    """Puts in place or removes files that killed runs staged; returns how many it put in place."""
    count = 0
    for staging, changed in _stagings(folder).items():
        found = read_marker(folder, staging)
        home = _resolve(found["home"], folder) if found and "home" in found else folder
        marker = found if home == folder else read_marker(home, staging)
        if not marker:
            if alone or time.time() - changed > WEEK:
                remove_tree(FileSystems.join(folder, staging))
            continue
        for other in marker["folders"]:
            lock(_resolve(other, home), False)
        try:
            count += roll_forward(home, staging)
        except OSError as error:
            raise UsageError(
                f"--output: the results of an earlier run in {FileSystems.join(folder, staging)} "
                f"cannot be put in place: {one_line(error)}"
            ) from None
    return count


def roll_forward(home: str, staging: str) -> int:
    """Makes the moves in the marker in `home` that are left; returns the number of all files."""
    marker = read_marker(home, staging)
    assert marker
    folders = {_resolve(path, home): files for path, files in marker["folders"].items()}
    for folder, files in folders.items():
        for name in files["files"]:
            move(FileSystems.join(folder, staging, name), FileSystems.join(folder, name))
        _sync(folder)
    for folder, files in folders.items():
        _delete(FileSystems.join(folder, name) for name in files["stale"])
    _delete([FileSystems.join(home, staging, MARKER)])
    for folder in folders:
        remove_tree(FileSystems.join(folder, staging))
    return sum(len(files["files"]) for files in folders.values())


def read_marker(folder: str, staging: str) -> dict[str, Any] | None:
    """Returns the marker in a staging folder, if any; raises `UsageError` if it is damaged."""
    path = FileSystems.join(folder, staging, MARKER)
    if not FileSystems.exists(path):
        return None
    try:
        with FileSystems.open(path) as file:
            found: dict[str, Any] = json.loads(file.read())
            return found
    except ValueError:
        raise UsageError(
            f"--output: {path} is damaged; remove its folder to keep the earlier results"
        ) from None


def _stagings(folder: str) -> dict[str, float]:
    """Returns when the staging folders in a folder were last changed, in seconds since 1970."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            return {e.name: e.stat().st_mtime for e in entries if e.name.startswith(STAGING)}
    found: dict[str, float] = {}
    for path, changed in files_under(str(FileSystems.join(folder, f"{STAGING}*", "*"))).items():
        name = path[len(folder) :].strip("/").split("/")[0]
        found[name] = max(found.get(name, 0.0), changed)
    return found


def _clear(folder: str, names: Sequence[str], alone: bool) -> None:
    """Removes scratch files of killed runs; only old ones if other runs use the folder.

    Files that a killed stream wrote on this machine are put in place instead.
    """
    scratch = [(str(FileSystems.join(folder, name)), _PART) for name in names]
    scratch.append((str(FileSystems.join(folder, PROBE)), re.compile(r"(-[0-9a-f]{32})?")))
    for prefix, rest in scratch:
        found = {p: at for p, at in files_under(prefix).items() if rest.fullmatch(p, len(prefix))}
        if rest is _PART and is_local(folder):
            for path in found:
                recover(path, prefix)
        else:
            _delete(p for p, changed in found.items() if alone or time.time() - changed > HOUR)
    if alone:  # so the folder is on this machine
        of_beam = re.compile(f"beam-temp-({'|'.join(map(re.escape, names))})-[0-9a-f]{{32}}")
        for name in filter(of_beam.fullmatch, os.listdir(folder)):
            remove_tree(os.path.join(folder, name))


def digest(path: str) -> dict[str, Any]:
    """Syncs a file to the disk and returns its records (lines), bytes and sha256."""
    lines, size, sha256 = 0, 0, hashlib.sha256()
    with open(path, "rb") if is_local(path) else FileSystems.open(path) as file:
        while block := file.read(_BLOCK):
            lines, size = lines + block.count(b"\n"), size + len(block)
            sha256.update(block)
        if is_local(path):
            os.fsync(file.fileno())
    return {"records": lines, "bytes": size, "sha256": sha256.hexdigest()}


def _described(path: str) -> dict[str, Any]:
    """Returns the same as `digest`, but counts the rows of a table as its records."""
    found = digest(path)
    if ending_of(path):
        with open(path, "rb") if is_local(path) else FileSystems.open(path) as file:
            found["records"] = count_rows(path, file)
    return found


def write_whole(path: str, text: str) -> None:
    """Writes a file that appears only when it is complete, and survives a power failure."""
    scratch = f"{path}.part" if is_local(path) else path
    with FileSystems.create(scratch) as file:
        file.write(text.encode())
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())
    if scratch != path:
        os.replace(scratch, path)
        _sync(os.path.dirname(path))


def remove_tree(folder: str) -> None:
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        _delete(files_under(f"{folder}/*"))


def split_prefix(prefix: str) -> tuple[str, str]:
    """Returns the folder of a file prefix, without links and dots, and the rest."""
    folder, name = os.path.split(prefix) if is_local(prefix) else FileSystems.split(prefix)
    return _real(folder or "."), name


def _real(path: str) -> str:
    return os.path.realpath(path) if is_local(path) else path


def _relative(path: str, start: str) -> str:
    return os.path.relpath(path, start) if is_local(path) and is_local(start) else path


def _resolve(path: str, start: str) -> str:
    return _real(os.path.join(start, path)) if is_local(path) else path


def _files(folder: str, name: str) -> list[str]:
    return result_files(str(FileSystems.join(folder, name)))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _delete(paths: Any) -> None:
    if there := [path for path in paths if FileSystems.exists(path)]:
        FileSystems.delete(there)


def _sync(folder: str) -> None:
    """Syncs the names in a folder of this machine to the disk."""
    if not is_local(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
