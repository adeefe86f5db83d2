"""Tiny models with random weights and a SentencePiece tokenizer of their own, as real files."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chatflow.choices.declared import HEAD
from chatflow.choices.heads import CHAT, Head, Heads
from chatflow.choices.sentences import FEATURES
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.weights.presets import use_jax

CORPUS = "the parcel is late and the customer is angry about it but the agent said sorry . " * 4


def tiny_gemma(
    folder: str | os.PathLike[str],
    generation: str = "gemma3",
    seed: int = 7,
    broken: bool = False,
) -> str:
    """A folder with a Gemma of a generation (`gemma`, `gemma2`, `gemma3`), as keras_hub saves it.

    Tokens that no text may hold, and single bytes, which a grammar mostly forbids, are unlikely,
    so that most of what is written is what is likeliest.

    Args:
      broken: the weights are no numbers.
    """
    use_jax()
    import keras_hub
    import sentencepiece

    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]), model_writer=proto, vocab_size=316, model_type="BPE",
        byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", add_dummy_prefix=False, minloglevel=2,
        control_symbols=["<start_of_turn>", "<end_of_turn>"], user_defined_symbols=["\n"],
    )  # fmt: skip
    size = {
        "vocabulary_size": 316, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
        "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
    }  # fmt: skip
    window = {"use_sliding_window_attention": True, "sliding_window_size": 8}
    if generation == "gemma3":
        backbone = keras_hub.models.Gemma3Backbone(
            image_size=None, vision_encoder=None, **size, **window
        )
        tokenizer = keras_hub.models.Gemma3Tokenizer(proto.getvalue(), has_vision_tokens=False)
    else:
        caps = {"attention_logit_soft_cap": 50, "final_logit_soft_cap": 30, **window}
        backbone = keras_hub.models.GemmaBackbone(
            **size, **(caps if generation == "gemma2" else {})
        )
        tokenizer = keras_hub.models.GemmaTokenizer(proto.getvalue())
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        variable.assign(rng.normal(0, 0.3, variable.shape) + (np.nan if broken else 0))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    table = np.array(backbone.token_embedding.embeddings)
    table[
        [pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i) for i in range(316)]
    ] = 0
    backbone.token_embedding.embeddings.assign(table)
    os.makedirs(folder, exist_ok=True)
    backbone.save_to_preset(os.fspath(folder))
    tokenizer.save_to_preset(os.fspath(folder))
    return os.fspath(folder)


def tiny_heads(
    path: str | os.PathLike[str],
    prompt: AnalysisPrompt,
    weights: str = "",
    layers: tuple[int, ...] = (1, 2),
    without: Collection[str] = (),
    others: Mapping[str, Any] | None = None,
    seed: int = 7,
) -> str:
    """A file of random heads for a tiny Gemma and all that a prompt's folder chooses.

    Args:
      prompt: of a model without heads.
      weights: the fingerprint of the model.
      without: choices that have no head.
      others: fields of `Heads` in place of those that fit.
    """
    rng, seen = np.random.default_rng(seed), len(layers) * 16
    heads = []
    declared = {c.name: (c.over, c.kind, tuple(c.values)) for c in prompt.choices if c.by == HEAD}
    declared.setdefault("tone", (CHAT, "one", tuple(prompt.tones)))
    for name, (over, kind, values) in declared.items():
        size = 4 * seen + 6 * FEATURES + 1 if over == CHAT else FEATURES + 2 * seen
        if name not in without:
            layer = rng.normal(0, 0.3, (size, len(values))), np.zeros(len(values))
            heads.append(Head(name, over, kind, values, (layer,)))
    about = {"model": "tiny", "weights": weights, "template": prompt.reading_hash}
    made = Heads(**{**about, **(others or {})}, layers=layers, heads=tuple(heads))
    made.save(os.fspath(path))
    return os.fspath(path)


def tiny_t5(folder: str | os.PathLike[str], seed: int = 7, tied: bool = False) -> str:
    """A folder with a T5 of the newer kind (gated, as Flan-T5), as Hugging Face saves it.

    Args:
      tied: the output has the embedding's weights, and none of its own as in Flan-T5.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return _saved(folder, T5ForConditionalGeneration, config, tokenizer, seed, tied)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} . {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}agent . {% endif %}"
)


def tiny_llama(folder: str | os.PathLike[str], seed: int = 7) -> str:
    """The same for a decoder-only model with a chat template: of 128 tokens at most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _t5_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _saved(folder, LlamaForCausalLM, config, tokenizer, seed)


def _t5_tokenizer() -> Any:
    import sentencepiece
    from transformers import T5Tokenizer

    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]), model_writer=proto, vocab_size=60,
        model_type="unigram", hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=10)


def _saved(
    folder: str | os.PathLike[str],
    kind: Any,
    config: Any,
    tokenizer: Any,
    seed: int,
    tied: bool = False,
) -> str:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = kind(config)
    if not tied:  # transformers makes the output the embedding
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        # Tokens that no text holds are unlikely.
        model.lm_head.weight[[*{*tokenizer.all_special_ids} - {tokenizer.eos_token_id}]] = 0
    tokenizer.save_pretrained(folder)
    model.save_pretrained(Path(folder))
    return os.fspath(folder)
