"""Labelled chats for `chatflow tune`: reads them, has a model read them, and fits heads.

A label is a field of `labels` by the name of its choice:

    {"chat_id": "7", "messages": […], "labels": {
      "tone": "angry", "grievances": ["late_delivery"],
      "part": [{"message": 0, "text": "Where is my parcel?", "value": "matter"}]}}

Over a chat it is a value, or a list of all that apply; over messages or sentences, a list of exact
pieces of messages, counted from 0, with their values. Everything else has the value `none` or
`no`. `sentiment` (-1, 0, 1) is a label of the tone. `weight` (1) is how much a chat counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatflow.choices.declared import HEAD, Choice
from chatflow.choices.fitting import (
    LEFT_OUT,
    Labelled,
    Recipe,
    Reduction,
    fit,
    left_out,
    temperature,
)
from chatflow.choices.heads import ALL, CHAT, ONE, SENTENCE, Head, Heads
from chatflow.choices.reading import Layout, States, chat_vector, of_messages, sentence_vectors
from chatflow.choices.sentences import FEATURES, Sentence
from chatflow.errors import BadInputError, ElementError, UsageError
from chatflow.models.requests import Part
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.records import Chat, Sentiment, load_object
from chatflow.sources.chats import read_chat
from chatflow.sources.lines import numbered

LAYERS = (9, 12)
"""The layers of Gemma 3 270M that heads look at; more helped little, see tuning/README.md."""

NOTHING = ("none", "no")


@dataclasses.dataclass(frozen=True)
class Example:
    """A labelled chat as it is read, and what it is labelled."""

    chat: Chat
    labels: Mapping[str, Any]
    weight: float
    part: Part
    sentences: tuple[Sentence, ...]
    where: str


def read_examples(
    paths: Sequence[str], prompt: AnalysisPrompt, choices: Sequence[Choice]
) -> list[Example]:
    """Returns the labelled chats of files; raises `UsageError` with file and line."""
    found = []
    tones = {tone: word for word, tone in prompt.tones.items()}
    for path in paths:
        for number, line in numbered(path, "LABELLED"):
            where = f"{path}:{number}"
            try:
                value = load_object(line)
                chat = read_chat(value)
                part, sentences = prompt.reading(chat, chat.users()[0])
                labels = value.get("labels", {})
                if not isinstance(labels, dict):
                    raise ValueError("labels must be an object")
                if "sentiment" in value and "tone" not in labels:
                    labels = {**labels, "tone": tones[Sentiment(value["sentiment"])]}
                weight = float(value.get("weight", 1))
                example = Example(chat, labels, weight, part, sentences, where)
                for choice in choices:
                    if choice.name in labels:
                        _ = targets(example, choice)
            except (BadInputError, ValueError, TypeError, IndexError, KeyError) as error:
                raise UsageError(f"{where}: {error}") from None
            if labels and sentences:
                found.append(example)
    if not found:
        raise UsageError(
            f"{', '.join(paths)} has no chat with a label; see docs/how-to/tune-and-evaluate.md"
        )
    return found


def targets(example: Example, choice: Choice) -> np.ndarray:
    """Returns the label of a chat, or of each of its parts, as `fitting.Labelled.y` has it.

    Raises `ValueError` for a label that is not one of the choice's values, or not in the chat.
    """
    values = list(choice.values)
    given = example.labels.get(choice.name)

    def place(value: object) -> int:
        if value not in values:
            raise ValueError(f"labels.{choice.name}: {value!r} is not one of {', '.join(values)}")
        return values.index(str(value))

    if choice.over == CHAT and choice.kind == ONE:
        if isinstance(given, bool):
            given = "yes" if given else "no"
        return np.array([LEFT_OUT if given is None else place(given)])
    if choice.over == CHAT:
        row = np.full((1, len(values)), LEFT_OUT if given is None else 0)
        for value in given or ():
            row[0, place(value)] = 1
        return row
    count = len(example.sentences)
    if choice.over != SENTENCE:
        count = len({sentence.message for sentence in example.sentences})
    if choice.kind == ONE:
        nothing = next((values.index(value) for value in NOTHING if value in values), LEFT_OUT)
        rows = np.full(count, nothing if given is not None else LEFT_OUT)
    else:
        rows = np.full((count, len(values)), 0 if given is not None else LEFT_OUT)
    for piece in given or ():
        at = _places(example, piece, choice)
        if choice.kind == ONE:
            rows[at] = place(piece.get("value", "yes"))
        else:
            rows[at, place(piece.get("value", "yes"))] = 1
    return rows


def _places(example: Example, piece: Mapping[str, Any], choice: Choice) -> list[int]:
    """Returns which sentences, or which message, a labelled piece is."""
    message, text = piece["message"], piece["text"]
    start = example.chat.messages[message].text.find(text)
    if start < 0:
        return []  # what the author did not write, a signature
    end = start + len(text)
    inside = [
        at
        for at, s in enumerate(example.sentences)
        if s.message == message and 2 * (min(end, s.end) - max(start, s.start)) > s.end - s.start
    ]
    if choice.over == SENTENCE:
        return inside
    order = list(dict.fromkeys(sentence.message for sentence in example.sentences))
    return [order.index(message)] if message in order else []


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the heads see of a chat: `[features]`, and `[sentences, features]`."""

    whole: np.ndarray
    sentences: np.ndarray


