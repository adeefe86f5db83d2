"""The families of keras_hub's decoders that run on the workers, and what differs between them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """What the engine must know of a backbone; `kv_heads` of `head` are those of the cache."""

    layers: int
    kv_heads: int
    head: int
    hidden: int
    vocabulary: int


class Family(NamedTuple):
    """One family; `keras_hub.models` has its backbone and its causal model by `name`.

    Attributes:
      types: what Hugging Face's configurations call it.
      known_as: a pattern of its names.
      before, after: what the chat template of an instruct model puts around a prompt, as one turn
        of the user; the answer follows.
      no_thoughts: returns what follows `after` where a backbone's model would think aloud first.
      ends: control tokens that end an answer, beside the tokenizer's own end token.
      sizes: returns those of a backbone.
      position_axis: of the cache `[rows, layers, 2, positions, heads, head_dim]` or, with 4, of
        `[rows, layers, 2, heads, positions, head_dim]`; with 1, each layer's keys and values are
        separate arrays: `[rows, positions, heads, head_dim]`.
      masked: a call needs a padding mask over the whole cache.
      tuned: its models follow instructions, unless their name says "base".
      quantizes: keras_hub can quantise it. As of 0.32, Gemma 3n's output then uses the raw int8
        values of its embedding as weights, and SmolLM 3 has a layer that refuses.
      learns: heads and adapters can be fitted to it.
    """

    name: str
    types: tuple[str, ...]
    known_as: str
    before: str
    after: str
    no_thoughts: Callable[[Any], str] = lambda backbone: ""
    ends: tuple[str, ...] = ()
    sizes: Callable[[Any], Sizes] = lambda backbone: _sizes(backbone, backbone.head_dim)
    position_axis: int = 3
    masked: bool = False
    tuned: bool = False
    quantizes: bool = True
    learns: bool = False

    def turns(self, backbone: Any) -> tuple[str, str]:
        """Returns what stands before and after a prompt in the chat template."""
        return self.before, self.after + self.no_thoughts(backbone)


def _sizes(backbone: Any, head: int) -> Sizes:
    """Returns `Family.sizes` of a backbone with keras_hub's usual names."""
    heads, hidden = backbone.num_key_value_heads, backbone.hidden_dim
    return Sizes(backbone.num_layers, heads, head, hidden, backbone.vocabulary_size)


_GEMMA_USER, _GEMMA_MODEL = (
    "<start_of_turn>user\n",
    "<end_of_turn>\n<start_of_turn>model\n",
)

_IM_MODEL = "<|im_end|>\n<|im_start|>assistant\n"

