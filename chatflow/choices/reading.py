"""What a model reads of a chat: its pieces, the states of the layers, and what heads see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from chatflow.chat_text import as_data
from chatflow.choices.sentences import CUSTOMER, FEATURES, Sentence, features
from chatflow.records import Chat


class Layout(NamedTuple):
    """How a text that is read divides into pieces, and what is known of them without a model.

    Attributes:
      ends: where the pieces end, in characters; after the last comes what the template adds.
      sentences: which pieces are sentences of the chat.
      messages: of each sentence, the index of its message.
      customer: of each sentence, whether the user whose tone is asked for says it.
      plain: figures of each sentence; see `sentences.features`.
    """

    ends: tuple[int, ...]
    sentences: tuple[int, ...]
    messages: tuple[int, ...]
    customer: tuple[bool, ...]
    plain: tuple[tuple[float, ...], ...]


class States(NamedTuple):
    """The hidden states of some layers after a text was read.

    Attributes:
      mean: of each piece, `[pieces, layers, hidden]`; the last is what follows `Layout.ends`.
      last: of each piece's last token, the same shape.
      tokens: of each piece, `[pieces]`; an empty piece has the states of the text before it.
      options: of each suffix, the log-probability of each of its options among them.
    """

    mean: np.ndarray
    last: np.ndarray
    tokens: np.ndarray
    options: tuple[np.ndarray, ...] = ()


def chat_vector(states: States, layout: Layout) -> np.ndarray:
    """Returns what the heads over a chat see, `[features]`.

    It is, of each layer, the mean of all tokens before the template's last words, the last token,
    the mean of what the customer says, and of their last message; and plain figures of the chat.
    """
    weight = states.tokens.astype(np.float64)
    own = [at for at, mine in zip(layout.sentences, layout.customer, strict=True) if mine]
    last = [m for m, mine in zip(layout.messages, layout.customer, strict=True) if mine][-1:]
    final = [
        at
        for at, message, mine in zip(
            layout.sentences, layout.messages, layout.customer, strict=True
        )
        if mine and message in last
    ]
    every = list(range(len(weight) - 1))

    def mean(pieces: Sequence[int]) -> np.ndarray:
        some = list(pieces) or every
        parts = weight[some][:, None, None]
        found: np.ndarray = (states.mean[some] * parts).sum(0) / max(parts.sum(), 1.0)
        return found.ravel()

    plain = plain_vector(np.array(layout.plain, np.float32), np.array(layout.customer, bool))
    return np.concatenate(
        [mean(every), states.last[-1].ravel(), mean(own), mean(final), plain]
    ).astype(np.float32)


def plain_vector(plain: np.ndarray, customer: np.ndarray) -> np.ndarray:
    """Returns plain figures of a chat: sums and ends of those of its sentences."""
    if not len(plain):
        return np.zeros(6 * FEATURES + 1, np.float32)
    mine = plain[customer] if customer.any() else plain[:1]
    theirs = plain[~customer] if (~customer).any() else np.zeros_like(plain[:1])
    ends = plain[-1], mine[-1], theirs[-1]
    return np.concatenate(
        [mine.mean(0), theirs.mean(0), plain.max(0), *ends, [np.log1p(len(plain))]]
    ).astype(np.float32)


def sentence_vectors(states: States | None, layout: Layout) -> np.ndarray:
    """Returns what the heads over sentences see, `[sentences, features]`."""
    plain = np.array(layout.plain, np.float32).reshape(len(layout.sentences), FEATURES)
    if states is None:
        return plain
    at = list(layout.sentences)
    count = len(at)
    return np.hstack(
        [plain, states.mean[at].reshape(count, -1), states.last[at].reshape(count, -1)]
    ).astype(np.float32)


def of_messages(rows: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns the mean of the rows of each message's sentences."""
    messages = np.array(layout.messages)
    return np.stack([rows[messages == message].mean(0) for message in dict.fromkeys(messages)])


def layout_of(prompt: str, shared: int, chat: Chat, sentences: Sequence[Sentence]) -> Layout | None:
    """Returns how a rendered prompt divides into the sentences of its chat.

    Args:
      shared: how many characters at the start are not the chat's.

    Returns None if the prompt does not show every sentence, in order.
    """
    ends: list[int] = []
    pieces: list[int] = []
    at = shared
    for sentence in sentences:
        text = as_data(sentence.text)
        start = prompt.find(text, at)
        if start < 0:
            return None
        gap = len(prompt[shared:start].rstrip(" "))  # a token begins with its space
        if gap > (ends[-1] if ends else 0):
            ends.append(gap)
        pieces.append(len(ends))
        at = start + len(text)
        ends.append(at - shared)
    return plain_layout(chat, sentences)._replace(ends=tuple(ends), sentences=tuple(pieces))


def plain_layout(chat: Chat, sentences: Sequence[Sentence]) -> Layout:
    """Returns a layout of sentences that no model reads."""
    return Layout(
        (),
        tuple(range(len(sentences))),
        tuple(sentence.message for sentence in sentences),
        tuple(sentence.speaker == CUSTOMER for sentence in sentences),
        tuple(tuple(round(float(x), 4) for x in row) for row in features(chat, sentences)),
    )
