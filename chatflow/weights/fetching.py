"""Fetches files of a source into a folder: each complete or absent, the list of hashes last."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatflow.errors import UsageError
from chatflow.weights.folders import SUMS, Folder
from chatflow.weights.hubs import File, Source


@dataclasses.dataclass
class Progressing:
    """Progress in bytes.

    Attributes:
      doing: the current step, in words.
      got, sent: bytes of complete files brought here, and bytes sent on to a bucket.
      part: the file being brought.
      sending: whether there is a bucket.
    """

    doing: str = "looking for the files"
    total: int = 0
    got: int = 0
    sent: int = 0
    part: Path | None = None
    sending: bool = False

    def step(self, text: str) -> None:
        """Starts a step that has no measure."""
        self.doing, self.total, self.got, self.sent = text, 0, 0, 0
        self.sending = False

    @property
    def here(self) -> int:
        """Returns `got` and the bytes of the file being brought, wherever its library puts them."""
        if self.part is None:
            return self.got
        with contextlib.suppress(OSError):
            found = (path for path in self.part.parent.rglob("*") if path.is_file())
            return self.got + sum(path.stat().st_size for path in found)
        return self.got


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What a folder holds now: `size` bytes, of which `new` were not there before.

    `sums_sha256` is the SHA-256 of `SHA256SUMS.json`; it identifies the whole.
    """

    files: int
    size: int
    new: int
    sums_sha256: str

    def __str__(self) -> str:
        return (
            f"{self.files} files, {self.size / 1e6:,.1f} MB ({self.new / 1e6:,.1f} MB new); "
            f"{SUMS} has the SHA-256 {self.sums_sha256}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "bytes": self.size,
            "new_bytes": self.new,
            "sums_sha256": self.sums_sha256,
        }


def fetch(source: Source, folder: Folder, progress: Progressing | None = None) -> Fetched:
    """Brings the needed files of a source to a folder.

    A file gets its name when its hash is right; files with the right hash stay. Raises `UsageError`
    if the source or the folder cannot be used, or a hash is wrong.
    """
    progress = progress or Progressing()
    progress.step("looking for the files")
    wanted = source.files()
    progress.doing = "writing" if source.moved else "fetching"
    progress.sending = folder.path is None
    progress.total = sum(file.size for file in wanted)
    there = folder.sizes()
    before = folder.sums() if SUMS in there else {}
    stale = there.keys() - {file.name for file in wanted} - {SUMS}
    ours = {file.name for file in wanted} | before.keys() | {SUMS}
    if others := {name for name in stale if name.removesuffix(".part") not in ours}:
        raise UsageError(
            f"{folder.url}: holds other files, such as {min(others)}; name an empty folder"
        )
    sums: dict[str, str] = {}
    missing = []
    for file in wanted:
        if there.get(file.name) == file.size and _is_there(source, file, folder):
            sums[file.name] = file.sha256 or folder.sha256(file.name)
            progress.got += file.size
            progress.sent += file.size
        else:
            missing.append(file)
    new = sum(file.size for file in missing)
    if missing or stale or before != sums:
        # From here on, the folder must not look complete.
        folder.delete([SUMS] * (SUMS in there) + sorted(stale))
        with _staging(folder, 0 if source.moved else _room(missing, folder)):
            for file in missing:
                sums[file.name] = _bring(source, file, folder, progress)
            folder.finish(sums)
    return Fetched(len(wanted), progress.total, new, folder.sha256(SUMS))


def _room(missing: list[File], folder: Folder) -> int:
    """Returns the local bytes needed at once; files for a bucket are here one at a time."""
    sizes = [file.size for file in missing]
    return sum(sizes) if folder.path is not None else max(sizes, default=0)


def _is_there(source: Source, file: File, folder: Folder) -> bool:
    known = file if file.sha256 or file.blob else source.known(file)
    return known.is_at(folder)


def _bring(source: Source, file: File, folder: Folder, progress: Progressing) -> str:
    """Brings one file and returns its SHA-256."""
    progress.part = _part(folder, file)
    source.bring(file, progress.part)
    here = Folder(str(progress.part.parent))
    digest = here.sha256(progress.part.name)
    if (file.sha256 or file.blob) and not file.is_at(here, progress.part.name):
        progress.part.unlink()
        said = f", not {file.sha256}" if file.sha256 else ", which is not what its source says"
        raise UsageError(
            f"{source.name}: {file.name} came with the SHA-256 {digest}{said}; try again"
        )
    made, progress.part = progress.part, None
    progress.got += file.size

    def sent(count: int) -> None:
        progress.sent += count

    folder.put(made, file.name, sent)
    return digest


def _part(folder: Folder, file: File) -> Path:
    return folder.staging / "bringing" / Path(file.name).name


@contextlib.contextmanager
def _staging(folder: Folder, size: int) -> Iterator[None]:
    """Makes a place for `size` bytes before they move to a folder; removes it afterwards."""
    bringing = folder.staging / "bringing"
    shutil.rmtree(bringing, ignore_errors=True)
    try:
        folder.check_room(size)
        bringing.mkdir()
        yield
    finally:
        shutil.rmtree(folder.staging, ignore_errors=True)
