"""Gemma and other decoders on the workers: keras_hub on JAX, behind a Beam model handler."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chatflow.choices.heads import Heads
from chatflow.errors import ElementError, UsageError
from chatflow.models.gemma.grammar import ENDLESS, Text
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.parts import EngineModel, Result, json_answer
from chatflow.models.requests import FIRST, Part, Request, Version
from chatflow.models.spec import Kind, ModelSpec, Say
from chatflow.options import ONE_BUNDLE, ONE_COPY, Batching, WorkerSettings
from chatflow.weights import embedded
from chatflow.weights.adapters import ENDS, local_adapter
from chatflow.weights.families import family_named
from chatflow.weights.heads import chosen_heads, local_heads
from chatflow.weights.presets import (
    MARKERS,
    check_preset,
    is_tuned,
    local_preset,
    usable_cache,
    use_jax,
)

if TYPE_CHECKING:
    from chatflow.models.gemma.engine import Row

_log = logging.getLogger(__name__)

FIRST_BATCH = 4
"""Requests in the first batch: few, because somebody waits for them."""


class GemmaModel(EngineModel):
    """A loaded decoder that answers part by part.

    `adapter` and `heads` are local files; `batches_grow` from `FIRST_BATCH` requests. Raises
    `UsageError` if the heads were fitted on the states of another model.
    """

    def __init__(
        self,
        name: str,
        preset: str,
        settings: WorkerSettings,
        instruct: bool,
        most: int,
        adapter: str = "",
        heads: str = "",
        batches_grow: bool = False,
    ):
        started = time.monotonic()
        use_jax(alone=settings.large_model and settings.model_copies == 1)
        from chatflow.models.gemma.engine import load_engine

        engine = load_engine(preset, settings.dtype, instruct, settings.quantization, adapter)
        super().__init__(name, engine, most, settings.merge_seconds)
        if heads and not engine.forward.family.learns:
            raise UsageError(f"--heads={heads}: only for Gemma 1 to 3, not for {name}")
        self.batches_grow = batches_grow
        self.heads = Heads.load(heads) if heads else None
        if self.heads and self.heads.weights != engine.forward.fingerprint:
            raise UsageError(
                f"--heads={heads}: fitted on {self.heads.model}, not on {name}; fit others with "
                "`chatflow tune`, or give --heads=none"
            )
        _log.info("loaded %s in %.1f s", preset, time.monotonic() - started)

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Compiles what answers to such requests need, alone and in a full batch."""
        started = time.monotonic()
        self.engine.warming = True
        parts = [part for request in requests for part in request.parts]
        rows = [row_of(part) for part in parts if not part.layout]
        read = [part for part in parts if part.layout]
        if rows and not self.batches_grow:
            self.engine.warm_up(rows, self.most)
        if read and self.batches_grow:  # the first is of this size
            self._read(read * min(FIRST_BATCH, self.most))
        elif read:
            self._read(read)
            self._read(read * self.most)
        self.engine.warming = False
        if parts:
            _log.info(
                "warmed up in %.1f s: %d compilations",
                time.monotonic() - started,
                self.engine.forward.compilations,
            )

    def run(self, parts: Sequence[Part]) -> list[Result | ElementError]:
        """Reads the parts that have a layout, and runs the others."""
        read = [part for part in parts if part.layout]
        found = iter(self._read(read)) if read else iter(())
        said = iter(self.engine.run([row_of(part) for part in parts if not part.layout]))
        return [next(found) if part.layout else next(said) for part in parts]

    def _read(self, parts: Sequence[Part]) -> list[Result | ElementError]:
        found: dict[int, Result | ElementError] = {}
        for suffixes in dict.fromkeys(part.suffixes for part in parts):
            places = [at for at, part in enumerate(parts) if part.suffixes == suffixes]
            some = self._read_alike([parts[at] for at in places])
            found.update(zip(places, some, strict=True))
        return [found[at] for at in range(len(parts))]

    def _read_alike(self, parts: Sequence[Part]) -> list[Result | ElementError]:
        """Reads parts that ask the same suffixes, and lets the heads choose."""
        from chatflow.models.gemma.engine import Reading

        assert self.heads is not None  # a prompt is only read if its model has heads
        behind = tuple((suffix.text, suffix.options) for suffix in parts[0].suffixes)
        layouts = [part.layout for part in parts if part.layout is not None]
        readings = [
            Reading(p.prompt[: p.shared], p.prompt[p.shared :], layout.ends, behind)
            for p, layout in zip(parts, layouts, strict=True)
        ]
        results: list[Result | ElementError] = []
        all_states = self.engine.read(readings, self.heads.layers)
        for part, layout, states in zip(parts, layouts, all_states, strict=True):
            if isinstance(states, ElementError):
                results.append(states)
                continue
            chosen = self.heads.choose(states, layout)
            for suffix, scores in zip(part.suffixes, states.options, strict=True):
                sure = tuple(round(float(p), 4) for p in np.exp(scores))
                chosen = chosen.with_choice(suffix.choice, suffix.values, sure)
            results.append(Result(int(states.tokens.sum()), chosen=chosen))
        return results


