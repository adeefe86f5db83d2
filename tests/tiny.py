"""Tiny models with random weights and a SentencePiece tokenizer of their own, as real files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from chatflow.models.presets import use_jax

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


def tiny_t5(folder: str | os.PathLike[str], seed: int = 7) -> str:
    """A folder with a T5 of the newer kind (gated, as Flan-T5), as Hugging Face saves it."""
    import sentencepiece
    import torch
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]), model_writer=proto, vocab_size=60,
        model_type="unigram", hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=10)
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(Path(folder))
    return os.fspath(folder)
