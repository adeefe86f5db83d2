"""Sources of weights: the hubs, other folders, and the embedded model."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from chatflow.errors import UsageError, one_line
from chatflow.weights import embedded
from chatflow.weights.folders import SUMS, Folder

CARRIED = (
    "*config.json tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt *.model "
    "chat_template* preprocessor.json task.json task.weights.h5 metadata.json *_converter.json "
    "LICENSE* NOTICE*"
).split()
"""Files beside the weights, in Hugging Face's and Keras's formats; also all of `assets/`."""

WEIGHTS = (
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json",
    r"model\.weights\.h5",
    r"model_\d+\.weights\.h5|model\.weights\.json",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin|pytorch_model\.bin\.index\.json",
)
"""Names of weight files, best first; only the first that a folder has is taken."""


class File(NamedTuple):
    """A file of a source, with its size in bytes.

    It must have the hash `sha256` or the name `blob` in git; empty: not known.
    """

    name: str
    size: int
    sha256: str = ""
    blob: str = ""

    def is_at(self, folder: Folder, name: str = "") -> bool:
        """Returns whether a folder has the file, by its hash."""
        name = name or self.name
        if self.sha256:
            return folder.sha256(name) == self.sha256
        with folder.open(name) as file:
            content = file.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blob


class Source(Protocol):
    """Files to fetch; messages call them `name`. If `moved`, the source loses what is fetched."""

    name: str
    moved: bool

    def files(self) -> list[File]:
        """Returns the files that are needed."""

    def bring(self, file: File, target: Path) -> None:
        """Copies a file to a path, completely or not at all."""

    def known(self, file: File) -> File:
        """Returns the file with a hash."""


class FolderSource:
    """A folder, local or on a filesystem that Beam knows."""

    def __init__(self, folder: Folder, name: str = "", moved: bool = False):
        self.folder = folder
        self.name = name or folder.url
        self.moved = moved

    def files(self) -> list[File]:
        sizes = self.folder.sizes()
        if not sizes:
            raise UsageError(f"{self.name}: there is no such folder, or it is empty")
        sums = self.folder.sums() if SUMS in sizes else {}
        return [File(name, sizes[name], sums.get(name, "")) for name in needed(sizes, self.name)]

    def bring(self, file: File, target: Path) -> None:
        if self.moved and self.folder.path is not None:
            os.replace(self.folder.path / file.name, target)
        else:
            self.folder.copy(file.name, target)

    def known(self, file: File) -> File:
        return file._replace(sha256=self.folder.sha256(file.name))


class HubSource:
    """A repository of Hugging Face's hub, or of the hub at `HF_ENDPOINT`.

    https://huggingface.co/docs/huggingface_hub/guides/download
    """

    moved = False

    def __init__(self, name: str):
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise UsageError(
                f"{name}: needs huggingface_hub: pip install 'chatflow[gemma]'"
            ) from None
        logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            for client in ("httpx", "httpx2"):  # they log each request
                logging.getLogger(client).setLevel(logging.WARNING)
        self.name = name
        self.repository, _, revision = name.removeprefix("hf://").partition("@")
        self._revision: str | None = revision or None
        # The library reads the variable only when it is imported.
        self._endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

    def files(self) -> list[File]:
        from huggingface_hub import HfApi

        try:
            info = HfApi(endpoint=self._endpoint).model_info(
                self.repository, revision=self._revision, files_metadata=True
            )
        except Exception as error:
            raise hub_error(self.name, error, self._endpoint) from error
        self._revision = info.sha  # one revision for all files, even if someone pushes
        by_name = {file.rfilename: file for file in info.siblings or ()}
        return [
            File(name, file.size or 0, file.lfs.sha256 if file.lfs else "", file.blob_id or "")
            for name in needed(by_name, self.name)
            for file in [by_name[name]]
        ]

    def bring(self, file: File, target: Path) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # our own bar counts all files
        folder = target.parent / "hub"
        try:
            made = hf_hub_download(
                self.repository, file.name, revision=self._revision, local_dir=folder,
                endpoint=self._endpoint,
            )  # fmt: skip
            os.replace(made, target)
        except Exception as error:
            raise hub_error(self.name, error, self._endpoint) from error

    def known(self, file: File) -> File:
        return file


def hub_error(name: str, error: BaseException, endpoint: str) -> UsageError:
    """Returns a Hugging Face error in the user's terms; `name` is [hf://]ORG/NAME[@REVISION]."""
    from huggingface_hub import errors

    repository, _, revision = name.removeprefix("hf://").partition("@")
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.HFValidationError):
        said = "is not a repository's name; give hf://ORG/NAME or hf://ORG/NAME@REVISION"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"there is no revision {revision!r}"
    elif isinstance(error, errors.GatedRepoError) or status == 403:
        said = (
            f"is gated: accept its licence at {endpoint}/{repository}, and set "
            "HF_TOKEN to a token of that account"
        )
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        here = "" if name.startswith("hf://") else ", nor such a folder here"
        said = (
            f"there is no such repository at {endpoint}{here}; if it is private or gated, "
            "accept its licence there and set HF_TOKEN"
        )
    elif getattr(error, "errno", None) == errno.ENOSPC:
        said = "cannot be fetched: the disk is full; make room, or name another destination"
    else:
        said = (
            f"cannot be fetched from {endpoint}: {type(error).__name__}: "
            f"{one_line(error) if isinstance(error, Exception) else error}; complete files are "
            "kept, so try again"
        )
    return UsageError(f"{name}: {said}")


