"""Chooses the model and prompts for a chat: the same for all, or by an attribute.

`--models=FILE` is YAML. A key is a value of the attribute. Flags set what an entry leaves out:

    attribute: tenant
    models:
      - keys: [acme, globex]
        prompts: prompts/shop
      - keys: [initech]
        model: torch:google/flan-t5-base
        settings: {summary_grounding: 0.5, draft_confidence: 0.7}
    default: {}

`settings` are constants of the templates, such as thresholds. `default` is for chats with another
value or none; without it they become dead letters. Entries with the same model share it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import yaml
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import BadInputError, UsageError, one_line
from chatflow.models.spec import ModelSpec
from chatflow.options import Options
from chatflow.prompts.questions import READING, AnalysisPrompt, DraftPrompt, Prompt
from chatflow.prompts.templates import load_folder
from chatflow.records import Chat

PromptT = TypeVar("PromptT", bound=Prompt)

_log = logging.getLogger(__name__)

FIELDS = (
    "inference", "model", "model_kind", "state_dict_path", "adapter", "heads", "prompts",
    "max_prompt_tokens", "dtype", "quantization", "vllm_args", "model_updates",
)  # fmt: skip
"""The flags that an entry may set."""


@dataclasses.dataclass(frozen=True)
class Routed(Generic[PromptT]):
    """Prompts by an attribute of the chat; `default` is for chats with another value or none."""

    attribute: str
    by_key: Mapping[str, PromptT]
    default: PromptT | None

    def of(self, chat: Chat) -> PromptT:
        """Returns the prompt for a chat; raises `BadInputError` (`no_model`) if it has none."""
        key = chat.attributes.get(self.attribute)
        prompt = self.by_key.get(key, self.default) if key is not None else self.default
        if prompt is None:
            raise BadInputError(
                "no_model",
                f"--models has no model for {self.attribute}={key!r}, and no default",
            )
        return prompt


@dataclasses.dataclass(frozen=True)
class Route:
    """A model with its prompts.

    `keys` are values of the attribute, empty for the default; `folder` has the prompts;
    `overrides` replace constants of the templates.
    """

    spec: ModelSpec
    folder: str
    max_prompt_tokens: int
    keys: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()

    def prompts(self) -> tuple[AnalysisPrompt, DraftPrompt]:
        """Returns the prompts, made from the templates as they are now.

        Raises `UsageError` if a template has a mistake, or none has a constant to override.
        """
        templates = load_folder(self.folder)
        analysis, apology = templates["analysis"], templates["apology"]
        unknown = dict(self.overrides).keys() - analysis.settings.keys() - apology.settings.keys()
        if unknown := unknown - {"draft_confidence", "draft_grounding"}:
            raise UsageError(
                f"--models: settings: no template in {self.folder!r} sets {sorted(unknown)[0]!r}"
            )
        put = functools.partial(dataclasses.replace, overrides=self.overrides)
        try:
            return (
                AnalysisPrompt(put(analysis), self.spec, self.max_prompt_tokens),
                DraftPrompt(put(apology), self.spec, self.max_prompt_tokens),
            )
        except UsageError as error:
            where = "--models: settings, or the template that they are for: "
            raise UsageError(f"{where if self.overrides else ''}{error}") from None


@dataclasses.dataclass(frozen=True)
class Routes:
    """All models and prompts of a pipeline.

    Attributes:
      attribute: its value chooses the route of a chat; empty: all chats use the default.
      max_models: most models in a worker's memory at once; 0: any number.
    """

    routes: tuple[Route, ...]
    attribute: str = ""
    max_models: int = 0

    @functools.cached_property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Returns the models, each once."""
        return tuple({route.spec.key: route.spec for route in self.routes}.values())

    def by_chat(self, prompts: list[PromptT]) -> PromptT | Routed[PromptT]:
        """Returns prompts, given in the order of the routes, in the form that stages use."""
        if not self.attribute:
            return prompts[0]
        pairs = list(zip(self.routes, prompts, strict=True))
        return Routed(
            self.attribute,
            {key: prompt for route, prompt in pairs for key in route.keys},
            next((prompt for route, prompt in pairs if not route.keys), None),
        )


