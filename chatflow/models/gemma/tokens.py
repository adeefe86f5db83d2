"""What the tokens of keras_hub's tokenizers write, and how text becomes tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras_hub
import sentencepiece

from chatflow.chat_text import CONTROL_TOKEN

Encode = Callable[[str], list[int]]
Pieces = Callable[[], list[bytes]]


def text_tokens(tokenizer: Any) -> tuple[Encode, Pieces]:
    """Returns a function from a text to token ids, and one that returns the bytes of each token.

    The second takes a second with a large vocabulary, and only what writes texts needs it.
    Control tokens are not found in texts. SentencePiece's user-defined tokens are;
    `chat_text.as_data` protects from them. Tokens that never occur in a text write nothing.

    Raises `ValueError` for a tokenizer of another kind.
    """
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        # A tokenizer without control tokens; otherwise it would look for them in the text.
        plain = keras_hub.tokenizers.BytePairTokenizer(
            tokenizer.vocabulary, tokenizer.merges, unsplittable_tokens=[]
        )
        pieces = _pieces_of_pairs(tokenizer.vocabulary, tokenizer.merges)
        return _encoder(plain), lambda: pieces
    return _encoder(tokenizer), lambda: _pieces_of_sentences(tokenizer.proto)


def _encoder(tokenizer: Any) -> Encode:
    return lambda text: [int(i) for i in tokenizer(text)] if text else []


def _pieces_of_sentences(proto: bytes) -> list[bytes]:
    """Returns the bytes of each token of a SentencePiece model."""
    pieces = []
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for token in range(model.vocab_size()):
        piece = model.id_to_piece(token)
        if model.is_byte(token):
            pieces.append(bytes([int(piece[3:-1], 16)]))
        elif (
            model.is_control(token)
            or model.is_unknown(token)
            or model.is_unused(token)
            or CONTROL_TOKEN.fullmatch(piece)
        ):
            pieces.append(b"")
        else:
            pieces.append(piece.replace("▁", " ").encode())
    return pieces


def _pieces_of_pairs(vocabulary: dict[str, int], merges: list[str]) -> list[bytes]:
    """Returns the bytes of each token of a byte-level BPE, which spells each byte as a letter.

    Only single letters and the results of merges occur in a text.
    """
    letters = _letters()
    if not letters.keys() <= vocabulary.keys():
        raise ValueError("the tokenizer is not a byte-level BPE, which its family uses")
    in_text = {*letters, *(merge.replace(" ", "") for merge in merges)}
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if token in in_text:
            pieces[number] = bytes(letters[letter] for letter in token)
    return pieces


def _letters() -> dict[str, int]:
    """Returns the byte of each letter: printable Latin-1 stands for itself, others follow U+0100.

    From https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + at): b for at, b in enumerate(hidden)}
