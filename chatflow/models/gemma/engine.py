"""Scores and decodes greedily with keras_hub's decoders: Gemma and other families.

`keras_hub`'s own `generate` compiles for every shape, feeds long prompts token by token and runs
the whole prompt each time. Here

- the part of a prompt that its template shares runs once, and its KV cache is kept;
- the rest runs in blocks of rows of similar length, so that little is padding;
- rows of all templates decode in one batch, which shrinks as they finish;
- a grammar masks tokens that do not fit the answer; see `models.gemma.grammar`.
"""

from __future__ import annotations

import collections
import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import keras_hub
import numpy as np

from chatflow import metrics
from chatflow.chat_text import CONTROL_TOKEN
from chatflow.choices.reading import States
from chatflow.models.gemma.forward import Cache, Forward, Known, Rules, Stream, Writing
from chatflow.models.gemma.grammar import DONE, ENDLESS, Text, Vocabulary, compile_texts
from chatflow.models.gemma.shapes import (
    STEPS,
    TOTALS,
    PromptTooLongError,
    Shape,
    bucket,
)
from chatflow.models.gemma.tokens import text_tokens
from chatflow.models.parts import Result
from chatflow.weights.keras_loading import is_of_scoring, load_backbone

PREFIXES_KEPT = 16


class Row(NamedTuple):
    """What one row of a batch asks for: a choice, a text, or a choice and then a text.

    Attributes:
      prefix, suffix: the prompt; all prompts of a template share the prefix.
      lead: the given start of the answer.
      choices: scored as the next text; their first tokens must differ.
      bias: subtracted from their log-probabilities before the likeliest is chosen.
      text: the grammar of the generated text; None: nothing is generated.
      max_tokens, max_characters: of the generated text.
    """

    prefix: str
    suffix: str
    lead: str = ""
    choices: tuple[str, ...] = ()
    bias: tuple[float, ...] = ()
    between: str = ""
    text: Text | None = None
    max_tokens: int = 0
    max_characters: int = ENDLESS


class Reading(NamedTuple):
    """A text to read for its hidden states.

    Attributes:
      prefix, suffix: the text; all texts of a template share the prefix.
      ends: where the pieces of the suffix end, in characters, rising; what follows the last is
        read, too. No token spans an end.
      behind: questions asked after the text, each with its options; the same for all texts of a
        batch.
    """

    prefix: str
    suffix: str
    ends: tuple[int, ...]
    behind: tuple[tuple[str, tuple[str, ...]], ...] = ()


class _Prompt(NamedTuple):
    """A row as tokens, and the cache positions that it needs."""

    number: int
    row: Row
    start: int
    tokens: list[int]
    total: int

    @property
    def bridged(self) -> bool:
        """Whether a text follows a choice."""
        return bool(self.row.choices and self.row.text)