Progress = Callable[[int, int], None]


def seen(
    examples: Sequence[Example],
    engine: Any,
    layers: tuple[int, ...],
    cache: Path,
    progress: Progress = lambda done, of: None,
) -> list[Seen]:
    """Returns what heads see of each chat; keeps the states in a folder, to read only once.

    Without an engine, heads see only plain figures of the sentences.

    Raises `UsageError` if a chat is too long.
    """
    if engine is None:
        return [_plainly(example.part.layout) for example in examples]
    from chatflow.models.gemma.engine import Reading

    cache.mkdir(parents=True, exist_ok=True)
    keys = [_key(example, engine.forward.fingerprint, layers) for example in examples]
    missing = [at for at, key in enumerate(keys) if not (cache / key).exists()]
    missing.sort(key=lambda at: len(examples[at].part.prompt))
    done = len(examples) - len(missing)
    for start in range(0, len(missing), 16):
        some = missing[start : start + 16]
        parts = [examples[at].part for at in some]
        readings = [
            Reading(p.prompt[: p.shared], p.prompt[p.shared :], p.layout.ends if p.layout else ())
            for p in parts
        ]
        for at, part, states in zip(some, parts, engine.read(readings, layers), strict=True):
            if isinstance(states, ElementError):
                raise UsageError(f"{examples[at].where}: {states}")
            _keep(cache / keys[at], states, part.layout)
        done += len(some)
        progress(done, len(examples))
    return [_kept(cache / key) for key in keys]


def _plainly(layout: Layout | None) -> Seen:
    assert layout is not None
    return Seen(np.zeros(0, np.float32), sentence_vectors(None, layout))


def _key(example: Example, fingerprint: str, layers: tuple[int, ...]) -> str:
    about = repr((example.part.prompt, example.part.layout, fingerprint, layers))
    return hashlib.sha256(about.encode()).hexdigest()[:32] + ".npz"


def _keep(path: Path, states: States, layout: Layout | None) -> None:
    assert layout is not None
    whole = chat_vector(states, layout).astype(np.float16)
    rows = sentence_vectors(states, layout).astype(np.float16)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with open(unfinished, "wb") as file:
        np.savez(file, whole=whole, sentences=rows)
    unfinished.replace(path)


