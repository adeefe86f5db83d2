"""`--fit_bias`: the constants of the tone, from labelled chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chatflow.records import Sentiment

_RIDGE = 1e-3
"""Keeps the constants near none where few labels, or no wrong answer, would let them run away."""


def fit_constants(
    scores: Sequence[tuple[Mapping[str, float], Sentiment]], tones: Mapping[str, Sentiment]
) -> tuple[dict[str, float], float]:
    """The bias of each tone word and the temperature under which the labels are likeliest.

    The neutral word's bias is 0. This is bias-corrected temperature scaling
    (https://arxiv.org/abs/1901.06852), by Newton's method, as the loss is convex. The constants
    with the best macro-F1 vary more from one sample of chats to the next: fitted on one half
    of 270 chats and measured on the other, they gave a lower macro-F1 there.

    Args:
      scores: log-probability of each tone word, and the label, by chat.
    """
    order = sorted(tones, key=lambda word: tones[word])  # angry, neutral, happy
    found = np.array([[of[word] for word in order] for of, _ in scores])  # [chats, 3]
    right = np.eye(3)[[int(label) + 1 for _, label in scores]]
    slopes = np.zeros((len(found), 3, 3))  # of the logits by scale and the outer two biases
    slopes[:, :, 0], slopes[:, 0, 1], slopes[:, 2, 2] = found, -1.0, -1.0
    usual = np.array([1.0, 0.0, 0.0])
    constants = usual
    for _ in range(100):
        logits = slopes @ constants
        likely = np.exp(logits - logits.max(axis=1, keepdims=True))
        likely /= likely.sum(axis=1, keepdims=True)
        gradient = np.einsum("ct,ctp->p", likely - right, slopes) / len(found)
        gradient += _RIDGE * (constants - usual)
        spread = likely[:, :, None] * np.eye(3) - likely[:, :, None] * likely[:, None, :]
        curvature = np.einsum("ctp,ctu,cuq->pq", slopes, spread, slopes) / len(found)
        step = np.linalg.solve(curvature + _RIDGE * np.eye(3), gradient)
        constants = constants - step / max(1.0, float(np.abs(step).max()))
        constants[0] = max(constants[0], 0.1)
    scale, angry, happy = (float(value) for value in constants)
    bias = (round(angry / scale, 2), 0.0, round(happy / scale, 2))
    return dict(zip(order, bias, strict=True)), round(1 / scale, 2)
