"""Small trained layers that make choices from a model's states and from plain figures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from chatflow.choices.reading import Layout, States, chat_vector, of_messages, sentence_vectors
from chatflow.choices.sentences import Sentence
from chatflow.errors import UsageError, one_line

ENDS = ".heads.npz"
"""Suffix of files of heads."""

CHAT, MESSAGE, SENTENCE = OVER = ("chat", "message", "sentence")
ONE, ALL = KINDS = ("one", "all")


class Chosen(NamedTuple):
    """What heads chose of one chat: how probable each value of each choice is.

    Attributes:
      chat: of choices over the chat, by choice and value.
      parts: of choices over its messages or sentences: one row each, in the order of `values`.
      sets: the choices of which all values may apply.
    """

    chat: Mapping[str, Mapping[str, float]]
    parts: Mapping[str, tuple[tuple[float, ...], ...]]
    values: Mapping[str, tuple[str, ...]]
    sets: frozenset[str] = frozenset()

    def with_choice(
        self, choice: str, values: tuple[str, ...], probabilities: tuple[float, ...]
    ) -> Chosen:
        """Returns this with one more choice over the chat."""
        chat = {**self.chat, choice: dict(zip(values, probabilities, strict=True))}
        return self._replace(chat=chat, values={**self.values, choice: values})

    def column(self, choice: str, value: str) -> np.ndarray | None:
        """Returns how probable a value is in each part, or None without such a choice."""
        if choice not in self.parts:
            return None
        at = self.values[choice].index(value)
        return np.array([row[at] for row in self.parts[choice]], np.float32)


class Read(NamedTuple):
    """The sentences of a chat that were read, and what was chosen."""

    sentences: tuple[Sentence, ...]
    chosen: Chosen


@dataclasses.dataclass(frozen=True)
class Head:
    """One choice's layers: all but the last end in a ReLU.

    Attributes:
      layers: weights `[in, out]` and biases `[out]`; inputs are as they come.
      temperature: divides the last outputs, so that probabilities are right as often as they say.
    """

    name: str
    over: str
    kind: str
    values: tuple[str, ...]
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    temperature: float = 1.0

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Returns `[rows, values]` of `[rows, features]`."""
        for number, (weights, bias) in enumerate(self.layers):
            x = x @ weights.astype(np.float32, copy=False) + bias
            if number < len(self.layers) - 1:
                x = np.maximum(x, 0)
        x = x / self.temperature
        if self.kind == ALL:
            sigmoid: np.ndarray = np.exp(-np.logaddexp(0, -x))
            return sigmoid
        x = np.exp(x - x.max(axis=1, keepdims=True))
        softmax: np.ndarray = x / x.sum(axis=1, keepdims=True)
        return softmax


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of one model and one reading template.

    Attributes:
      model: the name of the model whose states they were fitted on; "" if they use none.
      weights: a hash of its weights.
      template: a hash of the text around a chat that it read.
      layers: the layers whose states they see, from 1.
    """

    model: str
    weights: str
    template: str
    layers: tuple[int, ...]
    heads: tuple[Head, ...]

    def choose(self, states: States | None, layout: Layout) -> Chosen:
        """Returns what the heads say of a chat that was read."""
        chat: dict[str, dict[str, float]] = {}
        parts: dict[str, tuple[tuple[float, ...], ...]] = {}
        rows = sentence_vectors(states, layout)
        whole = chat_vector(states, layout)[None] if states is not None else None
        for head in self.heads:
            if head.over == CHAT:
                assert whole is not None
                values = _rounded(head.probabilities(whole)[0])
                chat[head.name] = dict(zip(head.values, values, strict=True))
            elif len(rows):
                found = head.probabilities(
                    of_messages(rows, layout) if head.over == MESSAGE else rows
                )
                parts[head.name] = tuple(map(_rounded, found))
            else:
                parts[head.name] = ()
        sets = frozenset(head.name for head in self.heads if head.kind == ALL)
        return Chosen(chat, parts, {head.name: head.values for head in self.heads}, sets)

    def save(self, path: str) -> None:
        arrays: dict[str, Any] = {}
        described = []
        for head in self.heads:
            for number, (weights, bias) in enumerate(head.layers):
                arrays[f"{head.name}/{number}/weights"] = weights.astype(np.float16)
                arrays[f"{head.name}/{number}/bias"] = bias.astype(np.float32)
            described.append(
                {
                    "name": head.name, "over": head.over, "kind": head.kind,
                    "values": head.values, "layers": len(head.layers),
                    "temperature": head.temperature,
                }
            )  # fmt: skip
        about = {
            "format": 1, "model": self.model, "weights": self.weights,
            "template": self.template, "layers": self.layers, "heads": described,
        }  # fmt: skip
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str) -> Heads:
        """Reads a file of heads; raises `UsageError`."""
        try:
            with open(path, "rb") as file:
                data: Any = np.load(io.BytesIO(file.read()), allow_pickle=False)
            about = json.loads(data["about"].tobytes())
            return cls(
                about["model"],
                about["weights"],
                about["template"],
                tuple(about["layers"]),
                tuple(
                    Head(
                        head["name"],
                        head["over"],
                        head["kind"],
                        tuple(head["values"]),
                        tuple(
                            (
                                data[f"{head['name']}/{n}/weights"].astype(np.float32),
                                data[f"{head['name']}/{n}/bias"],
                            )
                            for n in range(head["layers"])
                        ),
                        head["temperature"],
                    )
                    for head in about["heads"]
                ),
            )
        except Exception as error:  # a broken or wrong file may raise any error
            where = os.path.basename(path)
            raise UsageError(
                f"--heads={where}: is not a file of heads: {one_line(error)}"
            ) from None


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