def kaggle(handle: str, name: str) -> Source:
    """Returns a Kaggle model, in the cache of `kagglehub`: https://github.com/Kaggle/kagglehub."""
    try:
        import kagglehub
    except ImportError:
        raise UsageError(f"{name}: needs kagglehub: pip install 'chatflow[gemma]'") from None
    try:
        folder = kagglehub.model_download(handle.removeprefix("kaggle://"))
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 403, 404) or type(error).__name__ == "UnauthenticatedError":
            said = (
                "does not exist, or is restricted: accept its licence at "
                "https://www.kaggle.com/models, and set KAGGLE_USERNAME and KAGGLE_KEY"
            )
        else:
            said = f"cannot be fetched: {type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{name}: {said}") from error
    return FolderSource(Folder(folder), name)


def open_source(name: str) -> Source:
    """Returns the source of that name; raises `UsageError` if it or its package is missing."""
    from chatflow.weights.presets import brought, local_preset

    if name == embedded.NAME or brought(name):
        return FolderSource(Folder(local_preset(name)), name)
    if name.startswith("hf://"):
        return HubSource(name)
    if name.startswith("kaggle://"):
        return kaggle(name, name)
    if "://" in name or Path(name).expanduser().is_dir():
        return FolderSource(Folder(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", name) and not name.startswith("."):
        return HubSource(name)
    if re.fullmatch(r"\w+", name) and (handle := _keras_handle(name)):
        return kaggle(handle, name)
    raise UsageError(
        f"{name}: there is no such folder; give {embedded.NAME} (embedded), hf://ORG/NAME, "
        "kaggle://…, gs://…, a folder, or the name of a keras_hub preset"
    )


def _keras_handle(name: str) -> str:
    """Returns the Kaggle handle of a keras_hub preset; empty if keras_hub does not know it."""
    from chatflow.weights.presets import use_jax

    try:
        use_jax()
        import keras_hub
    except ImportError:
        raise UsageError(
            f"{name}: preset names need keras_hub: pip install 'chatflow[gemma]', or give "
            "kaggle://…"
        ) from None
    preset: Any = keras_hub.models.Backbone.presets.get(name, {})
    return str(preset.get("kaggle_handle", ""))


def needed(names: Iterable[str], source: str) -> list[str]:
    """Returns the files to load, weights in one format; raises `UsageError` if there are none.

    >>> needed(["config.json", "model.safetensors", "pytorch_model.bin", "README.md"], "a folder")
    ['config.json', 'model.safetensors']
    """
    names = sorted(names)
    plain = [name for name in names if "/" not in name and name != SUMS]
    weights: list[str] = []
    for pattern in WEIGHTS:
        found = [name for name in plain if re.fullmatch(pattern, name)]
        if not weights and not all(name.endswith(".json") for name in found):
            weights = found
    if not weights:
        raise UsageError(
            f"{source}: has no weights that can be loaded: no model.safetensors, "
            f"model.weights.h5 or pytorch_model.bin among its {len(names)} files"
        )
    carried = [name for name in plain if any(fnmatch.fnmatch(name, p) for p in CARRIED)]
    assets = [name for name in names if name.startswith("assets/") and ".." not in name]
    return sorted({*weights, *carried, *assets})
