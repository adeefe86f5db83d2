"""Trains LoRA for the scoring pass: the choice among a template's tone words.

After https://arxiv.org/abs/2106.09685, with Keras's LoRA layers on the query and value projections.
What all prompts of a template share runs once, with the unchanged weights. The adapter works on
what follows, here and in the engine.
"""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from chatflow.errors import UsageError
from chatflow.models.gemma.engine import Engine, Row
from chatflow.models.gemma.shapes import PromptTooLongError, bucket
from chatflow.weights.keras_loading import load_backbone, mark_as_scoring

LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
"""Tokens to which the prompts of a batch are padded."""


class Example(NamedTuple):
    """A row with choices; `label` is the number of the right one, `values` what each stands for."""

    row: Row
    label: int
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How an adapter is trained.

    Attributes:
      rank: of the two matrices that change a kernel.
      learning_rate: at its highest; it rises for a tenth of the steps, then falls as a cosine.
      batch, epochs: examples per step; how many epochs at most.
      patience: training stops after this many checks in a row without a lower validation loss.
      strength: the share of the adapter that is kept at the end: 1 is all, 0 the model without one.
        Less answers better on texts unlike the training texts (https://arxiv.org/abs/2109.01903).
      checks: of the validation loss, per epoch.
      smoothing: the share of a label's weight that all choices get, against overconfidence.
      decay: of the weights, by AdamW.
    """

    rank: int
    learning_rate: float
    batch: int
    epochs: int
    patience: int
    seed: int
    strength: float
    checks: int = 2
    smoothing: float = 0.1
    decay: float = 0.01


class Checked(NamedTuple):
    """A validation check after `step` of `steps`; `answers` are what the chosen choices mean."""

    step: int
    steps: int
    train_loss: float
    loss: float
    answers: list[int]
    improved: bool = False


class Tuner:
    """A Gemma with an adapter in training.

    Args:
      preset: a local folder, or any handle that keras_hub can load.
      adapter: a file that `save` wrote, to begin with, or empty. Another rank raises `UsageError`.
    """

    def __init__(
        self,
        preset: str,
        schedule: Schedule,
        instruct: bool,
        dtype: str = "auto",
        adapter: str = "",
    ):
        self.schedule = schedule
        keras.utils.set_random_seed(schedule.seed)
        self._backbone = load_backbone(preset, dtype)
        self._backbone.enable_lora(schedule.rank)
        tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset)
        self._engine = Engine(self._backbone, tokenizer, instruct)  # the adapter adds nothing yet
        if adapter:
            try:
                self._backbone.load_lora_weights(adapter)
            except (ValueError, OSError, KeyError) as error:
                raise UsageError(
                    f"--adapter={adapter}: does not fit the model or --rank={schedule.rank}; "
                    f"--adapter=none begins without one: {error}"
                ) from None
        forward = self._engine.forward
        variables = forward.model.variables
        self._at = [i for i, v in enumerate(variables) if "lora_kernel" in v.path]
        self._variables = [variables[i] for i in self._at]
        self.trained = [variable.value for variable in self._variables]
        self._step = jax.jit(self._one_step, donate_argnums=(0, 1))
        self._loss = jax.jit(self._losses)

    def train(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example],
        progress: Callable[[int, int, float], None],
        checked: Callable[[Checked], None],
    ) -> Checked:
        """Trains, restores the adapter of the lowest validation loss, and scales it by `strength`.

        Returns the check of the final adapter; raises `UsageError` if a prompt is too long.

        Args:
          progress: called after each step with its number, the most steps, and its loss.
          checked: called after each validation check; the first is before the first step.
        """
        schedule, rng = self.schedule, random.Random(self.schedule.seed)
        blocks = list(self._blocks(examples, rng))
        every = max(1, len(blocks) // schedule.checks)
        steps = len(blocks) * schedule.epochs
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, steps, warmup_target=schedule.learning_rate, warmup_steps=max(1, steps // 10)
        )
        self._optimizer = keras.optimizers.AdamW(rate, weight_decay=schedule.decay, clipnorm=1.0)
        self._optimizer.build(self._variables)
        state = [variable.value for variable in self._optimizer.variables]
        best = self.check(validation)._replace(steps=steps)
        checked(best)
        kept, since, step = self.trained, 0, 0
        running: list[float] = []
        for _ in range(schedule.epochs):
            for block in blocks:
                # A step consumes (donates) its values, so those that are kept are copied.
                own = jax.tree.map(jnp.copy, self.trained) if self.trained is kept else self.trained
                self.trained, state, loss = self._step(own, state, *block)
                step += 1
                running.append(float(loss))
                progress(step, steps, running[-1])
                if step % every and step < steps:
                    continue
                now = self.check(validation)._replace(
                    step=step, steps=steps, train_loss=float(np.mean(running))
                )
                now = now._replace(improved=now.loss < best.loss)
                checked(now)
                running, since = [], since + 1
                if now.improved:
                    best, kept, since = now, self.trained, 0
                if since >= schedule.patience:
                    break
            if since >= schedule.patience:
                break
            blocks = list(self._blocks(examples, rng))
        self.trained = kept
        if schedule.strength == 1:
            return best
        self.trained = [
            value * schedule.strength if "lora_kernel_b" in variable.path else value
            for variable, value in zip(self._variables, kept, strict=True)
        ]
        left = self.check(validation)
        return best._replace(loss=left.loss, answers=left.answers)

    def check(self, examples: Sequence[Example]) -> Checked:
        """Returns loss and answers of examples with the current adapter."""
        found: dict[int, int] = {}
        losses = []
        for block in self._blocks(examples):
            loss, scores = self._loss(self.trained, *block)
            for at, values in zip(block[-1], np.asarray(scores), strict=True):
                if at >= 0:
                    found[int(at)] = examples[at].values[int(np.argmax(values))]
            losses.append((float(loss), int((np.asarray(block[-1]) >= 0).sum())))
        total = sum(count for _, count in losses)
        mean = sum(loss * count for loss, count in losses) / max(total, 1)
        return Checked(0, 0, 0.0, mean, [found[number] for number in range(len(examples))])

    def save(self, path: str) -> None:
        """Writes the adapter in Keras's format, marked as one of the scoring pass.

        The file appears when it is complete, because a running stream may look for new ones.
        """
        for variable, value in zip(self._variables, self.trained, strict=True):
            variable.assign(value)
        folder, name = os.path.split(os.path.abspath(path))
        with tempfile.TemporaryDirectory(prefix=".chatflow-", dir=folder) as scratch:
            written = os.path.join(scratch, name)
            self._backbone.save_lora_weights(written)
            mark_as_scoring(written)
            os.replace(written, path)

    # From examples to arrays.

    def _blocks(
        self, examples: Sequence[Example], rng: random.Random | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Yields batches of one prefix and similar length, in random order if there is an `rng`.

        They are what `_losses` takes after `trained`: tokens `[rows, length]`, first tokens and
        biases of the choices `[rows, choices]`; `numbers` are -1 in padding rows.
        """
        size = self.schedule.batch
        prompts = []
        for number, example in enumerate(examples):
            try:
                prompt = self._engine.prompt(number, example.row)
                bucket(len(prompt.tokens), LENGTHS)
            except PromptTooLongError as error:
                raise UsageError(
                    f"a prompt is too long to train on; give --max_prompt_tokens: {error}"
                ) from None
            prompts.append((prompt, example.label))
        lengths = [len(made[0].tokens) + (rng.gauss(0, 4) if rng else 0) for made in prompts]
        order = sorted(range(len(prompts)), key=lambda at: (prompts[at][0].row.prefix, lengths[at]))
        prompts = [prompts[at] for at in order]
        blocks = []
        begin = 0
        while begin < len(prompts):
            block = prompts[begin : begin + size]
            block = [made for made in block if made[0].row.prefix == block[0][0].row.prefix]
            blocks.append(block)
            begin += len(block)
        if rng:
            rng.shuffle(blocks)
        for block in blocks:
            yield self._arrays(block, size)

    def _arrays(self, block: Sequence[Any], size: int) -> tuple[Any, ...]:
        length = bucket(max(len(prompt.tokens) for prompt, _ in block), LENGTHS)
        count = len(block[0][0].row.choices)
        tokens, lengths = np.zeros((size, length), np.int32), np.ones(size, np.int32)
        labels, numbers = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        first, bias = np.zeros((size, count), np.int32), np.zeros((size, count), np.float32)
        for at, (prompt, label) in enumerate(block):
            tokens[at, : len(prompt.tokens)] = prompt.tokens
            lengths[at], labels[at], numbers[at] = len(prompt.tokens), label, prompt.number
            first[at] = self._engine.first_tokens(prompt.row.choices)
            bias[at] = prompt.row.bias or 0.0
        cache, start = self._engine.prefix(block[0][0].row.prefix)
        weights = self._engine.forward.weights
        return weights, cache, tokens, lengths, start, first, bias, labels, numbers

    # What is compiled.

    def _losses(
        self, trained: Any, weights: Any, cache: Any, tokens: Any, lengths: Any, start: Any,
        first: Any, bias: Any, labels: Any, numbers: Any,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Returns the mean loss of a batch and its scores `[rows, choices]`."""
        forward = self._engine.forward
        weights = list(weights)
        for at, value in zip(self._at, trained, strict=True):
            weights[at] = value
        rows, length = tokens.shape
        filled = forward.cache(cache, rows=rows, total=forward.positions(cache) + length)
        run = jax.vmap(forward.row, in_axes=(None, 0, 0, None))
        hidden, _ = run(weights, tokens, filled, start)  # [rows, length, hidden]
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = forward.logits(weights, last).astype(jnp.float32)  # [rows, vocabulary]
        scores = jnp.take_along_axis(logits, first, axis=1) - bias
        likely = jax.nn.log_softmax(scores)
        smoothing = self.schedule.smoothing
        wanted = jax.nn.one_hot(labels, scores.shape[1]) * (1 - smoothing)
        wanted += smoothing / scores.shape[1]
        losses = -jnp.sum(wanted * likely, axis=1)
        real = numbers >= 0
        return jnp.sum(losses * real) / jnp.maximum(jnp.sum(real), 1), scores

    def _one_step(self, trained: Any, state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        (loss, _), gradients = jax.value_and_grad(self._losses, has_aux=True)(trained, *batch)
        trained, state = self._optimizer.stateless_apply(state, gradients, trained)
        return trained, state, loss