class _Text(NamedTuple):
    """A reading as tokens: of each piece, and of each question behind it."""

    number: int
    pieces: list[list[int]]
    asked: list[list[int]]

    @property
    def length(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def size(self) -> int:
        return self.length + sum(map(len, self.asked))


class Engine:
    """A decoder of keras_hub's with its tokenizer, ready to score and decode.

    `counts` has `prefill_tokens`, `decode_steps` and `decoded_tokens` so far. Raises `ValueError`
    if the backbone's family is unknown, or if its tokenizer lacks a token of the chat template.

    Args:
      instruct: wrap each prompt in the family's chat template, as one user turn. Control tokens
        are added by id, so that no text can imitate them.
      scoring: an adapter of the tone: values of some variables by path, for rows that only score
        choices, after the prefix that all prompts of their template share.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        instruct: bool = False,
        scoring: Mapping[str, jax.Array] | None = None,
    ):
        self.forward = Forward(backbone)
        self.shape = Shape.of_device(self.forward.dtype)
        self.scoring = self.forward.replaced(scoring or {})
        weakref.finalize(self, self.forward.release).atexit = False
        self.tokenizer = tokenizer
        family = self.forward.family
        self.encode, self._pieces = text_tokens(tokenizer)
        self.counts: collections.Counter[str] = collections.Counter()
        self.warming = False  # nobody waits for what is read now
        start = tokenizer.start_token_id
        self._before, self._after = [] if start is None else [start], []
        if instruct:
            before, after = family.turns(backbone)
            self._before += self._turn(before)
            self._after = self._turn(after)
        self._prefixes: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        # A separate step reads all weights. A byte of a cache costs 7 times as much as one of the
        # weights (measured on a CPU), because caches are copied.
        weights = sum(value.nbytes for value in self.forward.weights)
        self._step_positions = weights // (7 * self.forward.cache_bytes)
        self._starts: dict[Text, int] = {}  # each text's first state of the automaton
        self._rules: Rules
        self._longest = ENDLESS

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Returns what each token writes, and which tokens end a text."""
        size, pieces = self.forward.size.vocabulary, self._pieces()
        controls = map(self._control, self.forward.family.ends)
        ends = {self.tokenizer.end_token_id, *controls} - {None}
        return Vocabulary(tuple(pieces[:size] + [b""] * (size - len(pieces))), tuple(ends))

    def _control(self, token: str) -> int | None:
        """Returns the id of a control token, if the tokenizer has it."""
        try:
            found = int(self.tokenizer.token_to_id(token))
        except ValueError:  # as byte-pair tokenizers say it
            return None
        return found if self.tokenizer.id_to_token(found) == token else None

    def _turn(self, text: str) -> list[int]:
        """Returns the ids of a part of the chat template, in which control tokens are spelled."""
        ids: list[int] = []
        at = 0
        for match in CONTROL_TOKEN.finditer(text):
            if (control := self._control(match[0])) is None:
                raise ValueError(
                    f"the tokenizer has no {match[0]}, which its family's chat template needs; "
                    "give --model_kind=base"
                )
            ids += [*self.encode(text[at : match.start()]), control]
            at = match.end()
        return ids + self.encode(text[at:])

    def run(self, rows: Sequence[Row]) -> list[Result | PromptTooLongError]:
        """Returns one result or error per row, in order.

        Raises `ValueError` if two choices begin with the same token, or if the vocabulary cannot
        write a text.
        """
        self._know(row.text for row in rows if row.text)
        for choices in {row.choices for row in rows}:
            self.first_tokens(choices)
        results: dict[int, Result | PromptTooLongError] = {}
        prompts = []
        for number, row in enumerate(rows):
            try:
                prompts.append(self.prompt(number, row))
            except PromptTooLongError as error:
                results[number] = error
        writing = [prompt for prompt in prompts if prompt.row.text]
        for block, total in self._blocks([prompt for prompt in prompts if not prompt.row.text]):
            self._read(block, total, results)
        for batch, total in self._batches(writing):
            self._write(batch, total, results)
        return [results[number] for number in range(len(rows))]

    def warm_up(self, rows: Sequence[Row], most: int) -> None:
        """Runs the rows, then `most` copies of each, with answers of at most two tokens."""
        self._longest = 2
        try:
            self.run(rows)
            for row in rows:
                self.run([row] * most)
        finally:
            self._longest = ENDLESS

    def _note(self, name: str, by: int) -> None:
        if not self.warming:
            metrics.note(name, by)

    def all_counts(self) -> collections.Counter[str]:
        return self.counts + collections.Counter(compilations=self.forward.compilations)

    # From rows to blocks and batches.

    def prompt(self, number: int, row: Row) -> _Prompt:
        start = self.prefix(row.prefix)[1]
        tokens = [*self.encode(row.suffix), *self._after, *self.encode(row.lead)]
        room = row.max_tokens if row.text else 0
        if row.choices and row.text:
            longest = max(len(self.encode(choice + row.between)) for choice in row.choices)
            room = max(room + longest, self.shape.fed(longest))
        size = start + max(self.shape.fed(len(tokens)), len(tokens) + room)
        return _Prompt(number, row, start, tokens, bucket(size, TOTALS))

    def _blocks(self, prompts: list[_Prompt]) -> Iterator[tuple[list[_Prompt], int]]:
        """Yields prompts of one prefix and kind and of similar length, with their cache length."""
        groups: dict[tuple[str, bool], list[_Prompt]] = collections.defaultdict(list)
        for prompt in prompts:
            groups[prompt.row.prefix, prompt.bridged].append(prompt)
        for some in groups.values():
            some.sort(key=lambda prompt: len(prompt.tokens))
            while some:
                total = max(prompt.total for prompt in some)
                yield self._take(some, total, self.shape.blocks), total

    def _batches(self, prompts: list[_Prompt]) -> Iterator[tuple[list[_Prompt], int]]:
        """Yields prompts that decode together, the longest first, with their cache length.

        Shorter rows wait if caches of the longest row's length cost more than separate steps.
        """
        prompts = sorted(prompts, key=lambda prompt: (prompt.total, prompt.number))
        while prompts:
            total = prompts[-1].total
            apart = 0
            for at, prompt in enumerate(prompts):
                if (at + 1) * (total - prompt.total) > self._step_positions:
                    apart = at + 1
            shorter, prompts = prompts[:apart], prompts[apart:]
            yield self._take(prompts, total, self.shape.batches), total
            prompts = shorter + prompts

    def _take(self, prompts: list[_Prompt], total: int, sizes: Sequence[int]) -> list[_Prompt]:
        """Removes and returns as many of the last prompts as fit."""
        fit = self.shape.cache_bytes // (total * self.forward.cache_bytes)
        most = max([size for size in sizes if size <= fit], default=sizes[0])
        taken = prompts[-most:]
        del prompts[-most:]
        return taken

    # Prefill.

    def prefix(self, prefix: str) -> tuple[Cache, int]:
        """Returns the KV cache of a prefix, as one row, and its number of tokens."""
        if prefix not in self._prefixes:
            ids = self._prefix_ids(prefix)
            total = bucket(self.shape.fed(len(ids)), TOTALS)
            rows = self.shape.blocks[0]
            cache = self.forward.cache(None, rows=rows, total=total)
            _, cache = self._prefill(self.forward.weights, cache, [ids], [0], rows, total)
            if rows > 1:
                cache = jax.tree.map(lambda values: values[:1], cache)
            self._keep(prefix, (cache, len(ids)))
        self._prefixes.move_to_end(prefix)
        cache, length = self._prefixes[prefix]
        return cache, length

    def _keep(self, key: Any, prefix: Any) -> None:
        self._prefixes[key] = prefix
        while len(self._prefixes) > PREFIXES_KEPT:
            self._prefixes.popitem(last=False)

    def _prefix_ids(self, prefix: str) -> list[int]:
        return [*self._before, *self.encode(prefix)]

    def _prefill(
        self,
        weights: Any,
        cache: Cache,
        tokens: list[list[int]],
        starts: list[int],
        rows: int,
        total: int,
    ) -> tuple[jax.Array, Cache]:
        padded = np.zeros((rows, total), np.int32)
        lengths, positions = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        for at, (ids, start) in enumerate(zip(tokens, starts, strict=True)):
            padded[at, : len(ids)] = ids
            lengths[at], positions[at] = len(ids), start
        self.counts["prefill_tokens"] += sum(map(len, tokens))
        hidden, cache = self.forward.prefill(
            weights, cache, padded, positions, lengths, chunk=self.shape.chunks[rows]
        )
        self._note("tokens", sum(map(len, tokens)))
        return hidden, cache

    def _read(
        self, block: list[_Prompt], total: int, results: dict[int, Any]
    ) -> tuple[jax.Array, Cache, list[int]]:
        """Runs and scores a block; returns last hidden states, the cache and row positions."""
        size = bucket(len(block), self.shape.blocks)
        prefix, start = self.prefix(block[0].row.prefix)
        cache = self.forward.cache(prefix, rows=size, total=total)
        tokens = [prompt.tokens for prompt in block]
        weights = self.forward.weights if block[0].row.text else self.scoring
        hidden, cache = self._prefill(weights, cache, tokens, [start] * len(block), size, total)
        positions = [start + len(ids) for ids in tokens]
        for prompt, position in zip(block, positions, strict=True):
            results[prompt.number] = Result(position)
        self._score(block, hidden, results)
        if block[0].bridged:
            bridges = [
                self.encode(row.choices[results[number].choice] + row.between)
                for number, row, *_ in block
            ]
            hidden, cache = self._prefill(weights, cache, bridges, positions, size, total)
            positions = [at + len(ids) for at, ids in zip(positions, bridges, strict=True)]
        return hidden, cache, positions

    def _score(self, block: list[_Prompt], hidden: jax.Array, results: dict[int, Any]) -> None:
        for choices in {prompt.row.choices for prompt in block if prompt.row.choices}:
            first = self.first_tokens(choices)
            scores = np.asarray(self.forward.scores(self.forward.weights, hidden, first))
            for prompt, found in zip(block, scores, strict=False):
                if prompt.row.choices == choices:
                    result = results[prompt.number]
                    result.scores = tuple(map(float, found))
                    result.choice = int(np.argmax(found - np.array(prompt.row.bias or 0.0)))

    def first_tokens(self, choices: tuple[str, ...]) -> np.ndarray:
        """Returns the first token of each choice; raises `ValueError` if two are equal."""
        first = np.array([self.encode(choice)[0] for choice in choices], np.int32)
        if len(set(first.tolist())) < len(choices):
            raise ValueError(f"the choices {list(choices)} do not differ in their first token")
        return first

    # Reading.

    def read(
        self, readings: Sequence[Reading], layers: tuple[int, ...]
    ) -> list[States | PromptTooLongError]:
        """Returns the states after these layers (from 1) of each piece of each text, in order.

        Raises `ValueError` if two options begin with the same token.
        """
        behind = readings[0].behind if readings else ()
        if behind:  # what is asked behind a text needs all layers
            return [
                states if isinstance(states, Exception) else _without_last_layer(states)
                for states in self._states(readings, (*layers, self.forward.layers), behind)
            ]
        return self._states(readings, layers, ())

    def _states(
        self,
        readings: Sequence[Reading],
        layers: tuple[int, ...],
        behind: tuple[tuple[str, tuple[str, ...]], ...],
    ) -> list[States | PromptTooLongError]:
        results: dict[int, States | PromptTooLongError] = {}
        asked = [(self.encode(text), self.first_tokens(options)) for text, options in behind]
        waiting: dict[str, list[_Text]] = collections.defaultdict(list)
        for number, reading in enumerate(readings):
            cuts = [0, *reading.ends, len(reading.suffix)]
            pieces = [self.encode(reading.suffix[a:b]) for a, b in itertools.pairwise(cuts)]
            text = _Text(number, pieces, [ids for ids, _ in asked])
            try:
                bucket(text.size, tuple(self.shape.streams))
            except PromptTooLongError as error:
                results[number] = error
            else:
                waiting[reading.prefix].append(text)
        for prefix, texts in waiting.items():
            while texts:
                count = self._fitting(texts)
                self._read_stream(texts[:count], prefix, layers, asked, results)
                del texts[:count]
        return [results[number] for number in range(len(readings))]

    def _fitting(self, texts: Sequence[_Text]) -> int:
        """Returns how many of the first texts are read as one stream: at least one."""
        fit = self.shape.cache_bytes // self.forward.cache_bytes
        most = max([n for n in self.shape.streams if n <= fit], default=0)
        total = 0
        for count, text in enumerate(texts):
            total += text.size
            if count and (
                total > min(most, self.shape.together) or count == self.shape.batches[-1]
            ):
                return count
        return len(texts)

    def _read_stream(
        self,
        texts: Sequence[_Text],
        prefix: str,
        layers: tuple[int, ...],
        asked: Sequence[tuple[list[int], np.ndarray]],
        results: dict[int, Any],
    ) -> None:
        known = self._known(prefix, layers)
        starts, states, _ = self._feed(texts, known, layers)
        self._note("requests_read", len(texts))
        self._note("tokens", sum(text.size for text in texts))
        rows = np.asarray(states)  # cut here: on the device, each length would be compiled
        options = []
        ends = np.array([start + text.length for start, text in zip(starts, texts, strict=True)])
        for ids, first in asked:
            ends += len(ids)
            size = bucket(len(ends), self.shape.batches)
            last = np.zeros((size, self.forward.size.hidden), rows.dtype)
            last[: len(ends)] = rows[ends - 1, -1]
            scores = np.asarray(self.forward.scores_of_states(self.forward.weights, last, first))
            options.append(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        for at, (start, text) in enumerate(zip(starts, texts, strict=True)):
            own = rows[start : start + text.length].astype(np.float32)
            found = _pooled(own, np.array([len(piece) for piece in text.pieces]))
            scores_of_text = tuple(scores[at] for scores in options)
            results[text.number] = found._replace(options=scores_of_text)

    def _feed(
        self, texts: Sequence[_Text], known: Known, layers: tuple[int, ...]
    ) -> tuple[list[int], jax.Array, Any]:
        """Reads texts as one stream; returns where each begins in it, states, keys and values."""
        total = bucket(sum(text.size for text in texts), tuple(self.shape.streams))
        stream, starts = _stream(texts, total, int(known.length), self.shape.piece)
        self.counts["prefill_tokens"] += sum(text.size for text in texts)
        states, caches = self.forward.read(
            self.forward.weights,
            known,
            stream,
            block=self.shape.streams[total],
            piece=self.shape.piece,
            layers=layers,
        )
        return starts, states, caches

    def _known(self, prefix: str, layers: tuple[int, ...]) -> Known:
        """Returns the keys and values of a prefix, up to the highest of these layers.

        It is read by the function that reads what follows it: one less to compile.
        """
        key = prefix, layers
        if key not in self._prefixes:
            ids = self._prefix_ids(prefix)
            kept = -(-max(len(ids), 1) // self.shape.piece) * self.shape.piece
            nothing = self.forward.no_prefix(max(layers), kept)
            *_, caches = self._feed([_Text(0, [ids], [])], nothing, layers)
            caches = jax.tree.map(lambda values: values[:kept], caches)
            self._keep(key, Known(caches, np.int32(len(ids))))
        self._prefixes.move_to_end(key)
        known: Known = self._prefixes[key]
        return known

    # Decode.

    def _write(self, batch: list[_Prompt], total: int, results: dict[int, Any]) -> None:
        """Runs the prompts of a batch and writes their answers."""
        size = bucket(len(batch), self.shape.batches)
        cache = self.forward.cache(None, rows=size, total=total)
        prompts: list[_Prompt] = []
        hidden, positions = [], []
        for block, block_total in self._blocks(batch):
            states, filled, at = self._read(block, block_total, results)
            places = np.full(states.shape[0], size, np.int32)  # out of range: dropped
            places[: len(block)] = range(len(prompts), len(prompts) + len(block))
            cache = self.forward.place(cache, filled, places)
            prompts += block
            positions += at
            hidden.append(np.asarray(states)[: len(block)])
        # Padding rows have ended from the start.
        blank = size - len(prompts)
        starts = [self._starts[prompt.row.text] for prompt in prompts if prompt.row.text]
        writing: Any = Writing._make(
            np.pad(np.array(values, np.int32), (0, blank))
            for values in (
                [0] * len(prompts),
                positions,
                starts,
                [prompt.row.max_characters for prompt in prompts],
                [min(prompt.row.max_tokens, self._longest) for prompt in prompts],
            )
        )
        last = np.pad(np.concatenate(hidden), ((0, blank), (0, 0)))
        writing = self.forward.first(self.forward.weights, last, self._rules, writing)
        written = [[int(token)] for token in np.asarray(writing.token)[: len(prompts)]]
        ended = self._decode(cache, writing, total, written)
        for prompt, ids, by_itself in zip(prompts, written, ended, strict=True):
            assert prompt.row.text
            result = results[prompt.number]
            spelled = b"".join(self.vocabulary.pieces[token] for token in ids)
            result.text = prompt.row.text.read(spelled)
            result.tokens = tuple(ids)
            result.cut = not by_itself

    def _decode(
        self, cache: Cache, writing: Any, total: int, written: list[list[int]]
    ) -> list[bool]:
        """Decodes into `written` in shrinking batches; returns whether each row ended by itself."""
        ended = [False] * len(written)
        rows = np.arange(len(written))  # which answer each row of the batch writes, or -1
        while True:
            now: Any = Writing._make(np.asarray(values)[: len(rows)] for values in writing)
            for at in np.flatnonzero(~now.active & (rows >= 0)):
                within = now.tokens[at] > 0 and now.characters[at] > 0
                ended[rows[at]] = bool(now.state[at] == DONE and within)
                rows[at] = -1
            going = np.flatnonzero(rows >= 0)
            if not len(going):
                return ended
            size = bucket(len(going), self.shape.batches)
            if size < len(writing.token):
                places = np.full(len(writing.token), size, np.int32)
                places[going] = range(len(going))
                empty = self.forward.cache(None, rows=size, total=total)
                cache = self.forward.place(empty, cache, places)
                blank = size - len(going)
                writing = Writing._make(np.pad(values[going], (0, blank)) for values in now)
                rows = rows[going]
            before = np.asarray(writing.tokens)
            floor = max([rows for rows in self.shape.batches if rows < len(going)], default=0)
            steps = bucket(min(int(before.max()), STEPS[-1]), STEPS)
            chosen, writing, cache = self.forward.decode(
                self.forward.weights, cache, self._rules, writing, floor, steps=steps
            )
            counts = before - np.asarray(writing.tokens)
            self.counts["decode_steps"] += int(counts.max())
            self.counts["decoded_tokens"] += int(counts.sum())
            self._note("tokens", int(counts.sum()))
            for row, ids, count in zip(rows, np.asarray(chosen), counts, strict=False):
                written[row] += ids[:count].tolist()  # row -1 adds nothing: its count is 0

    def _know(self, texts: Iterable[Text]) -> None:
        """Recompiles the automaton if it lacks a text."""
        known = dict.fromkeys([*self._starts, *texts])
        if len(known) > len(self._starts):
            automaton = compile_texts(list(known), self.vocabulary)
            self._starts = dict(zip(known, automaton.starts, strict=True))
            self._rules = self.forward.rules(automaton)


def _stream(texts: Sequence[_Text], total: int, start: int, piece: int) -> tuple[Stream, list[int]]:
    """Returns texts as a stream, and where each begins; `start` is the length of their prefix."""
    token, position, suffix, first = (np.zeros(total, np.int32) for _ in range(4))
    text_number = np.full(total, -1, np.int32)
    begins: list[int] = []
    at = 0
    for number, text in enumerate(texts):
        begins.append(at)
        after = start + text.length
        parts = [[token for piece in text.pieces for token in piece], *text.asked]
        for part, ids in enumerate(parts):
            places = slice(at, at + len(ids))
            token[places] = ids
            text_number[places] = number
            position[places] = np.arange(len(ids)) + (after if part else start)
            suffix[places] = part
            at += len(ids)
        first[begins[-1] : at] = begins[-1] // piece
    return Stream(token, text_number, position, suffix, first), begins


def _without_last_layer(states: States) -> States:
    return states._replace(mean=states.mean[:, :-1], last=states.last[:, :-1])


def _pooled(states: np.ndarray, pieces: np.ndarray) -> States:
    """Returns the states of pieces; `pieces` has the number of tokens of each."""
    sums = np.concatenate(
        [np.zeros((1, *states.shape[1:])), np.cumsum(states, axis=0, dtype=float)]
    )
    ends = np.cumsum(pieces)
    last = states[np.maximum(ends - 1, 0)]
    mean = (sums[ends] - sums[ends - pieces]) / np.maximum(pieces, 1)[:, None, None]
    mean = np.where((pieces > 0)[:, None, None], mean, last)
    return States(mean.astype(np.float32), last, pieces)


def load_engine(
    preset: str,
    dtype: str = "auto",
    instruct: bool = False,
    quantization: str = "none",
    adapter: str = "",
) -> Engine:
    """Returns an engine with the weights and the tokenizer of a preset.

    Args:
      preset: a local folder, or any handle that keras_hub can load.
      dtype: `float32`, `bfloat16` or `auto`: bfloat16 on an accelerator.
      quantization: `int8`, by Keras: weights, and activations during multiplication; or `none`.
      adapter: a file of Keras's `save_lora_weights`, whose LoRA is added to the weights; if
        `chatflow tune` made it, only in the scoring pass, the only one that it is trained for.

    Raises:
      ValueError: the preset's family is unknown, or the adapter does not fit it.
    """
    scoring = None
    if adapter and is_of_scoring(adapter):
        # Load only to read the adapted values; free it before loading the base model.
        scoring = _adapted(load_backbone(preset, dtype, quantization, adapter))
        adapter = ""
    backbone = load_backbone(preset, dtype, quantization, adapter)
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset)
    return Engine(backbone, tokenizer, instruct, scoring)


def _adapted(backbone: keras_hub.models.Backbone) -> dict[str, jax.Array]:
    """Returns the values of the layers that an adapter has changed, by path."""
    return {
        variable.path: variable.value
        for layer in backbone._flatten_layers()
        if hasattr(layer, "lora_kernel_a")
        for variable in layer.variables
    }
