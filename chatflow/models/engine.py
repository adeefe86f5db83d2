"""Scoring and greedy decoding for keras_hub's Gemma models on JAX.

`keras_hub`'s own `generate` compiles for every shape, feeds long prompts token by
token and runs the whole prompt each time. Here a prompt is a shared prefix, whose
KV cache is computed once, and a suffix; suffixes are padded to a few lengths
(buckets), and every row of a batch decodes at its own position.

The two compiled functions are `prefill` and `decode`. Rows are independent calls of
keras_hub's `call_with_cache` under `jax.vmap`, so that the attention, the sliding
windows and the soft caps of Gemma 1, 2 and 3 are keras_hub's, not copies of them.
What stands behind a row's end in the cache is never attended to: the causal mask
hides it, and decoding overwrites it.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from chatflow.errors import ModelError

SUFFIX_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens
BATCH_BUCKETS = (1, 4, 16)  # rows
BATCH_TOKENS = 8192  # rows times suffix; bounds the memory of attention scores
PREFIXES_KEPT = 8


class PromptTooLongError(ModelError):
    """A prompt is longer than the longest bucket."""


class Score(NamedTuple):
    """Log-probability of each choice as the next text, in nats."""

    scores: tuple[float, ...]
    prompt_tokens: int
    answer_tokens: int = 0


class Continuation(NamedTuple):
    """A greedy continuation; `cut` where it reached the limit before it ended."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    cut: bool


