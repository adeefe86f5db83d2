"""Fits heads on labelled chats that a model has read: in minutes, on a processor.

What heads see has thousands of columns. They are standardised and reduced to the directions in
which they vary most, once for all choices; what is fitted there is folded back into weights of the
columns. Choices over a chat are logistic regressions, fitted by L-BFGS; choices over sentences have
one hidden layer. Probabilities are calibrated by one temperature each (Guo et al., 2017,
https://arxiv.org/abs/1706.04599), fitted on chats that were left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from chatflow.choices.heads import ALL, ONE, Head

LEFT_OUT = -1
"""The label of a row that has none for a choice."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The rows of one choice.

    Attributes:
      x: `[rows, features]` in float32.
      y: for one of some values, `[rows]` with their places; for all that apply, `[rows, values]`
        of 0 and 1. A place, or a whole row, of `LEFT_OUT` has no label.
      weight: of each row, `[rows]`.
      chat: the chat of each row, `[rows]`.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    chat: np.ndarray

    def of(self, rows: np.ndarray) -> Labelled:
        return Labelled(self.x[rows], self.y[rows], self.weight[rows], self.chat[rows])

    @property
    def known(self) -> np.ndarray:
        known: np.ndarray = self.y != LEFT_OUT if self.y.ndim == 1 else self.y[:, 0] != LEFT_OUT
        return known


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a head is fitted.

    Attributes:
      strength: of the labels against the pull of all weights to zero (`C` of scikit-learn).
      hidden: units of a hidden layer; 0: none.
      balanced: whether rare values count as much as frequent ones.
      passes, seed: of the training of a hidden layer.
    """

    strength: float = 0.0001
    hidden: int = 0
    balanced: bool = True
    passes: int = 24
    seed: int = 1


Layers = tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A linear map from the columns that heads see to few.

    Attributes:
      mean: of each column, `[columns]`.
      directions: `[columns, reduced]`, with the columns' scales in them.
    """

    mean: np.ndarray
    directions: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, most: int, kept: int = 0, even: bool = False) -> Reduction:
        """Finds the directions of most variance of `[rows, columns]`.

        Args:
          most: how many.
          kept: how many of the first columns are added unchanged.
          even: whether all directions get the same spread.
        """
        rng = np.random.default_rng(1)
        some = x[rng.permutation(len(x))[:8_000]]
        mean, scale = some.mean(0), some.std(0)
        inverse = np.where(scale < 1e-4, 0.0, 1 / np.maximum(scale, 1e-4))  # constants say nothing
        columns = x.shape[1]
        found = np.zeros((columns, kept + min(most, columns - kept)), np.float32)
        found[:kept, :kept] = np.diag(inverse[:kept])
        if columns - kept <= most:
            found[kept:, kept:] = np.diag(inverse[kept:])
            return cls(mean.astype(np.float32), found)
        states = ((some[:, kept:] - mean[kept:]) * inverse[kept:]).astype(np.float32)
        # The first directions by a few rounds of subspace iteration; all would take minutes.
        best = rng.normal(size=(columns - kept, most + 16)).astype(np.float32)
        for _ in range(4):
            best = np.linalg.qr(states.T @ (states @ best))[0]
        spread = np.sqrt(np.mean((states @ best) ** 2, axis=0))
        order = np.argsort(-spread)[:most]
        best = best[:, order] / (np.maximum(spread[order], 1e-3) if even else 1.0)
        found[kept:, kept:] = inverse[kept:, None] * best
        return cls(mean.astype(np.float32), found)

    def reduced(self, x: np.ndarray) -> np.ndarray:
        found: np.ndarray = (x - self.mean) @ self.directions
        return found

    def unfolded(self, head: Head) -> Head:
        """Returns a head on reduced columns as one on all columns."""
        (weights, bias), *others = head.layers
        full = self.directions @ weights
        return dataclasses.replace(head, layers=((full, bias - self.mean @ full), *others))


def fit(
    data: Labelled, name: str, over: str, kind: str, values: Sequence[str], recipe: Recipe
) -> Head:
    """Returns a head that is not calibrated yet; raises `ValueError` without any labels."""
    data = data.of(np.flatnonzero(data.known))
    if not len(data.x):
        raise ValueError(f"no label for {name}")
    layers = (_network if recipe.hidden else _logistic)(data.x, data, len(values), kind, recipe)
    return Head(name, over, kind, tuple(values), layers)


def _targets(data: Labelled, count: int, kind: str) -> np.ndarray:
    y = np.eye(count)[data.y] if kind == ONE else data.y
    targets: np.ndarray = y.astype(np.float32)
    return targets


def _weights(data: Labelled, y: np.ndarray, kind: str, recipe: Recipe) -> np.ndarray:
    """Returns the weight of each row, `[rows, 1]`, or of each row and value."""
    weight = data.weight.astype(np.float32)[:, None]
    if not recipe.balanced:
        return weight
    total = (weight * y).sum(0)
    if kind == ONE:
        share = weight.sum() / (len(total) * np.maximum(total, 1e-9))
        balanced: np.ndarray = weight * (y * share).sum(1, keepdims=True)
        return balanced
    rarer = np.sqrt(np.clip((weight.sum() - total) / np.maximum(total, 1e-9), 1, 400))
    return weight * np.where(y > 0.5, rarer, 1.0).astype(np.float32)