SpecOf = Callable[[Options], ModelSpec]


def routes_of(options: Options, spec_of: SpecOf) -> Routes:
    """Returns the routes of the flags and of the file of `--models`.

    Raises `UsageError`, with entry and field, if the file cannot be read or has a mistake.
    """
    if not options.models:
        return Routes((_route(options, spec_of),))
    if options.model_copies > 1 or not options.large_model:
        raise UsageError(
            "--model_copies, --large_model: only with one model; of --models, a worker has one "
            "copy of each"
        )
    try:
        with FileSystems.open(options.models) as file:
            value = yaml.safe_load(file.read())
    except Exception as error:  # YAML and each filesystem raise their own errors
        raise UsageError(f"--models={options.models}: cannot be read: {one_line(error)}") from None
    where = f"--models={options.models}"
    _check_fields(where, value, {"attribute", "models", "default", "max_models"})
    attribute, entries = value.get("attribute"), value.get("models")
    if not isinstance(attribute, str) or not attribute:
        raise UsageError(f"{where}: attribute: name the chats' attribute, e.g. tenant")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{where}: models: must be a list of entries with keys")
    most = value.get("max_models", 0)
    if not isinstance(most, int) or isinstance(most, bool) or most < 0:
        raise UsageError(f"{where}: max_models: must be a number, of models at once in memory")
    routes: list[Route] = []
    taken: set[str] = set()
    for number, entry in enumerate(entries, 1):
        here = f"{where}: models, entry {number}"
        _check_fields(here, entry, {"keys", "settings", *FIELDS})
        keys = entry.get("keys")
        if not isinstance(keys, list) or not keys:
            raise UsageError(f"{here}: keys: must be a list of values of {attribute}")
        keys = tuple(_key(here, key) for key in keys)
        if double := [key for key in keys if key in taken or keys.count(key) > 1]:
            raise UsageError(f"{here}: keys: {double[0]!r} is there twice")
        taken.update(keys)
        routes.append(_entry(here, entry, options, spec_of, keys))
    if "default" in value:
        here = f"{where}: default"
        _check_fields(here, value["default"], {"settings", *FIELDS})
        routes.append(_entry(here, value["default"], options, spec_of, ()))
    return Routes(tuple(routes), attribute, most)


def _check_fields(where: str, value: Any, known: set[str]) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: must have fields, of {', '.join(sorted(known))}")
    if unknown := {str(name) for name in value} - known:
        raise UsageError(
            f"{where}: unknown field {min(unknown)!r}; known are {', '.join(sorted(known))}"
        )


def _key(where: str, key: Any) -> str:
    # YAML reads `no`, the language Norwegian, as false.
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise UsageError(f"{where}: keys: {key!r} must be text; put it in quotes")
    return str(key)


def _entry(
    where: str, entry: Mapping[str, Any], options: Options, spec_of: SpecOf, keys: tuple[str, ...]
) -> Route:
    settings = entry.get("settings", {})
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UsageError(f"{where}: settings: must map names to values")
    flags = {name: entry[name] for name in FIELDS if name in entry}
    for name, value in flags.items():
        kind = type(getattr(options, name))
        if type(value) is not kind:
            raise UsageError(f"{where}: {name}: must be {kind.__name__}; found {value!r}")
    if "model" in flags:  # these flags belong to one model
        options = dataclasses.replace(
            options, state_dict_path="", adapter="", heads="auto", vllm_args="", model_updates=""
        )
    try:
        own = dataclasses.replace(options, **flags)
        return _route(own, spec_of, keys, tuple(sorted(settings.items())))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _route(
    options: Options,
    spec_of: SpecOf,
    keys: tuple[str, ...] = (),
    overrides: tuple[tuple[str, Any], ...] = (),
) -> Route:
    spec = spec_of(options)
    folder = options.prompts or ("instruct" if spec.instruct else "base")
    if spec.heads == "auto" and spec.own_heads and not _has_reading(folder):
        spec = dataclasses.replace(spec, heads="none")
    return Route(spec, folder, options.max_prompt_tokens, keys, overrides)


def _has_reading(folder: str) -> bool:
    return READING in load_folder(folder)["analysis"].blocks