FAMILIES = {
    family.name: family
    for family in (
        # https://ai.google.dev/gemma/docs/core/prompt-structure
        Family(
            "Gemma3", ("gemma3", "gemma3_text"), r"gemma[-_]?3(?![n\d])", _GEMMA_USER, _GEMMA_MODEL,
            ends=("<end_of_turn>",), position_axis=1, learns=True,
        ),
        Family(
            "Gemma3n", ("gemma3n",), r"gemma[-_]?3n", _GEMMA_USER, _GEMMA_MODEL,
            ends=("<end_of_turn>",), position_axis=4, masked=True, quantizes=False,
            sizes=lambda b: Sizes(
                b.num_hidden_layers, b.num_key_value_heads, b.head_dim, b.text_hidden_size,
                b.text_vocab_size,
            ),
        ),
        Family(
            "Gemma", ("gemma", "gemma2"), r"gemma(?![-_]?[34](?!b))", _GEMMA_USER, _GEMMA_MODEL,
            ends=("<end_of_turn>",), learns=True,
        ),
        # https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4; the small ones (E2B, E4B),
        # which have separate inputs for each layer, do not think unless asked to.
        Family(
            "Gemma4", ("gemma4", "gemma4_text"), r"gemma[-_]?4(?![\db])",
            "<|turn>user\n", "<turn|>\n<|turn>model\n",
            no_thoughts=lambda b: (
                "" if b.hidden_size_per_layer_input else "<|channel>thought\n<channel|>"
            ),
            ends=("<turn|>",),
            sizes=lambda b: _sizes(b, max(b.head_dim, b.global_head_dim or 0)),
        ),
        # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
        Family(
            "Llama3", ("llama",), r"llama[-_]?3(?!\d)",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ends=("<|eot_id|>",), sizes=lambda b: _sizes(b, b.hidden_dim // b.num_query_heads),
        ),
        # https://huggingface.co/Qwen/Qwen3-8B, with `enable_thinking=False`. Those of July 2025,
        # which do not think, have longer waves: https://huggingface.co/Qwen/Qwen3-4B-Instruct-2507.
        Family(
            "Qwen3", ("qwen3",),
            r"qwen[-_]?3(?!\.?\d|[-_]?(?:moe|vl|next|omni|embedding|guard|reranker)|.*\d+b-a\d)",
            "<|im_start|>user\n", _IM_MODEL, tuned=True,
            no_thoughts=lambda b: (
                "<think>\n\n</think>\n\n" if b.rope_max_wavelength < 5e6 else ""
            ),
            ends=("<|im_end|>", "<|endoftext|>"),
        ),
        # https://huggingface.co/HuggingFaceTB/SmolLM3-3B, in its mode /no_think; its template also
        # states the date, which is left out because answers would change daily.
        Family(
            "SmolLM3", ("smollm3",), r"smollm[-_]?3(?!\d)",
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
            "Reasoning Mode: /no_think\n\n## Custom Instructions\n\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face.\n\n"
            "<|im_end|>\n<|im_start|>user\n",
            _IM_MODEL, no_thoughts=lambda b: "<think>\n\n</think>\n", tuned=True, quantizes=False,
            ends=("<|im_end|>",), sizes=lambda b: _sizes(b, b.hidden_dim // b.num_attention_heads),
        ),
    )
}  # fmt: skip
"""By name."""

LLAMA_3_TOKENS = 128_000
"""The least size of a vocabulary of Llama 3's."""

ALL = "Gemma 1 to 4 and 3n, Llama 3, Qwen 3 and SmolLM 3"


def family_of(backbone: Any) -> Family:
    """Returns a backbone's family; raises `ValueError` if the engine does not run it."""
    name = type(backbone).__name__.removesuffix("Backbone")
    if name not in FAMILIES:
        raise ValueError(f"the model is a {name}; {ALL} run on the workers")
    return FAMILIES[name]


def family_named(model: str) -> Family | None:
    """Returns the family that a local folder or a name tells, if any; loads nothing.

    Raises `ValueError` if a folder holds a model of another family.

    >>> family_named("hf://google/gemma-3n-E2B-it").name, family_named("gemma3-270m").name
    ('Gemma3n', 'Gemma3')
    >>> family_named("qwen3_0.6b_en").name, family_named("hf://me/mine")
    ('Qwen3', None)
    """
    config = Path(model, "config.json")
    if "://" not in model and config.is_file():
        try:
            found = json.loads(config.read_text())
        except json.JSONDecodeError:
            return None  # the code that reads it reports the error
        return family_in(found) if _kind_in(found) else None
    last = model.lower().rstrip("/").rsplit("/", 1)[-1]
    found = (f for f in FAMILIES.values() if re.search(rf"(?<![a-z\d]){f.known_as}", last))
    return next(found, None)


def family_in(config: Mapping[str, Any]) -> Family:
    """Returns the family in a configuration of Keras's or Hugging Face's; raises `ValueError`."""
    kind = _kind_in(config)
    if kind == "llama" and (config.get("vocab_size") or LLAMA_3_TOKENS) < LLAMA_3_TOKENS:
        kind = "Llama 1 or 2"  # or others that call themselves so
    for family in FAMILIES.values():
        if family.name == kind or kind in family.types:
            return family
    raise ValueError(f"the model is a {kind or 'nameless one'}; {ALL} run on the workers")


def _kind_in(config: Mapping[str, Any]) -> str:
    registered = str(config.get("registered_name", "")).rpartition(">")[2]
    return registered.removesuffix("Backbone") or str(config.get("model_type", ""))