def row_of(part: Part) -> Row:
    """Returns what the engine is asked for a part."""
    from chatflow.models.gemma.engine import Row

    shared = part.shared if part.shared < len(part.prompt) else 0
    row = Row(part.prompt[:shared], part.prompt[shared:])
    if part.choices:
        return row._replace(choices=part.choices, bias=part.bias)
    row = row._replace(max_tokens=part.max_tokens, max_characters=part.characters or ENDLESS)
    if part.schema:
        form = json_answer(part.schema)
        return row._replace(
            lead=form.before,
            choices=form.choices,
            between=form.between,
            text=Text(json_string=True),
        )
    return row._replace(text=Text(part.stop))


class GemmaModelHandler(LanguageModelHandler[GemmaModel]):
    """A decoder of keras_hub's, with one copy of the weights for all processes of a worker.

    Args:
      preset: `gemma3-270m` (embedded), a keras_hub name, a folder, `hf://`, `kaggle://` or `gs://`.
      instruct: wrap prompts in turns of the chat template; None: as the preset's name says.
      settings, expected, updates: see `LanguageModelHandler`.
      adapter: LoRA weights for the preset, see `weights.adapters`; empty: none.
      heads: what chooses from its states, see `choices.heads`; empty: none.
      name: the model's name in results; empty: the preset.
    """

    def __init__(
        self,
        preset: str = embedded.NAME,
        instruct: bool | None = None,
        settings: WorkerSettings = ONE_COPY,
        batching: Batching = ONE_BUNDLE,
        expected: tuple[Request, ...] = (),
        updates: str = "",
        adapter: str = "",
        heads: str = "",
        name: str = "",
    ):
        super().__init__(name or preset, batching, settings, expected, updates)
        self.preset = preset
        self.adapter, self.heads = adapter, heads
        self.settings = settings
        self.most = batching.max_batch_size
        self.batches_grow = bool(heads) and not batching.max_batch_duration_secs
        self.loads_ahead = preset == embedded.NAME and "://" not in f"{updates}{adapter}{heads}"
        self.instruct = is_tuned(preset) if instruct is None else instruct

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Returns Beam's settings of batches.

        Where texts are only read, those of files begin small and double, so that the first results
        come soon. Texts that are generated would be compiled for each of these sizes.
        """
        batching: Mapping[str, Any] = super().batch_elements_kwargs()
        if not self.batches_grow:
            return batching
        first = min(FIRST_BATCH, self.most)
        # Without a target of time, Beam doubles a batch until it has its largest size.
        untimed = {"target_batch_overhead": None, "target_batch_duration_secs": math.inf}
        return {**batching, "min_batch_size": first, **untimed}

    def load(self, version: Version = FIRST) -> GemmaModel:
        """Returns the model; a version replaces the preset (a folder) or the adapter (a file)."""
        preset, adapter = self.preset, self.adapter
        if version.path.endswith(ENDS):
            adapter = version.path
        elif version.path:
            preset, adapter = version.path, ""
        return GemmaModel(
            version.named(self.preset) if version.path else self.name,
            local_preset(preset, _log.info),
            self.settings,
            self.instruct,
            self.most,
            local_adapter(adapter, _log.info) if adapter else "",
            local_heads(self.heads, _log.info) if self.heads else "",
            self.batches_grow,
        )


class Gemma(Kind):
    """A decoder on the workers: the embedded Gemma, and those that keras_hub loads."""

    update_files = (*MARKERS, ENDS)

    def check(self, spec: ModelSpec) -> None:
        if spec.worker.dtype == "float16":
            raise UsageError(
                f"--dtype=float16: only for torch: and vllm: models; --model={spec.name} runs in "
                "float32 or bfloat16, because activations can be too large for float16"
            )
        check_preset(spec.name)
        family = family_named(spec.name)
        if family is not None and family.tuned and "thinking" in spec.name.lower():
            raise UsageError(
                f"--model={spec.name}: it thinks before each answer, which is not supported; "
                "choose another model"
            )
        if family is not None and spec.worker.quantization != "none" and not family.quantizes:
            raise UsageError(
                f"--quantization={spec.worker.quantization}: keras_hub cannot quantise "
                f"{family.name}; leave it out"
            )

    def instruct(self, spec: ModelSpec) -> bool:
        return is_tuned(spec.name)

    def adaptable(self, spec: ModelSpec) -> bool:
        check_preset(spec.name)
        family = family_named(spec.name)
        return family is None or family.learns

    def heads(self, spec: ModelSpec) -> str:
        return chosen_heads(spec.heads, spec.name, spec.instruct)

    def prepare(self, spec: ModelSpec, say: Say) -> None:
        """Makes the embedded model, with progress, if it is missing; checks the cache of others."""
        if spec.name == embedded.NAME:
            local_preset(embedded.NAME, lambda text: say(f"{embedded.NAME}: {text}"))
        elif "://" in spec.name and not spec.name.startswith(("hf://", "kaggle://")):
            with usable_cache(spec.name):
                embedded.check_cache()

    def handler(self, spec: ModelSpec, expected: tuple[Request, ...]) -> GemmaModelHandler:
        return GemmaModelHandler(
            spec.name,
            instruct=spec.instruct,
            settings=spec.worker,
            batching=spec.batching,
            expected=expected,
            updates=spec.updates,
            adapter=spec.adapter,
            heads=spec.own_heads,
            name=spec.result_name,
        )
