"""Chooses the model and prompts for a chat: the same for all, or by an attribute.

`--models=FILE` is YAML. A key is a value of the attribute. Flags set what an entry leaves out:

    attribute: tenant
    models:
      - keys: [acme, globex]
        prompts: prompts/shop
      - keys: [initech]
        model: torch:google/flan-t5-base
        settings: {summary_grounding: 0.5, draft_confidence: 0.7}
        draft: {model: gemini-2.5-flash}
        escalate: {model: gemini-2.5-flash, below: {tone: 0.8, resolved: 0.7}}
        fallback: {model: "openai:small", api_endpoint: "http://localhost:11434/v1"}
    default: {}

`settings` are constants of the templates, such as thresholds. `default` is for chats with another
value or none; without it they become dead letters. Entries with the same model share it. Other
models may write the drafts (`draft`), analyse again what the first is not sure of (`escalate`), and
be asked if it does not answer (`fallback`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import yaml
from apache_beam.io.filesystems import FileSystems

from chatflow.errors import BadInputError, UsageError, one_line
from chatflow.models.spec import ModelSpec, inference_of
from chatflow.options import Options
from chatflow.prompts.questions import READING, AnalysisPrompt, DraftPrompt, Prompt
from chatflow.prompts.templates import load_folder
from chatflow.records import Chat

PromptT = TypeVar("PromptT", bound=Prompt)

_log = logging.getLogger(__name__)

FIELDS = (
    "inference", "model", "model_kind", "state_dict_path", "adapter", "heads", "prompts",
    "max_prompt_tokens", "dtype", "quantization", "vllm_args", "model_updates", "api_endpoint",
    "api_key", "response_format", "thinking",
)  # fmt: skip
"""The flags that an entry may set."""

BESIDE = ("draft", "escalate", "fallback")
"""The other models that an entry may name."""


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

    Attributes:
      folder: has the prompts.
      keys: values of the attribute; empty for the default.
      overrides: replace constants of the templates.
      draft: writes the drafts instead of this one.
      escalate: analyses again what this one is not sure of; its `sure` says how sure is enough.
      fallback: is asked if this one does not answer.
      sure: how sure the model before this one must be, by field.
    """

    spec: ModelSpec
    folder: str
    max_prompt_tokens: int
    keys: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    draft: Route | None = None
    escalate: Route | None = None
    fallback: Route | None = None
    sure: tuple[tuple[str, float], ...] = ()

    @property
    def all_specs(self) -> Iterator[ModelSpec]:
        """Yields the model, and those beside it."""
        yield self.spec
        for other in (self.draft, self.escalate, self.fallback):
            if other is not None:
                yield from other.all_specs

    def prompts(self) -> tuple[AnalysisPrompt, DraftPrompt]:
        """Returns the prompts, made from the templates as they are now.

        Raises `UsageError` if a template has a mistake, or none has a constant to override.
        """
        analysis, draft = self._own_prompts()
        if self.draft is not None:
            draft = self.draft._own_prompts()[1]
        if self.fallback is not None:
            other_analysis, other_draft = self.fallback._own_prompts()
            analysis = dataclasses.replace(analysis, fallback=other_analysis)
            draft = dataclasses.replace(draft, fallback=other_draft)
        if self.escalate is not None:
            second, _ = self.escalate._own_prompts()
            analysis = dataclasses.replace(analysis, second=second, sure=self.escalate.sure)
        return analysis, draft

    def _own_prompts(self) -> tuple[AnalysisPrompt, DraftPrompt]:
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
        every = (spec for route in self.routes for spec in route.all_specs)
        return tuple({spec.key: spec for spec in every}.values())

    @property
    def escalates(self) -> bool:
        """Whether some model is asked about what another one is not sure of."""
        return any(route.escalate is not None for route in self.routes)

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
        entry = {
            "draft": {"model": options.draft_model},
            "escalate": {"model": options.escalate_model, "below": options.escalate_below},
            "fallback": {"model": options.fallback_model},
        }
        named = {name: beside for name, beside in entry.items() if beside["model"]}
        if options.escalate_below and not options.escalate_model:
            raise UsageError("--escalate_below: only with --escalate_model")
        return Routes((_with_others("", _route(options, spec_of), named, options, spec_of),))
    if options.draft_model or options.escalate_model or options.fallback_model:
        raise UsageError(
            "--draft_model, --escalate_model, --fallback_model: with --models, give each entry its "
            "own: draft, escalate, fallback"
        )
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
        _check_fields(here, entry, {"keys", "settings", *BESIDE, *FIELDS})
        keys = entry.get("keys")
        if not isinstance(keys, list) or not keys:
            raise UsageError(f"{here}: keys: must be a list of values of {attribute}")
        keys = tuple(_key(here, key) for key in keys)
        if double := [key for key in keys if key in taken or keys.count(key) > 1]:
            raise UsageError(f"{here}: keys: {double[0]!r} is given twice")
        taken.update(keys)
        routes.append(_entry(here, entry, options, spec_of, keys))
    if "default" in value:
        here = f"{where}: default"
        _check_fields(here, value["default"], {"settings", *BESIDE, *FIELDS})
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
        route = _route(own, spec_of, keys, tuple(sorted(settings.items())))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return _with_others(f"{where}: ", route, entry, own, spec_of)


def _with_others(
    where: str, route: Route, entry: Mapping[str, Any], options: Options, spec_of: SpecOf
) -> Route:
    """Returns a route with the other models that its entry names."""
    others: dict[str, Any] = {}
    for name in BESIDE:
        if name not in entry:
            continue
        here = f"{where}{name}" if where else f"--{name}_model"
        beside = entry[name]
        own = {"below"} if name == "escalate" else set()
        _check_fields(here, beside, {"settings", *own, *FIELDS} - {"model_updates"})
        if not beside.get("model"):
            raise UsageError(f"{here}: model: give one")
        flags = {"inference": inference_of(beside["model"]), **beside}
        blank = dataclasses.replace(options, prompts="", model_kind="auto")
        theirs, ours = _vendor(beside["model"]), _vendor(options.model)
        if ours and theirs != ours:  # what belongs to one service goes to no other
            key = options.api_key if ours == "google" else ""
            blank = dataclasses.replace(blank, api_endpoint="", api_key=key)
        others[name] = _entry(here, flags, blank, spec_of, ())
        if name == "escalate":
            sure = sure_of(beside.get("below"), f"{here}: below" if where else "--escalate_below")
            others[name] = dataclasses.replace(others[name], sure=sure)
    keyed = {_vendor(other.spec.name) for other in others.values() if other.spec.remote.api_key}
    if options.api_key and len(keyed - {"google", ""}) > 1:
        raise UsageError(
            f"{where}--api_key: belongs to one service; in --models, each entry can have its own"
        )
    return dataclasses.replace(route, **others)


def _vendor(model: str) -> str:
    """Returns whose service a model is behind; "" on the worker."""
    if inference_of(model) == "on_worker":
        return ""
    prefix, colon, _ = model.partition(":")
    return prefix if colon else "google"


def sure_of(given: Any, where: str) -> tuple[tuple[str, float], ...]:
    """Returns how sure a model must be by field, from a mapping or `tone:0.8,resolved:0.7`."""
    if isinstance(given, str):
        given = dict(pair.partition(":")[::2] for pair in given.split(",") if pair)
    try:
        found = tuple((str(name), float(least)) for name, least in dict(given or {}).items())
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 < least <= 1 for _, least in found):
        raise UsageError(f"{where}: give probabilities by field, e.g. tone:0.8,resolved:0.7")
    return found


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
