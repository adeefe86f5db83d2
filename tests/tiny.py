"""Tiny models with random weights and a SentencePiece tokenizer of their own, as real files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from string import ascii_letters
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
      broken: the weights are not numbers.
    """
    use_jax()
    import keras_hub

    proto = _sentences(("<start_of_turn>", "<end_of_turn>"))
    size = {
        "vocabulary_size": 316, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
        "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
    }  # fmt: skip
    window = {"use_sliding_window_attention": True, "sliding_window_size": 8}
    if generation == "gemma3":
        backbone = keras_hub.models.Gemma3Backbone(
            image_size=None, vision_encoder=None, **size, **window
        )
        tokenizer = keras_hub.models.Gemma3Tokenizer(proto, has_vision_tokens=False)
    else:
        caps = {"attention_logit_soft_cap": 50, "final_logit_soft_cap": 30, **window}
        backbone = keras_hub.models.GemmaBackbone(
            **size, **(caps if generation == "gemma2" else {})
        )
        tokenizer = keras_hub.models.GemmaTokenizer(proto)
    shift = np.nan if broken else 0.0
    return _preset(folder, backbone, tokenizer, _silent_sentences(proto), seed, shift)


def tiny_decoder(folder: str | os.PathLike[str], kind: str, seed: int = 7) -> str:
    """The same for another family: `gemma3n`, `gemma4`, `gemma4_moe`, `llama3`, `qwen3`, `smollm3`.

    `gemma4` is built like E2B; `gemma4_moe` like 26B-A4B, with experts and fewer global heads.
    """
    use_jax()
    import keras_hub

    models = keras_hub.models
    size = {
        "num_layers": 4, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 16,
        "intermediate_dim": 32,
    }  # fmt: skip
    if kind.startswith("gemma"):
        proto = _sentences(GEMMA_3N if kind == "gemma3n" else GEMMA_4)
        silent = _silent_sentences(proto)
        if kind == "gemma3n":
            tokenizer = models.Gemma3nTokenizer(proto)
        else:
            tokenizer = models.Gemma4Tokenizer(
                proto, has_vision_tokens=False, has_video_tokens=False
            )
    if kind == "gemma3n":
        backbone = models.Gemma3nBackbone(
            text_vocab_size=SENTENCES, text_hidden_size=16, num_hidden_layers=4, pad_token_id=0,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=[32] * 4,
            hidden_activation="gelu_approximate",
            layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8,
            rope_theta=1e6, max_position_embeddings=512, vocab_size_per_layer_input=SENTENCES,
            hidden_size_per_layer_input=4, altup_num_inputs=2, altup_coef_clip=120.0,
            laurel_rank=4, activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
            num_kv_shared_layers=2, final_logit_soft_cap=30.0,
        )  # fmt: skip
    elif kind.startswith("gemma4"):
        size |= {
            "vocabulary_size": SENTENCES, "image_size": None, "head_dim": 8, "global_head_dim": 16,
            "sliding_window_size": 8, "sliding_window_pattern": 2, "final_logit_soft_cap": 30.0,
            "global_rope_partial_rotary_factor": 0.25,
        }  # fmt: skip
        if kind == "gemma4":
            size |= {
                "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": SENTENCES,
                "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
            }  # fmt: skip
        else:
            size |= {
                "num_query_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
                "enable_moe_block": True, "num_experts": 4, "num_experts_per_token": 2,
                "expert_intermediate_dim": 8,
            }  # fmt: skip
        backbone = models.Gemma4Backbone(**size)
    elif kind == "llama3":
        tokenizer, silent = _pairs(models.Llama3Tokenizer, LLAMA)
        backbone = models.Llama3Backbone(vocabulary_size=PAIRS, **size)
    elif kind == "qwen3":
        tokenizer, silent = _pairs(models.Qwen3Tokenizer, QWEN)
        backbone = models.Qwen3Backbone(
            vocabulary_size=PAIRS, head_dim=8, sliding_window_size=None, **size
        )
    elif kind == "smollm3":
        tokenizer, silent = _pairs(models.SmolLM3Tokenizer, SMOLLM)
        size["num_attention_heads"] = size.pop("num_query_heads")
        backbone = models.SmolLM3Backbone(
            vocabulary_size=PAIRS, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
            rope_layer_enabled_list=[True, True, True, False], layer_types=["full_attention"] * 4,
            layer_norm_epsilon=1e-6, max_position_embeddings=512, rope_theta=5e6,
            partial_rotary_factor=1.0, **size,
        )  # fmt: skip
    return _preset(folder, backbone, tokenizer, silent, seed, others=1.0)


SENTENCES, PAIRS = 330, 300
"""Tokens of the vocabularies."""
GEMMA_3N = (
    "<start_of_turn>", "<end_of_turn>", "<image_soft_token>", "<audio_soft_token>",
    "<start_of_image>", "<end_of_image>", "<start_of_audio>", "<end_of_audio>", "<mask>",
    "[multimodal]",
)  # fmt: skip
GEMMA_4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>")
LLAMA = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
SMOLLM = ("<|begin_of_text|>", "<|end_of_text|>", *QWEN[1:])


def _sentences(control: tuple[str, ...]) -> bytes:
    """Returns a SentencePiece model like Gemma's."""
    import sentencepiece

    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]), model_writer=proto, model_type="BPE",
        vocab_size=316 if len(control) == 2 else SENTENCES, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", add_dummy_prefix=False, minloglevel=2,
        control_symbols=list(control), user_defined_symbols=["\n"],
    )  # fmt: skip
    return proto.getvalue()


def _silent_sentences(proto: bytes) -> list[int]:
    """Returns tokens that a grammar mostly forbids."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return [
        i
        for i in range(len(pieces))
        if pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i)
    ]


def _pairs(kind: Any, control: tuple[str, ...]) -> tuple[Any, list[int]]:
    """Returns a tokenizer of byte-level BPE, and its tokens that no text may hold."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PAIRS, initial_alphabet=ByteLevel.alphabet(), special_tokens=list(control),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([CORPUS], trainer)
    model = json.loads(made.to_str())["model"]
    vocabulary = model["vocab"]
    alone = [i for piece, i in vocabulary.items() if len(piece) == 1 and piece not in ascii_letters]
    tokenizer = kind(vocabulary=vocabulary, merges=[" ".join(pair) for pair in model["merges"]])
    return tokenizer, [*alone, *(vocabulary[token] for token in control)]


def _preset(
    folder: str | os.PathLike[str],
    backbone: Any,
    tokenizer: Any,
    silent: list[int],
    seed: int,
    shift: float = 0.0,
    others: float = 0.3,
) -> str:
    """Saves a model with random weights that rarely writes the `silent` tokens."""
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        # An embedding that outweighs the layers would say one word again and again.
        scale = 0.3 if "embedding" in variable.path else others
        variable.assign(rng.normal(0, scale, variable.shape) + shift)
    text = getattr(backbone, "language_model", None)
    embedding = text.embed_tokens if text else backbone.token_embedding
    tables = [((embedding.embedding if text else embedding).embeddings, np.s_[silent])]
    if not getattr(embedding, "tie_weights", True):
        tables = [(embedding.reverse_embeddings, np.s_[:, silent])]
    for table, at in tables:
        values = np.array(table)
        values[at] = 0
        table.assign(values)
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
      tied: the output has the embedding's weights instead of separate ones as in Flan-T5.
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
