"""`--fit_bias`: the constants of the tone, from labelled chats."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from chatflow.evaluation.measures import Confusion
from chatflow.records import Sentiment


def fit_bias(
    scores: Sequence[tuple[Mapping[str, float], Sentiment]], tones: Mapping[str, Sentiment]
) -> dict[str, float]:
    """Constants for the tone words that give the best macro-F1 on labelled chats.

    The neutral word's is 0. Among equally good ones the middle is taken: it is the
    least touched by small changes of the scores.

    Args:
      scores: log-probability of each tone word, and the label, by chat.
    """
    order = sorted(tones, key=lambda word: tones[word])  # angry, neutral, happy
    steps = [step / 10 for step in range(-50, 51)]
    tried = []
    for angry, happy in itertools.product(steps, steps):
        bias = dict(zip(order, (angry, 0.0, happy), strict=True))
        pairs = [(label, _best(of, bias, tones)) for of, label in scores]
        tried.append((round(Confusion.of(pairs).macro_f1, 6), angry, happy))
    best = max(score for score, _, _ in tried)
    near = [(angry, happy) for score, angry, happy in tried if score >= best - 0.005]
    middle = [sum(values) / len(near) for values in zip(*near, strict=True)]
    angry, happy = min(near, key=lambda at: abs(at[0] - middle[0]) + abs(at[1] - middle[1]))
    return dict(zip(order, (angry, 0.0, happy), strict=True))


def fit_temperature(
    scores: Sequence[tuple[Mapping[str, float], Sentiment]],
    tones: Mapping[str, Sentiment],
    bias: Mapping[str, float],
) -> float:
    """The temperature by which a model is right as often as its confidence says.

    The one under which the labels are likeliest (temperature scaling; Guo et al. 2017,
    https://arxiv.org/abs/1706.04599), of 0.2, 0.3 … 8.
    """
    found = np.array([[of[word] - bias[word] for word in tones] for of, _ in scores])
    right = [list(tones.values()).index(label) for _, label in scores]

    def surprise(temperature: float) -> float:
        divided = found / temperature
        divided -= divided.max(axis=1, keepdims=True)
        likely = divided - np.log(np.exp(divided).sum(axis=1, keepdims=True))
        return -float(likely[np.arange(len(right)), right].mean())

    return min((step / 10 for step in range(2, 81)), key=surprise)


def _best(
    scores: Mapping[str, float], bias: Mapping[str, float], tones: Mapping[str, Sentiment]
) -> Sentiment:
    return tones[max(tones, key=lambda word: scores[word] - bias[word])]