def _loss(z: np.ndarray, y: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss, `[rows, 1]` or `[rows, values]`, and its slope by `z`."""
    if kind == ALL:
        p = 1 / (1 + np.exp(-z))
        return np.logaddexp(0, z) - y * z, p - y
    top = z.max(1, keepdims=True)
    e = np.exp(z - top)
    total = e.sum(1, keepdims=True)
    return (top + np.log(total)) - (y * z).sum(1, keepdims=True), e / total - y


def _logistic(x: np.ndarray, data: Labelled, count: int, kind: str, recipe: Recipe) -> Layers:
    y = _targets(data, count, kind)
    weight = recipe.strength * _weights(data, y, kind, recipe)
    features = x.shape[1]

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat[: features * count].reshape(features, count).astype(np.float32)
        b = flat[features * count :].astype(np.float32)
        loss, slope = _loss(x @ w + b, y, kind)
        slope = slope * weight
        return (
            float((loss * weight).sum() + 0.5 * (w * w).sum()),
            np.concatenate([(x.T @ slope + w).ravel(), slope.sum(0)]).astype(np.float64),
        )

    found = minimize(
        cost, np.zeros(features * count + count), jac=True, method="L-BFGS-B",
        options={"maxiter": 300 if kind == ONE else 100},
    ).x  # fmt: skip
    return ((found[: features * count].reshape(features, count), found[features * count :]),)


def _network(x: np.ndarray, data: Labelled, count: int, kind: str, recipe: Recipe) -> Layers:
    """Returns two layers, trained by Adam with weight decay and dropout of inputs."""
    rng = np.random.default_rng(recipe.seed)
    y = _targets(data, count, kind)
    weight = _weights(data, y, kind, recipe)
    weight = weight / weight.mean()
    shapes = [(x.shape[1], recipe.hidden), (recipe.hidden,), (recipe.hidden, count), (count,)]
    values = [
        rng.normal(0, np.sqrt(1 / shape[0]), shape).astype(np.float32)
        if len(shape) == 2
        else np.zeros(shape, np.float32)
        for shape in shapes
    ]
    first = [np.zeros(shape, np.float32) for shape in shapes]
    second = [np.zeros(shape, np.float32) for shape in shapes]
    size, keep, step = 256, 0.7, 0
    steps = recipe.passes * -(-len(x) // size)
    for _ in range(recipe.passes):
        order = rng.permutation(len(x))
        for start in range(0, len(x), size):
            rows = order[start : start + size]
            seen = x[rows] * (rng.random((len(rows), x.shape[1])) < keep) / np.float32(keep)
            seen = np.clip(seen, -6, 6).astype(np.float32)
            inner = np.maximum(seen @ values[0] + values[1], 0)
            slope = (
                _loss(inner @ values[2] + values[3], y[rows], kind)[1] * weight[rows] / len(rows)
            )
            back = (slope @ values[2].T) * (inner > 0)
            slopes = [seen.T @ back, back.sum(0), inner.T @ slope, slope.sum(0)]
            step += 1
            rate = 3e-3 * min(1.0, step / 50) * (1 - step / (steps + 1))
            for at, gradient in enumerate(slopes):
                first[at] = 0.9 * first[at] + 0.1 * gradient
                second[at] = 0.99 * second[at] + 0.01 * gradient**2
                move = (first[at] / (1 - 0.9**step)) / (
                    np.sqrt(second[at] / (1 - 0.99**step)) + 1e-8
                )
                decay = 0.02 if len(shapes[at]) == 2 else 0.0
                values[at] = values[at] - rate * (move + decay * values[at])
    return ((values[0], values[1]), (values[2], values[3]))


def divided(chats: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Returns which part each row is in; all rows of a chat are in the same."""
    known = np.unique(chats)
    part = dict(
        zip(known, np.random.default_rng(seed).permutation(len(known)) % parts, strict=True)
    )
    return np.array([part[chat] for chat in chats])


def left_out(data: Labelled, make: Callable[[Labelled], Head], parts: int, seed: int) -> np.ndarray:
    """Returns, for each row, the probabilities by a head that has not seen its chat."""
    part = divided(data.chat, parts, seed)
    found: np.ndarray | None = None
    for number in range(parts):
        head = make(data.of(np.flatnonzero(part != number)))
        rows = np.flatnonzero(part == number)
        values = head.probabilities(data.x[rows])
        if found is None:
            found = np.zeros((len(data.x), values.shape[1]))
        found[rows] = values
    assert found is not None
    return found


def temperature(probabilities: np.ndarray, y: np.ndarray, kind: str) -> tuple[float, float]:
    """Returns the temperature at which a head is right as often as it says, and the loss."""
    p = np.clip(probabilities, 1e-6, 1 - 1e-6)
    z = np.log(p) if kind == ONE else np.log(p / (1 - p))
    target = np.eye(p.shape[1])[y] if kind == ONE else y

    def loss(t: float) -> float:
        return float(_loss(z / np.exp(t), target, kind)[0].mean())

    found = minimize_scalar(loss, bounds=(-2, 2), method="bounded")
    return float(np.exp(found.x)), float(found.fun)