def _kept(path: Path) -> Seen:
    with np.load(path) as data:
        return Seen(data["whole"].astype(np.float32), data["sentences"].astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Reduced:
    """What heads see of all chats, reduced; see `choices.fitting.Reduction`."""

    vectors: tuple[Seen, ...]
    whole: Reduction | None
    sentences: Reduction

    @classmethod
    def of(cls, vectors: Sequence[Seen]) -> Reduced:
        rows = np.vstack([vector.sentences for vector in vectors])
        of_rows = Reduction.of(rows, DIRECTIONS, kept=FEATURES, even=True)
        whole = None
        wholes = [vector.whole for vector in vectors]
        if len(wholes[0]):
            whole = Reduction.of(np.stack(wholes), CHAT_DIRECTIONS)
            wholes = list(whole.reduced(np.stack(wholes)))
        reduced = [of_rows.reduced(vector.sentences) for vector in vectors]
        return cls(tuple(map(Seen, wholes, reduced)), whole, of_rows)

    def unfolded(self, head: Head) -> Head:
        """Returns a head fitted on reduced columns as one on all columns."""
        reduction = self.whole if head.over == CHAT else self.sentences
        assert reduction is not None
        return reduction.unfolded(head)


CHAT_DIRECTIONS, DIRECTIONS = 768, 64
"""How many directions the columns of chats, and of sentences, are reduced to."""


def rows_of(examples: Sequence[Example], vectors: Sequence[Seen], choice: Choice) -> Labelled:
    """Returns the rows of a choice, of all chats that are labelled for it."""
    x, y, weight, chats = [], [], [], []
    for number, (example, vector) in enumerate(zip(examples, vectors, strict=True)):
        if choice.name not in example.labels:
            continue
        target = targets(example, choice)
        if choice.over == CHAT:
            rows = vector.whole[None]
        elif choice.over == SENTENCE:
            rows = vector.sentences
        else:
            layout = example.part.layout
            assert layout is not None
            rows = of_messages(vector.sentences, layout)
        x.append(rows)
        y.append(target)
        weight.append(np.full(len(rows), example.weight))
        chats.append(np.full(len(rows), number))
    if not x:
        raise UsageError(f"no chat has a label for {choice.name}")
    return Labelled(np.vstack(x), np.concatenate(y), np.concatenate(weight), np.concatenate(chats))


def recipes_of(choice: Choice) -> list[Recipe]:
    """Returns how the head of a choice may be fitted; what was tried is in tuning/README.md."""
    if choice.over == CHAT:
        return [Recipe(strength=c, balanced=choice.even) for c in (0.0001, 0.0003, 0.001, 0.003)]
    return [Recipe(hidden=48, balanced=False)]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A head, and how it did on chats that were left out while it was fitted.

    `left_out` has its calibrated probabilities; `data` has their rows, reduced.
    """

    head: Head
    data: Labelled
    left_out: np.ndarray
    recipe: Recipe


def fitted(
    examples: Sequence[Example], reduced: Reduced, choice: Choice, folds: int, seed: int
) -> Fitted:
    """Returns the calibrated head of a choice, by the recipe that is best on chats left out.

    Raises `UsageError` if too little is labelled.
    """
    data = rows_of(examples, reduced.vectors, choice)
    data = data.of(np.flatnonzero(data.known))
    if len(np.unique(data.chat)) < 2 * folds:
        raise UsageError(
            f"{choice.name}: {len(np.unique(data.chat))} chats are labelled; label more"
        )
    if choice.kind == ONE and choice.over == CHAT:
        there = {int(place) for place in data.y}
        missing = [value for at, value in enumerate(choice.values) if at not in there]
        if missing:
            raise UsageError(f"{choice.name}: no chat is labelled {missing[0]!r}")
    best: tuple[float, float, np.ndarray, Recipe] | None = None
    for recipe in recipes_of(choice):
        probabilities = left_out(data, _maker(choice, recipe), folds, seed)
        t, loss = temperature(probabilities, data.y, choice.kind)
        if best is None or loss < best[0]:
            best = loss, t, probabilities, recipe
    assert best is not None
    _, t, probabilities, recipe = best
    head = dataclasses.replace(_maker(choice, recipe)(data), temperature=t)
    calibrated = _tempered(probabilities, t, choice.kind)
    return Fitted(reduced.unfolded(head), data, calibrated, recipe)


def _maker(choice: Choice, recipe: Recipe) -> Callable[[Labelled], Head]:
    return lambda data: fit(
        data, choice.name, choice.over, choice.kind, tuple(choice.values), recipe
    )


def _tempered(p: np.ndarray, t: float, kind: str) -> np.ndarray:
    p = np.clip(p, 1e-7, 1 - 1e-7)
    if kind == ALL:
        z = np.log(p / (1 - p)) / t
        both: np.ndarray = 1 / (1 + np.exp(-z))
        return both
    z = np.exp(np.log(p) / t)
    one: np.ndarray = z / z.sum(1, keepdims=True)
    return one


def by_head(choices: Sequence[Choice]) -> list[Choice]:
    return [choice for choice in choices if choice.by == HEAD]


def heads_of(
    fits: Sequence[Fitted], others: Heads | None, model: str, weights: str, template: str,
    layers: tuple[int, ...],
) -> Heads:  # fmt: skip
    """Returns the fitted heads, with those of other heads for the rest."""
    made = {one.head.name: one.head for one in fits}
    kept = [head for head in others.heads if head.name not in made] if others else []
    return Heads(model, weights, template, layers, (*made.values(), *kept))
