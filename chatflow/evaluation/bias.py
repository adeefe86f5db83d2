"""`--fit_bias`: fits the constants of the tone to labelled chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chatflow.errors import UsageError
from chatflow.evaluation.variants import Ran, Variant
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.routes import Routed
from chatflow.records import Sentiment

_RIDGE = 1e-3
"""Keeps the constants near neutral if few labels, or no wrong answer, would let them diverge."""


def fit_constants(
    scores: Sequence[tuple[Mapping[str, float], Sentiment]], tones: Mapping[str, Sentiment]
) -> tuple[dict[str, float], float]:
    """Returns the bias of each tone word, and the temperature.

    Maximises the likelihood of the labels (bias-corrected temperature scaling,
    https://arxiv.org/abs/1901.06852) by Newton's method, because the loss is convex. Then moves
    the angry word's bias until as many chats are called angry as are angry, so that precision and
    recall of angry are equal. The neutral word's bias is 0. Constants with the best macro-F1 vary
    more between samples: on chats that they were not fitted on, macro-F1 was lower.

    Args:
      scores: (log-probability of each tone word, label) per chat.
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
    angry, happy = angry / scale, happy / scale
    lead = np.sort(found[:, 0] - np.maximum(found[:, 1], found[:, 2] - happy))[::-1]
    count = int(right[:, 0].sum())
    if 0 < count < len(lead):
        angry = float(lead[count - 1 : count + 1].mean())
    bias = (round(angry, 2), 0.0, round(happy, 2))
    return dict(zip(order, bias, strict=True)), round(1 / scale, 2)


def prompt_to_fit(variant: Variant) -> AnalysisPrompt:
    """Returns the prompt to fit; raises `UsageError` if there are several or it has no scores."""
    assert variant.planned is not None  # the first is not a baseline
    prompt = variant.planned.first.analysis
    if isinstance(prompt, Routed):
        raise UsageError("--fit_bias: fits one model; leave --models out")
    if "tone" not in prompt.block_names:
        raise UsageError(f"--fit_bias: {variant.model} does not score tone words")
    return prompt


def fitted(ran: Ran) -> dict[str, dict[str, Any]]:
    """Returns `tone_bias` and `tone_temperature`; raises `UsageError` if no chat was answered."""
    prompt = prompt_to_fit(ran.variant)
    scores = [
        (judged.analysis.tone_scores, judged.label.sentiment)
        for judged in ran.judged.values()
        if judged.analysis and judged.analysis.tone_scores
    ]
    if not scores:
        raise UsageError("--fit_bias: no labelled chat has an analysis")
    bias, temperature = fit_constants(scores, prompt.tones)
    name = prompt.result_name
    return {"tone_bias": {name: bias}, "tone_temperature": {name: temperature}}
