"""Jinja templates: their folders, blocks, constants and versions.

A prompt folder has `analysis.jinja` and `apology.jinja`. A template sets constants at its top level
(`{% set summary_characters = 512 %}`) and asks in blocks:

- `tone` and `summary`, for models that score and continue text. The tone is one of the words of
  `tones`; code builds the JSON.
- `json`, for models that write the JSON object themselves.
- `draft`, in `apology.jinja`.

A block `summary_start` or `draft_start` at the end of these also begins the answer:
`In short, {% block summary_start %}{{ user_id }} wants{% endblock %}`. The text of `summary_end` or
`draft_end` comes after the model's. A block sees `messages` (those within the budget), `chat`
(without messages), `user_id`, the constants, and, in `apology.jinja`, `analysis`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError, one_line


@dataclasses.dataclass(frozen=True)
class Template:
    """One template of a prompt folder, compiled where it is used.

    It holds the sources, because workers may not have the files.

    Attributes:
      folder: where it came from, for messages.
      sources: all templates of the folder by name, for `include` and `import`.
      overrides: constants that replace the template's own.
    """

    name: str
    folder: str
    sources: tuple[tuple[str, str], ...]
    overrides: tuple[tuple[str, Any], ...] = ()

    @functools.cached_property
    def _compiled(self) -> tuple[jinja2.Template, dict[str, Any], frozenset[str]]:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            loader=jinja2.DictLoader(dict(self.sources)),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        try:
            tree = environment.parse(dict(self.sources)[self.name], self.name)
            constants = _constants(tree)
            for name, source in self.sources:
                if name.endswith(".jinja"):
                    environment.parse(source, name)
            return environment.get_template(self.name), constants, _blocks(tree)
        except jinja2.TemplateSyntaxError as error:
            where = f"{self.folder}/{error.name or self.name}:{error.lineno}"
            raise UsageError(f"{where}: {error.message}") from None
        except jinja2.TemplateNotFound as error:
            raise UsageError(f"{self.where}: its folder has no template {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def where(self) -> str:
        return f"{self.folder}/{self.name}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Returns the constants that the template sets at its top level, with the overrides."""
        return {**self._compiled[1], **dict(self.overrides)}

    @property
    def blocks(self) -> frozenset[str]:
        return self._compiled[2]

    def render(self, block: str, **values: Any) -> str:
        """Renders one block; raises `jinja2.TemplateError`."""
        template = self._compiled[0]
        context = template.new_context({**self.settings, **values})
        return "".join(template.blocks[block](context)).strip()

    def setting(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Returns a constant; raises `UsageError` if it is missing or of another type."""
        value = self.settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(
                f"{self.where}: set {name} at the top of the template, "
                f"e.g. {{% set {name} = … %}}; found {value!r}"
            )
        return value

    def version(self, *settings: object) -> str:
        """Returns a hash of the template, all that it includes, the overrides and `settings`."""
        sources = dict(self.sources)
        todo, used = [self.name], {}
        while todo:
            name = todo.pop()
            if name in sources and name not in used:
                used[name] = sources[name]
                tree = jinja2.Environment().parse(sources[name])
                todo += [n for n in jinja2.meta.find_referenced_templates(tree) if n]
        settings = (*settings, *self.overrides)
        text = json.dumps([sorted(used.items()), [repr(s) for s in settings]])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def error_at(self, error: Exception) -> str:
        """Returns `folder/name:line: message` for an error raised while rendering."""
        where, trace = self.name, error.__traceback__
        while trace is not None:
            template = trace.tb_frame.f_globals.get("__jinja_template__")
            if template is not None:
                where = f"{template.name}:{template.get_corresponding_lineno(trace.tb_lineno)}"
            trace = trace.tb_next
        return f"{self.folder}/{where}: {error}"


def _constants(tree: jinja2.nodes.Template) -> dict[str, Any]:
    constants: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, jinja2.nodes.Assign) and isinstance(node.target, jinja2.nodes.Name):
            value: Any = node.node
            try:
                constants[node.target.name] = value.as_const()
            except jinja2.nodes.Impossible:
                continue
    return constants


def _blocks(tree: jinja2.nodes.Template) -> frozenset[str]:
    return frozenset(block.name for block in tree.find_all(jinja2.nodes.Block))


def load_folder(path: str) -> dict[str, Template]:
    """Returns the templates of a folder by name without `.jinja`.

    `path` is a folder on any filesystem that Beam knows, or `base` or `instruct` for chatflow's
    own. Raises `UsageError` if the folder cannot be read or has no analysis or apology template.
    """
    own = path in ("base", "instruct")
    where = os.fspath(default_folder() / path) if own else path.rstrip("/")
    sources = _sources(where, f"--prompts: {path!r}")
    if not sources and "://" not in where and not os.path.isdir(where):
        raise UsageError(f"--prompts: no folder {path!r}; give a folder with analysis.jinja in it")
    for name in ("analysis.jinja", "apology.jinja"):
        if name not in sources:
            raise UsageError(f"--prompts: {path!r} has no {name}")
    return {
        name.removesuffix(".jinja"): Template(name, where, tuple(sources.items()))
        for name in sources
        if name.endswith(".jinja")
    }


def load_template(path: str | os.PathLike[str]) -> Template:
    """Returns a template, with those of its folder; raises `UsageError` if it cannot be read."""
    folder, name = os.path.split(os.fspath(path))
    sources = _sources(folder or ".", f"the template {os.fspath(path)!r}")
    if name not in sources:
        raise UsageError(f"no template {os.fspath(path)!r}; its name must end with .jinja")
    return Template(name, folder, tuple(sources.items()))


def _sources(folder: str, what: str) -> dict[str, str]:
    sources = {}
    patterns = [FileSystems.join(folder, ending) for ending in ("*.jinja", "*.toml")]
    try:
        files = [file for found in FileSystems.match(patterns) for file in found.metadata_list]
        for path in sorted(file.path for file in files):
            with FileSystems.open(path) as file:
                sources[FileSystems.split(path)[1]] = file.read().decode()
    except Exception as error:  # each filesystem raises its own errors
        raise UsageError(f"{what} cannot be read: {one_line(error)}") from None
    return sources


@functools.cache
def default_sources() -> dict[str, str]:
    """Returns chatflow's own fixed texts by file."""
    folder = default_folder() / "base"
    return {path.name: path.read_text() for path in sorted(folder.glob("words.*.toml"))}


def default_folder() -> Path:
    """Returns the folder of chatflow's own prompts."""
    return Path(str(importlib.resources.files("chatflow.prompts")))
