"""Prefill and decode of keras_hub's decoders on the device, compiled by JAX.

Rows are independent calls of keras_hub's `call_with_cache` under `jax.vmap`, each at its own
position, so that attention, sliding windows and soft caps of each family are keras_hub's. The
causal mask hides what stands after a row's end in its cache, and later tokens overwrite it.

Arrays have few shapes, so that little is compiled: `rows` and `total` (the positions of a cache)
are buckets, and loops on the device feed and decode any number of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np
from keras_hub.src.vllm.context import vllm_context_scope

from chatflow import metrics
from chatflow.models.gemma.grammar import DONE, ENDLESS, Automaton
from chatflow.weights.families import family_of

_LOWEST = -1e30
"""Below every score, and finite, so that differences are."""

Cache = Any
"""Keys and values: a tree of arrays `[rows, …]`; see `Family.position_axis`."""


_TURNED = ("query/kernel", "attention_output/kernel")
"""Kernels that XLA multiplies with their first two axes swapped. They are kept swapped, because
swapping them at each step takes a fifth of a step of one row on a CPU."""


class Rules(NamedTuple):
    """An `Automaton` on the device, padded so that it has few shapes."""

    token_class: jax.Array  # [vocabulary]
    next_state: jax.Array  # [states, classes]
    characters: jax.Array  # [states, classes]
    characters_to_end: jax.Array  # [states]
    tokens_to_end: jax.Array  # [states]


class Writing(NamedTuple):
    """The state of each row while it decodes; every array is `[rows]`.

    Attributes:
      token, position: the token chosen last, not fed yet, and the position at which to feed it.
      state: of the automaton; `DONE` if the text has ended.
      characters, tokens: how many more are allowed.
    """

    token: jax.Array
    position: jax.Array
    state: jax.Array
    characters: jax.Array
    tokens: jax.Array

    @property
    def active(self) -> jax.Array:
        return (self.state != DONE) & (self.tokens > 0)


class Stream(NamedTuple):
    """Texts that are read one after the other; every array is `[tokens]`.

    Attributes:
      token: ids.
      text: the number of a token's text; texts stand in order; negative: padding, at the end.
      position: of a token, counted from the start of the prefix of its text.
      suffix: 0 for the text itself, then the number of a question that follows it and does not
        see the other questions.
      first: the piece in which a token's text begins.
    """

    token: Any
    text: Any
    position: Any
    suffix: Any
    first: Any


class Known(NamedTuple):
    """A prefix: keys and values `[positions, heads, head_dim]` of each layer, and its length."""

    caches: Any
    length: Any


class Sums(NamedTuple):
    """The sums of a softmax over the keys seen so far.

    Attributes:
      highest: score, `[kv_heads, queries, group]`.
      total: of the exponentials of all scores less the highest.
      weighted: values by the same exponentials, `[…, head_dim]`.
    """

    highest: jax.Array
    total: jax.Array
    weighted: jax.Array


class Attention(NamedTuple):
    """Attention to keys that come piece by piece: Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018 (arXiv:1805.02867).

    Attributes:
      query: scaled, `[queries, kv_heads, group, head_dim]`.
      soft_cap: of the scores, or None.
    """

    query: jax.Array
    soft_cap: float | None

    def nothing(self) -> Sums:
        queries, kv_heads, group, head = self.query.shape
        shape = (kv_heads, queries, group)
        return Sums(
            jnp.full(shape, _LOWEST, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, head), jnp.float32),
        )

    def add(self, sums: Sums, keys: jax.Array, values: jax.Array, visible: jax.Array) -> Sums:
        """Adds keys and values `[keys, kv_heads, head_dim]`; `visible` is `[queries, keys]`."""
        scores = jnp.einsum("qkgd,skd->kqgs", self.query, keys).astype(jnp.float32)
        if self.soft_cap:
            scores = jnp.tanh(scores / self.soft_cap) * self.soft_cap
        seen = visible[None, :, None, :]
        highest = jnp.maximum(sums.highest, jnp.where(seen, scores, _LOWEST).max(axis=-1))
        scores = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0)
        less = jnp.exp(sums.highest - highest)
        more = jnp.einsum("kqgs,skd->kqgd", scores.astype(values.dtype), values)
        return Sums(
            highest,
            sums.total * less + scores.sum(axis=-1),
            sums.weighted * less[..., None] + more.astype(jnp.float32),
        )

    def result(self, sums: Sums) -> jax.Array:
        """Returns the mean of the values, `[queries, heads * head_dim]`; 0 where none was seen."""
        mean = sums.weighted / jnp.maximum(sums.total, 1e-30)[..., None]
        return jnp.swapaxes(mean, 0, 1).reshape(len(self.query), -1)


def _attend(
    attention: Attention,
    own: Stream,
    number: Any,
    prefix: tuple[jax.Array, jax.Array],
    length: Any,
    caches: tuple[jax.Array, jax.Array],
    stream: Stream,
    window: int,
) -> jax.Array:
    """Returns what piece `number` of a stream sees of its prefix and its texts, `[piece, …]`."""

    def near(position: Any) -> Any:
        before = own.position[:, None] - position
        return (before >= 0) & (before < window)

    piece = len(own.token)
    places = jnp.arange(len(prefix[0]))
    sums = attention.add(attention.nothing(), *prefix, near(places) & (places < length))

    def add(earlier: Any, sums: Sums) -> Sums:
        keys, values, other = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, earlier * piece, piece), (*caches, stream)
        )
        alike = (own.text[:, None] == other.text) & (
            (other.suffix == 0) | (own.suffix[:, None] == other.suffix)
        )
        return attention.add(sums, keys, values, alike & near(other.position))

    sums = jax.lax.fori_loop(own.first[0], number + 1, add, sums)
    return attention.result(sums)


MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def _compiled(**options: Any) -> Callable[[MethodT], MethodT]:
    """Marks a method to be compiled for each object. JAX keeps compiled code as long as the
    function exists, and a class keeps its functions forever."""

    def marked(method: MethodT) -> MethodT:
        @functools.wraps(method)
        def traced(self: Forward, *args: Any, **kwargs: Any) -> Any:  # called once for each shape
            self.compiling.enter_context(metrics.waiting("compiling, once"))
            return method(self, *args, **kwargs)

        traced.compiled = options  # type: ignore[attr-defined]
        return cast(MethodT, traced)

    return marked


class Forward:
    """A backbone of one of the `FAMILIES` and its compiled functions, for text only.

    `weights` are the values of the model's variables, which every function takes; `compilations`
    counts the functions compiled so far. Raises `ValueError` if the backbone is of another model.
    """

    def __init__(self, backbone: Any):
        self.family = family_of(backbone)
        causal_lm = getattr(keras_hub.models, f"{self.family.name}CausalLM")
        self.model = causal_lm(backbone=backbone, preprocessor=None)
        self.size = self.family.sizes(backbone)
        self._position_axis = self.family.position_axis
        # Gemma 3n's text model is a part of its backbone.
        self._embedding = getattr(backbone, "language_model", backbone).token_embedding
        self._turned = [
            self.family.name.startswith("Gemma")  # others multiply with them as they are
            and variable.ndim == 3
            and variable.path.endswith(_TURNED)
            for variable in self.model.variables
        ]
        self.weights = [
            jnp.transpose(variable.value, (1, 0, 2)) if turned else variable.value
            for variable, turned in zip(self.model.variables, self._turned, strict=True)
        ]
        self._paths = [variable.path for variable in self.model.variables]
        self.compilations = 0
        self.compiling = contextlib.ExitStack()
        self._own: list[Any] = []
        for name, method in vars(Forward).items():
            if (options := getattr(method, "compiled", None)) is not None:
                function = jax.jit(functools.partial(method, self), **options)
                setattr(self, name, self._called(function))
                self._own.append(function)

    def _called(self, function: Any) -> Callable[..., Any]:
        """Returns a compiled function that ends what its compilation has begun to say."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.compiling:
                return function(*args, **kwargs)

        return call

    def release(self) -> None:
        """Frees the weights and what was compiled for them."""
        self.weights, self.model = [], None
        for function in self._own:
            function.clear_cache()

    def replaced(self, values: Mapping[str, jax.Array]) -> list[Any]:
        """Returns the weights with other values for some variables, by path."""
        return [
            own
            if (new := values.get(path)) is None
            else jnp.transpose(new, (1, 0, 2))
            if turned
            else new
            for path, turned, own in zip(self._paths, self._turned, self.weights, strict=True)
        ]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the norms' scales, which tells models apart.

        Neither adapters nor quantisation change these.
        """
        scales = [
            np.asarray(value.astype(jnp.bfloat16)).tobytes()
            for path, value in zip(self._paths, self.weights, strict=True)
            if path.endswith("/scale")
        ]
        return hashlib.sha256(b"".join(scales)).hexdigest()[:16]

    def positions(self, cache: Cache) -> int:
        """Returns the number of positions in a cache."""
        return int(jax.tree.leaves(cache)[0].shape[self._position_axis])

    @property
    def dtype(self) -> str:
        """The type of the weights that are multiplied: the model's own, or int8."""
        quantised = any(value.dtype == jnp.int8 for value in self.weights)
        return "int8" if quantised else str(self.model.backbone.compute_dtype)

    @property
    def layers(self) -> int:
        return self.size.layers

    @property
    def cache_bytes(self) -> int:
        """Bytes of one cache position of one row."""
        shapes = jax.eval_shape(lambda: self._zeros(1, 1))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    def rules(self, automaton: Automaton) -> Rules:
        states, classes = automaton.next_state.shape
        more = (-states % 64, -classes % 512)
        return Rules(
            *map(
                jnp.asarray,
                (
                    automaton.token_class,
                    np.pad(automaton.next_state, ((0, more[0]), (0, more[1])), constant_values=-1),
                    np.pad(automaton.characters, ((0, more[0]), (0, more[1]))),
                    np.pad(automaton.characters_to_end, (0, more[0])),
                    np.pad(automaton.tokens_to_end, (0, more[0])),
                ),
            )
        )

    @_compiled(static_argnames=("rows", "total"))
    def cache(self, prefix: Cache | None, *, rows: int, total: int) -> Cache:
        """Returns a cache of `rows` rows that begin with a prefix (one row) or are empty."""
        self.compilations += 1
        empty = self._zeros(rows, total)
        if prefix is None:
            return empty
        return jax.tree.map(
            lambda empty, known: jax.lax.dynamic_update_slice(
                empty,
                jnp.broadcast_to(known, (rows, *known.shape[1:])),
                (0,) * empty.ndim,
            ),
            empty,
            prefix,
        )

    @_compiled(donate_argnames="to")
    def place(self, to: Cache, rows: Cache, where: Any) -> Cache:
        """Copies rows of a cache to the places `where` of another; drops those out of range."""
        self.compilations += 1

        def put(to: jax.Array, rows: jax.Array) -> jax.Array:
            axis = self._position_axis
            total = min(to.shape[axis], rows.shape[axis])
            rows = jax.lax.slice_in_dim(rows, 0, total, axis=axis)
            at = (where, *[slice(None)] * (axis - 1), slice(0, total))
            return to.at[at].set(rows, mode="drop")

        return jax.tree.map(put, to, rows)

    @_compiled(static_argnames=("chunk",), donate_argnames="cache")
    def prefill(
        self, weights: Any, cache: Cache, tokens: Any, starts: Any, lengths: Any, *, chunk: int
    ) -> tuple[jax.Array, Cache]:
        """Feeds each row its next tokens, a chunk of all rows at a time.

        The cache must have room for the whole last chunk of its longest row. Each row is fed the
        first `lengths` (at least 1) of its `tokens` `[rows, total]`, from its position in `starts`.
        Returns the hidden state of each row's last token, `[rows, hidden]`, and the cache.
        """
        self.compilations += 1
        run = jax.vmap(self.row, in_axes=(None, 0, 0, 0))

        def feed(number: Any, state: Any) -> Any:
            last, cache = state
            begin = number * chunk
            part = jax.lax.dynamic_slice_in_dim(tokens, begin, chunk, axis=1)
            hidden, cache = run(weights, part, cache, starts + begin)  # [rows, chunk, hidden]
            at = lengths - 1 - begin
            ends_here = (at >= 0) & (at < chunk)
            found = jnp.take_along_axis(hidden, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)[
                :, 0
            ]
            return jnp.where(ends_here[:, None], found, last), cache

        last = jnp.zeros((tokens.shape[0], self.size.hidden), self.model.backbone.compute_dtype)
        chunks = (jnp.max(lengths) + chunk - 1) // chunk
        hidden, cache = jax.lax.fori_loop(0, chunks, feed, (last, cache))
        return hidden, cache

    @_compiled(static_argnames=("block", "piece", "layers"))
    def read(
        self,
        weights: Any,
        prefix: Known,
        stream: Stream,
        *,
        block: int,
        piece: int,
        layers: tuple[int, ...],
    ) -> tuple[jax.Array, Any]:
        """Reads texts that stand one after the other, `block` tokens at a time; `piece` divides it.

        Every text follows the prefix, and sees nothing of the others. Returns the states after
        some layers (from 1), `[tokens, layers, hidden]`, each divided by its root mean square, as
        some are a thousand times larger; and keys and values, `[tokens, heads, head_dim]`, of each
        layer. Nothing above the highest layer is computed.
        """
        self.compilations += 1
        tokens = stream.token.shape[0]
        dtype = self.model.backbone.compute_dtype
        one = jnp.zeros((tokens, self.size.kv_heads, self.size.head), dtype)
        found = jnp.zeros((tokens, len(layers), self.size.hidden), dtype)

        def feed(number: Any, state: Any) -> Any:
            found, caches = state
            states, caches = self._block(
                weights, prefix, stream, caches, number, block, piece, layers
            )
            return jax.lax.dynamic_update_slice_in_dim(found, states, number * block, 0), caches

        blocks = (jnp.sum(stream.text >= 0) + block - 1) // block
        start = found, [(one, one)] * max(layers)
        states, caches = jax.lax.fori_loop(0, blocks, feed, start)
        return states, caches

    @_compiled()
    def scores(self, weights: Any, hidden: Any, tokens: Any) -> jax.Array:
        """Returns `[rows, choices]`, log-probabilities of `tokens` `[choices]` as next tokens."""
        self.compilations += 1
        return self._scores(weights, hidden, tokens)

    @_compiled()
    def scores_of_states(self, weights: Any, states: Any, tokens: Any) -> jax.Array:
        """Returns `scores` of states `[rows, hidden]` of the last layer, as `read` returns them."""
        self.compilations += 1
        with self._using(weights):
            hidden = self.model.backbone.layer_norm(states)
        return self._scores(weights, hidden, tokens)

    def _scores(self, weights: Any, hidden: Any, tokens: Any) -> jax.Array:
        logits = self.logits(weights, hidden).astype(jnp.float32)
        return jax.nn.log_softmax(logits)[:, tokens]

    def no_prefix(self, layers: int, positions: int) -> Known:
        """Returns an empty prefix for the first `layers` layers, with room for `positions`."""
        one = jnp.zeros(
            (positions, self.size.kv_heads, self.size.head), self.model.backbone.compute_dtype
        )
        return Known([(one, one)] * layers, np.int32(0))

    @_compiled()
    def first(self, weights: Any, hidden: Any, rules: Rules, writing: Writing) -> Writing:
        """Chooses each row's first token after its prompt."""
        self.compilations += 1
        return self._choose(weights, hidden, rules, writing)

    @_compiled(static_argnames=("steps",), donate_argnames="cache")
    def decode(
        self,
        weights: Any,
        cache: Cache,
        rules: Rules,
        writing: Writing,
        floor: Any,
        *,
        steps: int,
    ) -> tuple[jax.Array, Writing, Cache]:
        """Decodes greedily until at most `floor` rows are active.

        Returns tokens `[rows, steps]`; an active row has as many as its `Writing.tokens` fell.
        """
        self.compilations += 1
        run = jax.vmap(self.row, in_axes=(None, 0, 0, 0))

        def going_on(state: Any) -> Any:
            step, writing, _, _ = state
            return (step < steps) & (jnp.sum(writing.active) > floor)

        def one_step(state: Any) -> Any:
            step, before, chosen, cache = state
            hidden, cache = run(weights, before.token[:, None], cache, before.position)
            fed = before._replace(position=before.position + before.active)
            writing = self._choose(weights, hidden[:, 0], rules, fed)
            return step + 1, writing, chosen.at[:, step].set(writing.token), cache

        chosen = jnp.zeros((writing.token.shape[0], steps), jnp.int32)
        _, writing, chosen, cache = jax.lax.while_loop(
            going_on, one_step, (jnp.int32(0), writing, chosen, cache)
        )
        return chosen, writing, cache

    # Parts of the compiled functions.

    def _choose(self, weights: Any, hidden: Any, rules: Rules, now: Writing) -> Writing:
        """Chooses the likeliest token that leaves enough characters and tokens to end the text."""
        logits = self.logits(weights, hidden)  # [rows, vocabulary]
        following = rules.next_state[now.state]  # [rows, classes]
        after = jnp.maximum(following, 0)
        left = now.characters[:, None] - rules.characters[now.state]
        allowed = (
            (following >= 0)
            & (left >= rules.characters_to_end[after])
            & (now.tokens[:, None] > rules.tokens_to_end[after])
        )
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        of_row = jnp.arange(best.shape[0])
        # Make the mask over all tokens only if it changes something.
        token = jax.lax.cond(
            jnp.all(allowed[of_row, rules.token_class[best]] | ~now.active),
            lambda: best,
            lambda: jnp.argmax(
                jnp.where(allowed[:, rules.token_class], logits, -jnp.inf), axis=-1
            ).astype(jnp.int32),
        )
        kind = rules.token_class[token]
        chosen = Writing(
            token,
            now.position,
            after[of_row, kind],
            left[of_row, kind],
            now.tokens - 1,
        )
        return Writing(
            *(jnp.where(now.active, new, old) for new, old in zip(chosen, now, strict=True))
        )

    def _zeros(self, rows: int, total: int) -> Cache:
        layers, heads, dim = self.size[:3]
        dtype = self.model.backbone.compute_dtype
        if self._position_axis == 1:
            one = (rows, total, heads, dim)
            return tuple((jnp.zeros(one, dtype), jnp.zeros(one, dtype)) for _ in range(layers))
        positions = (total, heads) if self._position_axis == 3 else (heads, total)
        return jnp.zeros((rows, layers, 2, *positions, dim), dtype)

    def _using(self, weights: Any) -> Any:
        """Returns a scope in which the model's variables have these values."""
        values = [
            jnp.transpose(value, (1, 0, 2)) if turned else value
            for value, turned in zip(weights, self._turned, strict=True)
        ]
        return keras.StatelessScope(state_mapping=zip(self.model.variables, values, strict=True))

    def row(self, weights: Any, tokens: jax.Array, cache: Cache, start: Any) -> tuple[Any, Cache]:
        """Runs one row: tokens [n] at cache position `start` -> hidden [n, hidden], cache."""
        with self._using(weights):
            one = jax.tree.map(lambda x: x[None], cache)
            masks = {"padding_mask": self._all_of(one)} if self.family.masked else {}
            _, hidden, filled = self.model.call_with_cache(tokens[None], one, start, **masks)
        return hidden[0], jax.tree.map(lambda x: x[0], filled)

    def _all_of(self, cache: Cache) -> jax.Array:
        """Returns a padding mask that leaves out no position of a cache of one row."""
        return jnp.ones((1, jax.tree.leaves(cache)[0].shape[self._position_axis]), bool)

    def _block(
        self,
        weights: Any,
        prefix: Known,
        stream: Stream,
        caches: list[Any],
        number: Any,
        block: int,
        piece: int,
        layers: tuple[int, ...],
    ) -> tuple[jax.Array, list[Any]]:
        """Runs one block of a stream: states `[block, layers, hidden]`, and the filled caches."""
        backbone = self.model.backbone
        begin = number * block
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, block), stream)
        filled: list[Any] = []
        found: list[jax.Array] = []

        def attend(
            _: Any,
            query: Any,
            key: Any,
            value: Any,
            scale: float,
            head: int,
            heads: int,
            kv_heads: int,
            sliding_window: int | None,
            soft_cap: float | None,
        ) -> tuple[None, jax.Array]:
            """Stands in for keras_hub's own attention, as vLLM's does: see its `vllm.attention`."""
            at = len(filled)
            keys, values = filled_now = tuple(
                jax.lax.dynamic_update_slice_in_dim(
                    known, new.reshape(block, kv_heads, head), begin, 0
                )
                for known, new in zip(caches[at], (key, value), strict=True)
            )
            filled.append(filled_now)
            result = jax.lax.map(
                lambda some: _attend(
                    Attention(some[0] * scale, soft_cap),
                    some[1],
                    some[2],
                    prefix.caches[at],
                    prefix.length,
                    (keys, values),
                    stream,
                    sliding_window or ENDLESS,
                ),
                (
                    *jax.tree.map(
                        lambda x: x.reshape(block // piece, piece, *x.shape[1:]),
                        (query.reshape(block, kv_heads, -1, head), own),
                    ),
                    begin // piece + jnp.arange(block // piece),
                ),
            )
            return None, result.reshape(block, -1).astype(query.dtype)

        with self._using(weights), vllm_context_scope(attend, own.position):
            x = backbone.token_embedding(own.token[:, None])
            x = x * jnp.sqrt(backbone.hidden_dim).astype(x.dtype)
            for layer in range(max(layers)):
                x = backbone.transformer_layers[layer](x)
                found += [x[:, 0]] * (layer + 1 in layers)
        states = jnp.stack(found, axis=1).astype(jnp.float32)
        norm = jax.lax.rsqrt(jnp.mean(states**2, axis=-1, keepdims=True) + 1e-6)
        return (states * norm).astype(x.dtype), filled

    def logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        """Returns logits [rows, vocabulary] of hidden states [rows, hidden]."""
        with self._using(weights):
            logits: jax.Array
            if self.dtype == "int8" and self._embedding.tie_weights:
                logits = self._int8_logits(hidden)
            else:
                logits = self._embedding(hidden, reverse=True)
            return logits

    def _int8_logits(self, hidden: jax.Array) -> Any:
        """Does what Keras's `ReversibleEmbedding` does, which transposes the embedding first: on a
        CPU, XLA then takes 840 ms of a processor a step for Gemma 3 270M, and 28 ms so."""
        layer = self._embedding
        rounded, scale = layer.inputs_quantizer(hidden)
        contracted = (((1,), (1,)), ((), ()))
        products = jax.lax.dot_general(
            rounded, layer._embeddings.value, contracted, preferred_element_type=jnp.int32
        )
        scales = scale * layer.embeddings_scale.value.reshape(1, -1)
        logits = products.astype(hidden.dtype) / scales
        cap = layer.logit_soft_cap
        return logits if cap is None else jnp.tanh(logits / cap) * cap
