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

from chatflow import metrics
from chatflow.models.gemma.grammar import DONE, Automaton
from chatflow.weights.families import family_of

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

    def first_of(self, cache: Cache, positions: int) -> Cache:
        """Returns the first row of a cache, up to a position."""
        axis = self._position_axis
        return jax.tree.map(
            lambda values: jax.lax.slice_in_dim(values[:1], 0, positions, axis=axis), cache
        )

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

    @_compiled(static_argnames=("chunk", "layers"), donate_argnames="cache")
    def read(
        self,
        weights: Any,
        cache: Cache,
        tokens: Any,
        starts: Any,
        lengths: Any,
        *,
        chunk: int,
        layers: tuple[int, ...],
    ) -> tuple[jax.Array, Cache]:
        """Feeds tokens as `prefill` does; returns the states after some layers, and the cache.

        The states are `[rows, total, layers, hidden]`; those after a row's end have no meaning.
        Nothing above the highest layer is computed, so the cache is only filled up to it.
        """
        self.compilations += 1
        run = jax.vmap(functools.partial(self.states, layers=layers), in_axes=(None, 0, 0, 0))

        def feed(number: Any, state: Any) -> Any:
            found, cache = state
            begin = number * chunk
            part = jax.lax.dynamic_slice_in_dim(tokens, begin, chunk, axis=1)
            states, cache = run(weights, part, cache, starts + begin)
            return jax.lax.dynamic_update_slice_in_dim(found, states, begin, axis=1), cache

        shape = (*tokens.shape, len(layers), self.size.hidden)
        found = jnp.zeros(shape, self.model.backbone.compute_dtype)
        chunks = (jnp.max(lengths) + chunk - 1) // chunk
        found, cache = jax.lax.fori_loop(0, chunks, feed, (found, cache))
        return found, cache

    @_compiled()
    def scores(self, weights: Any, hidden: Any, tokens: Any) -> jax.Array:
        """Returns `[rows, choices]`, log-probabilities of `tokens` `[choices]` as next tokens."""
        self.compilations += 1
        logits = self.logits(weights, hidden).astype(jnp.float32)
        return jax.nn.log_softmax(logits)[:, tokens]

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

    def states(
        self,
        weights: Any,
        tokens: jax.Array,
        cache: Cache,
        start: Any,
        *,
        layers: tuple[int, ...],
    ) -> tuple[Any, Cache]:
        """Runs one row: tokens [n] at cache position `start` -> [n, layers, hidden], cache.

        Each state is divided by its root mean square, as some are a thousand times larger.
        Does what keras_hub's `call_with_cache` of Gemma 1 to 3 does up to the highest of `layers`.
        """
        backbone = self.model.backbone
        caches = [cache[number] for number in range(max(layers))]
        found = []
        with self._using(weights):
            x = backbone.token_embedding(tokens[None])
            x = x * jnp.sqrt(backbone.hidden_dim).astype(x.dtype)
            for number, known in enumerate(caches):
                one = jax.tree.map(lambda values: values[None], known)
                x, filled = backbone.transformer_layers[number](
                    x, cache=one, cache_update_index=start
                )
                caches[number] = jax.tree.map(lambda values: values[0], filled)
                found += [x[0]] * (number + 1 in layers)
        states = jnp.stack(found, axis=1).astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(states**2, axis=-1, keepdims=True) + 1e-6)
        return (states * scale).astype(x.dtype), self._with_layers(cache, caches)

    def _with_layers(self, cache: Cache, layers: list[Cache]) -> Cache:
        if self._position_axis == 1:
            return (*layers, *cache[len(layers) :])
        return jnp.concatenate([jnp.stack(layers), cache[len(layers) :]])

    def logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        """Returns logits [rows, vocabulary] of hidden states [rows, hidden]."""
        with self._using(weights):
            logits: jax.Array = self._embedding(hidden, reverse=True)
            return logits
