"""A model's folder, local or on any filesystem that Beam knows, with hashes of its files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError, one_line
from chatflow.weights import embedded
from chatflow.weights.embedded import slug

SUMS = "SHA256SUMS.json"
"""Name -> SHA-256 of each other file; written when all of them are there."""

_CHUNK = 1 << 22
_RAW = "uncompressed"  # whatever the suffix


class Folder:
    """A folder by its path or URL; what cannot be read or written raises `UsageError`."""

    def __init__(self, url: str):
        self.url = url.rstrip("/") or url
        self.path = None if "://" in url else Path(url).expanduser()

    @property
    def staging(self) -> Path:
        """Returns where files are made until they get names: here, if possible on the same disk."""
        if self.path is not None:
            return self.path / ".staging"
        return embedded.cache_root() / "staging" / slug(self.url)

    def sizes(self) -> dict[str, int]:
        """Returns each file's bytes by name, without hidden files; empty if there is no folder."""
        with self._reporting("cannot be read"):
            if self.path is None:
                base = self.url + "/"
                found = FileSystems.match([base + "**"])[0].metadata_list
                sizes = {file.path[len(base) :]: file.size_in_bytes for file in found}
            else:
                files = (path for path in self.path.rglob("*") if path.is_file())
                sizes = {
                    path.relative_to(self.path).as_posix(): path.stat().st_size for path in files
                }
        return {
            name: size
            for name, size in sorted(sizes.items())
            if not any(part.startswith(".") for part in name.split("/"))
        }

    def sums(self) -> dict[str, str]:
        """Returns the hashes in `SHA256SUMS.json`; empty if it cannot be read."""
        try:
            with self.open(SUMS) as file:
                sums = json.loads(file.read())
        except (UsageError, ValueError):
            return {}
        return sums if isinstance(sums, dict) else {}

    def open(self, name: str) -> IO[bytes]:
        with self._reporting(f"{name} cannot be read"):
            if self.path is not None:
                return (self.path / name).open("rb")
            opened: IO[bytes] = FileSystems.open(f"{self.url}/{name}", compression_type=_RAW)
            return opened

    def sha256(self, name: str) -> str:
        with self._reporting(f"{name} cannot be read"), self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def copy(self, name: str, target: Path) -> None:
        """Copies a file to this machine; it gets its name when it is complete."""
        with self._reporting(f"{name} cannot be copied"):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            with self.open(name) as file, part.open("wb") as copy:
                shutil.copyfileobj(file, copy, _CHUNK)
            part.replace(target)

    def put(self, made: Path, name: str, wrote: Callable[[int], None] = lambda _: None) -> None:
        """Moves in a local file, named once complete. `wrote` gets the bytes of each part sent."""
        with self._reporting(f"{name} cannot be written"):
            if self.path is not None:
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(made, target)
                return
            target_url = f"{self.url}/{name}"
            try:
                with (
                    made.open("rb") as file,
                    FileSystems.create(target_url + ".part", compression_type=_RAW) as copy,
                ):
                    while chunk := file.read(_CHUNK):
                        copy.write(chunk)
                        wrote(len(chunk))
            except BaseException:
                # A partial upload is an object, too.
                with contextlib.suppress(Exception):
                    FileSystems.delete([target_url + ".part"])
                raise
            if FileSystems.exists(target_url):  # HDFS does not rename to an existing name
                FileSystems.delete([target_url])
            FileSystems.rename([target_url + ".part"], [target_url])
            made.unlink()

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._reporting(f"{name} cannot be deleted"):
                if self.path is not None:
                    (self.path / name).unlink(missing_ok=True)
                else:
                    FileSystems.delete([f"{self.url}/{name}"])

    def finish(self, sums: Mapping[str, str]) -> None:
        """Writes `SHA256SUMS.json`, which makes the folder complete."""
        with self._reporting(f"{SUMS} cannot be written"):
            self.staging.mkdir(parents=True, exist_ok=True)
            (self.staging / SUMS).write_text(json.dumps(dict(sorted(sums.items())), indent=1))
        self.put(self.staging / SUMS, SUMS)

    def check_room(self, size: int) -> None:
        """Raises `UsageError` if the disk has less than `size` bytes free."""
        with self._reporting("cannot be written"):
            self.staging.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.staging).free
        if size > free:
            raise UsageError(
                f"{self.staging.parent}: {size / 1e9:,.3f} GB are needed, {free / 1e9:,.3f} GB "
                "are free; make room, or name another destination"
            )

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Any:
        try:
            yield
        except UsageError:
            raise
        except Exception as error:  # each filesystem raises its own
            full = getattr(error, "errno", None) == errno.ENOSPC
            said = "the disk is full; make room" if full else one_line(error)
            place = str(getattr(error, "filename", ""))
            if place.startswith(os.fspath(embedded.cache_root())):
                said += "; or set XDG_CACHE_HOME to a folder that can be written"
            raise UsageError(f"{self.url}: {what}: {said}") from error
