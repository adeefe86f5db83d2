"""Describes valid answers by an automaton over the tokens of a vocabulary.

A regular expression describes the characters of a text. outlines-core compiles it to a byte
automaton (UTF-8, so that no answer ends inside a character). Here each token is followed through
that automaton from every state. Tokens that do the same in all states form a class: Gemma's 262,144
tokens are about a thousand classes, so that the tables fit on the device and a mask is one lookup
of a row's state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DONE = 0
"""The state of a text that has ended. Every automaton has it."""

ENDLESS = 1 << 20
"""More characters, and more tokens, than any answer has."""

_FIRST = r'(?:[^\s"\\\x00-\x1F\x7F-\x9F]|\\["\\/])'
_CHARACTER = r'(?:[^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])'


class Text(NamedTuple):
    """A generated text.

    Attributes:
      stop: texts that end it and are not part of it; the model's end tokens end it, too.
      json_string: the text is the inside of a JSON string: valid escapes, at least one character
        that is not a space; only the closing quotation mark ends it.
    """

    stop: tuple[str, ...] = ()
    json_string: bool = False
    characters: int = ENDLESS

    @property
    def pattern(self) -> str:
        """A regular expression that matches the text up to the end of its first stop."""
        if self.json_string:
            return f'{_FIRST}{_CHARACTER}*"'
        ends = "|".join(re.escape(text) for text in self.stop)
        return f"(?s:.)*?(?:{ends})" if ends else "(?s:.)*"

    def read(self, written: bytes) -> str:
        """Returns the text of what a model wrote by this grammar."""
        text = written.decode()
        if self.json_string:
            return str(json.JSONDecoder().raw_decode('"' + text)[0])
        for end in self.stop:
            text = text.split(end, 1)[0]
        return text


class Vocabulary(NamedTuple):
    """The bytes that each token writes.

    Attributes:
      pieces: by token id; empty for control tokens, which never occur in a text.
      ends: ids of the tokens that end a model's answer.
    """

    pieces: tuple[bytes, ...]
    ends: tuple[int, ...]


class Automaton(NamedTuple):
    """Tables of one or several texts over one vocabulary; see `compile_texts`.

    Attributes:
      starts: the first state of each text.
      token_class: `[tokens]`, the class of each token.
      next_state: `[states, classes]`; negative if a token is not allowed.
      characters: `[states, classes]`, how many characters a token adds.
      characters_to_end, tokens_to_end: `[states]`, the fewest with which the text can end.
    """

    starts: tuple[int, ...]
    token_class: np.ndarray
    next_state: np.ndarray
    characters: np.ndarray
    characters_to_end: np.ndarray
    tokens_to_end: np.ndarray


class _Bytes(NamedTuple):
    """An automaton over bytes: `table` [states, 256], -1 where a byte is not allowed."""

    table: np.ndarray
    start: int
    may_end: np.ndarray  # [states]: the end tokens may end the text here


def compile_texts(texts: Sequence[Text], vocabulary: Vocabulary) -> Automaton:
    """Returns one automaton for several texts, so that one batch can hold all of them.

    The states are `DONE`, then those of the first text, and so on. Raises `ValueError` if the
    vocabulary cannot write one of the texts.
    """
    automata = [_byte_automaton(text) for text in texts]
    table = np.full((1, 256), -1, np.int32)
    may_end, starts = np.zeros(1, bool), []
    for part in automata:
        offset = len(table) - 1  # DONE is shared
        moved = np.where(part.table > DONE, part.table + offset, part.table)
        starts.append(part.start + offset)
        table = np.concatenate([table, moved[1:]])
        may_end = np.concatenate([may_end, part.may_end[1:]])
    following, characters = _follow_tokens(table, vocabulary)
    ending = np.where(may_end, DONE, -1)
    following[:, list(vocabulary.ends)] = ending[:, None]
    characters[:, list(vocabulary.ends)] = 0

    both = np.concatenate([following, characters]).T  # [tokens, 2 * states]
    rows = np.ascontiguousarray(both).view(np.dtype((np.void, both.dtype.itemsize * both.shape[1])))
    _, firsts, classes = np.unique(rows.ravel(), return_index=True, return_inverse=True)
    next_state = following[:, firsts].astype(np.int32)
    characters = characters[:, firsts].astype(np.int32)
    ends = may_end.copy()
    ends[DONE] = True
    tokens_to_end = _distances(next_state, np.ones_like(next_state), ends)
    if max(tokens_to_end[starts]) >= ENDLESS:
        text = texts[int(np.argmax(tokens_to_end[starts]))]
        raise ValueError(f"the model's vocabulary cannot write {text.pattern}")
    return Automaton(
        tuple(starts),
        classes.astype(np.int32),
        next_state,
        characters,
        _distances(next_state, characters, ends),
        tokens_to_end,
    )


def _byte_automaton(text: Text) -> _Bytes:
    import outlines_core

    # The index of a vocabulary of the 256 bytes is the byte automaton.
    every_byte = outlines_core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    index = outlines_core.Index(text.pattern, every_byte)
    transitions = {
        state: {byte: following for byte, following in by_byte.items() if byte < 256}
        for state, by_byte in index.get_transitions().items()
    }
    # A match that nothing can follow ends the text.
    ended = {state for state in index.get_final_states() if not transitions.get(state)}
    going = [state for state in transitions if state not in ended]
    numbers = dict.fromkeys(ended, DONE) | {state: at for at, state in enumerate(going, DONE + 1)}
    table = np.full((len(going) + 1, 256), -1, np.int32)
    for state, by_byte in transitions.items():
        for byte, following in by_byte.items():
            table[numbers[state], byte] = numbers[following]
    # Where a letter may follow, no character is half written.
    may_end = (table[:, ord("a")] >= 0) & (not text.json_string)
    return _Bytes(table, numbers[index.get_initial_state()], may_end)


def _follow_tokens(table: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Returns by state and token the next state and the added characters, up to the text's end."""
    order = sorted(range(len(vocabulary.pieces)), key=lambda i: -len(vocabulary.pieces[i]))
    lengths = np.array([len(vocabulary.pieces[i]) for i in order])
    longest = int(lengths[0])
    spelled = np.zeros((len(order), longest), np.uint8)
    for row, token in enumerate(order):
        piece = vocabulary.pieces[token]
        spelled[row, : len(piece)] = np.frombuffer(piece, np.uint8)
    # DONE and -1 (the last row of the table) lead to themselves.
    stays = np.concatenate([table, np.full((1, 256), -1, np.int32)]).astype(np.int16)
    stays[DONE] = DONE
    at = np.repeat(np.arange(len(table), dtype=np.int16)[:, None], len(order), axis=1)
    added = np.zeros(at.shape, np.int16)
    for position in range(longest):
        some = slice(0, int((lengths > position).sum()))  # the longer tokens come first
        byte = spelled[some, position]
        before = at[:, some]
        after = stays[before, byte[None]]
        begins = (byte & 0xC0 != 0x80)[None] & (before != DONE) & (after != DONE)
        added[:, some] += begins
        at[:, some] = after
    at[:, lengths == 0] = -1
    following, characters = np.empty_like(at), np.empty_like(added)
    following[:, order], characters[:, order] = at, added
    characters[following < 0] = 0
    return following, characters


def _distances(next_state: np.ndarray, cost: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the least cost from each state to one where the text can end, or `ENDLESS`."""
    distance = np.where(ends, 0, ENDLESS).astype(np.int32)
    while True:
        onward = np.where(next_state >= 0, cost + distance[next_state], ENDLESS)
        shorter: np.ndarray = np.minimum(distance, onward.min(axis=1))
        if (shorter == distance).all():
            return shorter
        distance = shorter