class Engine:
    """A Gemma model with its tokenizer, ready to score and to decode.

    Args:
      preset: a local folder, or any handle that keras_hub can load.
      dtype: `float32` or `bfloat16`.
      instruct: wrap each prompt in Gemma's chat template, as one turn of the user. The
        turn tokens are put in by id, so that no text can stand for them.

    Raises:
      ValueError: the preset is not a Gemma 1, 2 or 3 text model.
    """

    def __init__(self, preset: str, dtype: str = "float32", instruct: bool = False):
        backbone = keras_hub.models.Backbone.from_preset(preset, dtype=dtype)
        if isinstance(backbone, keras_hub.models.Gemma3Backbone):
            causal_lm, self._position_axis = keras_hub.models.Gemma3CausalLM, 1
        elif isinstance(backbone, keras_hub.models.GemmaBackbone):
            causal_lm, self._position_axis = keras_hub.models.GemmaCausalLM, 3
        else:
            raise ValueError(f"{preset!r} is a {type(backbone).__name__}, not a Gemma model")
        self.model = causal_lm(backbone=backbone, preprocessor=None)
        self.tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset)
        self.weights = [variable.value for variable in self.model.variables]
        self._prefixes: collections.OrderedDict[str, tuple[Any, int]] = collections.OrderedDict()
        self._before, self._after = [self.tokenizer.start_token_id], []
        if instruct:
            start, end = map(self.tokenizer.token_to_id, ("<start_of_turn>", "<end_of_turn>"))
            self._before += [start, *self.encode("user\n")]
            self._after = [end, *self.encode("\n"), start, *self.encode("model\n")]

    # Text and tokens.

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a start token."""
        return [int(i) for i in self.tokenizer(text)] if text else []

    def decode_text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.detokenize(list(ids))) if len(ids) else ""

    @functools.lru_cache(maxsize=16)  # noqa: B019 (an engine lives as long as its process)
    def stop_mask(self, stop: tuple[str, ...]) -> jax.Array:
        """True for each token that ends an answer: the end tokens, and those with a stop text."""
        stops = [text.replace(" ", "▁") for text in stop]
        mask = np.array(
            [any(text in piece for text in stops) for piece in self.tokenizer.get_vocabulary()]
        )
        mask[self.tokenizer.end_token_id] = True
        end_of_turn = self.tokenizer.token_to_id("<end_of_turn>")
        if end_of_turn != self.tokenizer.token_to_id("<unk>"):
            mask[end_of_turn] = True
        return jnp.asarray(mask)  # [vocabulary]

    # What a caller asks.

    def score(self, prefix: str, suffixes: Sequence[str], choices: Sequence[str]) -> list[Score]:
        """Scores each choice as the next text: one forward pass, no decoding.

        Args:
          prefix: the text that all prompts begin with.
          suffixes: the rest of each prompt.
          choices: told apart by their first token.

        Raises:
          ValueError: two choices begin with the same token.
          PromptTooLongError: a prompt does not fit.
        """
        first = [self.encode(choice)[0] for choice in choices]
        if len(set(first)) < len(first):
            raise ValueError(f"the choices {list(choices)} do not differ in their first token")
        answers: dict[int, Score] = {}
        for rows, logits, _, lengths in self._prefill(prefix, suffixes, 0):
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))  # [batch, vocabulary]
            chosen = np.asarray(log_probs[:, jnp.asarray(first)])  # [batch, choices]
            for row, scores, length in zip(rows, chosen, lengths, strict=False):
                answers[row] = Score(tuple(map(float, scores)), int(length))
        return [answers[row] for row in range(len(suffixes))]

    def generate(
        self, prefix: str, suffixes: Sequence[str], max_tokens: int, stop: Sequence[str] = ()
    ) -> list[Continuation]:
        """Continues each prompt greedily, up to an end token or before a stop text.

        Raises:
          PromptTooLongError: a prompt does not fit.
        """
        answers: dict[int, Continuation] = {}
        mask = self.stop_mask(tuple(stop))
        for rows, logits, cache, lengths in self._prefill(prefix, suffixes, max_tokens):
            tokens, counts, done, _ = self._decode(
                self.weights, cache, logits, lengths, mask, max_tokens=max_tokens
            )
            batch = zip(rows, *map(np.asarray, (tokens, counts, done, lengths)), strict=False)
            for row, ids, count, ended, length in batch:
                whole = self.decode_text(ids[:count].tolist())
                text = whole
                for end in stop:
                    text = text.split(end, 1)[0]
                cut = not ended and text == whole
                answers[row] = Continuation(text, int(length), int(count), cut)
        return [answers[row] for row in range(len(suffixes))]

    # Batches, buckets and the shared prefix.

    def _prefix(self, prefix: str) -> tuple[Any, int]:
        """KV cache of a prefix, `[1, prefix]` at its position axis, and its tokens."""
        if prefix not in self._prefixes:
            ids = [*self._before, *self.encode(prefix)]
            length = _bucket(len(ids), SUFFIX_BUCKETS)
            padded = jnp.asarray([ids + [0] * (length - len(ids))])
            _, cache = self._prefill_rows(
                self.weights, None, padded, jnp.asarray([len(ids)]), start=0, total=length
            )
            cut = functools.partial(
                jax.lax.slice_in_dim, start_index=0, limit_index=len(ids), axis=self._position_axis
            )
            self._prefixes[prefix] = jax.tree.map(cut, cache), len(ids)
            while len(self._prefixes) > PREFIXES_KEPT:
                self._prefixes.popitem(last=False)
        return self._prefixes[prefix]

    def _prefill(
        self, prefix: str, suffixes: Sequence[str], room: int
    ) -> Iterator[tuple[list[int], jax.Array, Any, jax.Array]]:
        """Runs suffixes in buckets; yields (row numbers, logits, cache, lengths).

        The arrays may have more rows than there are row numbers.
        """
        cache, start = self._prefix(prefix)
        encoded = [[*self.encode(suffix), *self._after] for suffix in suffixes]
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
        while order:
            width = _bucket(len(encoded[order[0]]), SUFFIX_BUCKETS)
            fit = max(rows for rows in BATCH_BUCKETS if rows == 1 or rows * width <= BATCH_TOKENS)
            rows, order = order[:fit], order[fit:]
            height = _bucket(len(rows), BATCH_BUCKETS)
            tokens = np.zeros((height, width), np.int32)
            lengths = np.ones(height, np.int32)
            for at, row in enumerate(rows):
                tokens[at, : len(encoded[row])] = encoded[row]
                lengths[at] = len(encoded[row])
            logits, filled = self._prefill_rows(
                self.weights, cache, tokens, lengths, start=start, total=start + width + room
            )
            yield rows, logits, filled, jnp.asarray(lengths) + start

    # The compiled functions.

    def _empty_cache(self, rows: int, total: int) -> Any:
        backbone = self.model.backbone
        heads, dim = backbone.num_key_value_heads, backbone.head_dim
        if self._position_axis == 1:
            layer = jnp.zeros((rows, total, heads, dim), backbone.compute_dtype)
            return tuple((layer, layer) for _ in range(backbone.num_layers))
        shape = (rows, backbone.num_layers, 2, total, heads, dim)
        return jnp.zeros(shape, backbone.compute_dtype)

    def _row(self, weights: Any, tokens: jax.Array, cache: Any, start: Any) -> tuple[Any, Any]:
        """One row: tokens [n] at position `start` of its cache -> hidden [n, hidden], cache."""
        with keras.StatelessScope(state_mapping=zip(self.model.variables, weights, strict=True)):
            one = jax.tree.map(lambda x: x[None], cache)
            _, hidden, filled = self.model.call_with_cache(tokens[None], one, start)
        return hidden[0], jax.tree.map(lambda x: x[0], filled)

    def _logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        """hidden [batch, hidden] -> logits [batch, vocabulary]"""
        with keras.StatelessScope(state_mapping=zip(self.model.variables, weights, strict=True)):
            logits: jax.Array = self.model.backbone.token_embedding(hidden, reverse=True)
            return logits

    @functools.partial(jax.jit, static_argnames=("self", "start", "total"))
    def _prefill_rows(
        self, weights: Any, prefix: Any, tokens: Any, lengths: Any, *, start: int, total: int
    ) -> tuple[jax.Array, Any]:
        """tokens [batch, width], lengths [batch] -> logits of each last token, cache."""
        cache = self._empty_cache(tokens.shape[0], total)
        if prefix is not None:
            cache = jax.tree.map(
                lambda empty, known: jax.lax.dynamic_update_slice(
                    empty,
                    jnp.broadcast_to(known, (empty.shape[0], *known.shape[1:])),
                    (0,) * empty.ndim,
                ),
                cache,
                prefix,
            )
        run = jax.vmap(self._row, in_axes=(None, 0, 0, None))
        hidden, cache = run(weights, tokens, cache, start)  # hidden [batch, width, hidden]
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(weights, last), cache

    @functools.partial(jax.jit, static_argnames=("self", "max_tokens"), donate_argnames="cache")
    def _decode(
        self,
        weights: Any,
        cache: Any,
        logits: jax.Array,
        lengths: jax.Array,
        stop_mask: jax.Array,
        *,
        max_tokens: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Greedy decoding on the device until every row has stopped.

        Returns tokens [batch, max_tokens], how many of them are the answer [batch], and
        whether the answer ended by itself [batch].
        """
        batch = logits.shape[0]
        run = jax.vmap(self._row, in_axes=(None, 0, 0, 0))

        def unfinished(state: Any) -> Any:
            step, _, _, _, done, _ = state
            return (step < max_tokens) & ~jnp.all(done)

        def one_step(state: Any) -> Any:
            step, cache, logits, answer, done, counts = state
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # [batch]
            stops = stop_mask[token]
            answer = answer.at[:, step].set(token)
            # A stop token may hold text before its end (".\n"), so it is kept and cut as text.
            counts = counts + ~done
            done = done | stops
            hidden, cache = run(weights, token[:, None], cache, lengths + step)
            return step + 1, cache, self._logits(weights, hidden[:, 0]), answer, done, counts

        answer = jnp.zeros((batch, max_tokens), jnp.int32)
        done, counts = jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32)
        state = (jnp.int32(0), cache, logits, answer, done, counts)
        _, cache, _, answer, done, counts = jax.lax.while_loop(unfinished, one_step, state)
        return answer, counts, done, cache  # the cache, so that its memory can be donated


def _bucket(size: int, buckets: Sequence[int]) -> int:
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise PromptTooLongError(
        "prompt_too_long", f"the prompt has {size:,} tokens; at most {buckets[-1]:,} are taken"
    )
