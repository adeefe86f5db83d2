"""Scores and greedily decodes prompts with Hugging Face's text models.

A batch runs in few padded calls of prompts of similar length: scored if there are choices, else
continued by transformers' own `generate`.
"""

from __future__ import annotations

import collections
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, StoppingCriteria

from chatflow.errors import ElementError, ModelError
from chatflow.models.parts import Result
from chatflow.models.requests import Part
from chatflow.weights.architectures import rows_at_once

LONGEST = 4096
"""Most tokens of a prompt if the model names no limit. T5's relative positions have none, but its
attention's memory grows with the square (flan-t5-xl: 2 GB per prompt at this length)."""


class _Prompt(NamedTuple):
    """A part as tokens; an encoder-decoder's decoder begins with `lead`."""

    number: int
    part: Part
    tokens: list[int]
    lead: list[int]


class Engine:
    """A model with its tokenizer, ready to score and to decode.

    `counts` has the `calls`, `prompt_tokens` and `padding_tokens` so far.

    Args:
      model: a `PreTrainedModel` of transformers, encoder-decoder or decoder-only.
      instruct: prompts are a user's turn in the tokenizer's chat template, if it has one.
      most: prompts in one call.
    """

    def __init__(self, model: Any, tokenizer: Any, instruct: bool = False, most: int = 32):
        self.model, self.tokenizer, self.most = model, tokenizer, most
        config = model.config.get_text_config(decoder=True)
        self.encodes: bool = model.config.is_encoder_decoder
        self.longest = getattr(config, "max_position_embeddings", None) or LONGEST
        self.counts: collections.Counter[str] = collections.Counter()
        self._heads = config.num_attention_heads
        self._chats = instruct and bool(tokenizer.chat_template)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        settings = model.generation_config
        # Overrides the folder's settings for sampling and beams.
        settings.update(do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50)
        ends = settings.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends])} - {None}
        known = (settings.pad_token_id, tokenizer.pad_token_id, *self._ends, 0)
        self._pad: int = next(token for token in known if token is not None)
        settings.update(eos_token_id=list(self._ends) or None, pad_token_id=self._pad)

    def all_counts(self) -> collections.Counter[str]:
        return self.counts.copy()

    def run(self, parts: Sequence[Part]) -> list[Result | ElementError]:
        """Returns one result or error per part; `ValueError` if one choice begins with another."""
        results: dict[int, Result | ElementError] = {}
        groups: dict[tuple[Any, int], list[_Prompt]] = collections.defaultdict(list)
        for number, part in enumerate(parts):
            try:
                prompt = self._prompt(number, part)
            except ModelError as error:
                results[number] = error
            else:
                groups[part.choices, len(prompt.lead)].append(prompt)
        with torch.inference_mode():
            for (choices, _), prompts in groups.items():
                for block in self._blocks(prompts):
                    run = self._score(block, choices) if choices else self._write(block)
                    for prompt, result in zip(block, run, strict=True):
                        results[prompt.number] = result
        return [results[number] for number in range(len(parts))]

    # From parts to tokens.

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Returns token ids; no text becomes a special token."""
        text = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _prompt(self, number: int, part: Part) -> _Prompt:
        text, lead = part.prompt, ""
        if (self.encodes or self._chats) and part.lead and text.endswith(part.lead):
            text, lead = text.removesuffix(part.lead).rstrip(), part.lead
        start = self.encode(lead, special=False) if lead else []
        tokens = self._turn(text) if self._chats else self.encode(text)
        if self.encodes:
            start = [self.model.generation_config.decoder_start_token_id, *start]
        else:
            if tokens[-1:] and tokens[-1] in self._ends and not self._chats:
                tokens.pop()  # some tokenizers end a text that must go on here
            tokens, start = tokens + start, []
        written = part.max_tokens or max(map(len, map(self._choice, part.choices)), default=0)
        room = 0 if self.encodes else written
        if len(tokens) + room > self.longest:
            raise ModelError(
                "prompt_too_long",
                f"the prompt has {len(tokens)} tokens, and its answer {room}; the model takes at "
                f"most {self.longest}",
            )
        return _Prompt(number, part, tokens, start)

    def _turn(self, text: str) -> list[int]:
        """Returns a prompt as a user's turn, and the start of the model's."""
        text = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        turn = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.tokenizer(turn, add_special_tokens=False)["input_ids"]
        return ids

    def _choice(self, choice: str) -> list[int]:
        """Returns a choice's tokens as they follow the prompt."""
        if not choice.startswith(" ") or self.encodes:
            return self.encode(choice, special=False)
        # Some tokenizers put a space before a text; it would be a second one.
        before, both = (self.encode(text, special=False) for text in (":", ":" + choice))
        same = both[: len(before)] == before
        return both[len(before) :] if same else self.encode(choice, special=False)

    def _blocks(self, prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
        """Yields prompts of similar length: none is padded to more than twice its own."""
        prompts = sorted(prompts, key=lambda prompt: len(prompt.tokens), reverse=True)
        while prompts:
            longest = len(prompts[0].tokens)
            rows = rows_at_once(self.most, self._heads, longest)
            like = itertools.takewhile(lambda p: 2 * len(p.tokens) > longest, prompts)  # noqa: B023
            block = list(itertools.islice(like, rows))
            prompts = prompts[len(block) :]
            self.counts["calls"] += 1
            self.counts["prompt_tokens"] += sum(len(prompt.tokens) for prompt in block)
            self.counts["padding_tokens"] += sum(longest - len(p.tokens) for p in block)
            yield block

    def _padded(
        self, rows: Sequence[Sequence[int]], left: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows of ids as a tensor, and its attention mask: both [rows, longest]."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(len(row))
            ids[at, place], mask[at, place] = torch.tensor(row), 1
        return ids.to(self.model.device), mask.to(self.model.device)

    # Scoring.

    def _score(self, block: list[_Prompt], choices: tuple[str, ...]) -> list[Result | ElementError]:
        """Scores each choice by its log-probability as the answer's start; reads prompts once."""
        tokens = [self._choice(choice) for choice in choices]
        for one, other in itertools.permutations(tokens, 2):
            if other[: len(one)] == one:
                raise ValueError(f"one of the choices {list(choices)} begins with another")
        logits = (self._encoded if self.encodes else self._continued)(block, tokens)
        log_probs = logits.float().log_softmax(-1)  # [prompts, choices, tokens, vocabulary]
        ids, mask = self._padded(tokens)  # [choices, tokens]
        each = log_probs.gather(-1, ids.expand(len(block), -1, -1).unsqueeze(-1)).squeeze(-1)
        scores = each.masked_fill(mask == 0, 0.0).sum(-1).cpu()  # [prompts, choices]
        results: list[Result | ElementError] = []
        for prompt, row in zip(block, scores, strict=True):
            if not torch.isfinite(row).all():
                results.append(_not_finite())
                continue
            found = tuple(row.tolist())
            bias = prompt.part.bias or (0.0,) * len(found)
            choice = max(range(len(found)), key=lambda at: found[at] - bias[at])
            results.append(Result(len(prompt.tokens), found, choice))
        return results

    def _encoded(self, block: list[_Prompt], choices: list[list[int]]) -> torch.Tensor:
        """Returns an encoder-decoder's logits for the tokens of each choice."""
        count, start = len(choices), len(block[0].lead)
        ids, mask = self._padded([prompt.tokens for prompt in block])
        states = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        states.last_hidden_state = states.last_hidden_state.repeat_interleave(count, 0)
        answers, _ = self._padded(
            [prompt.lead + choice[:-1] for prompt in block for choice in choices]
        )
        out = self.model(
            encoder_outputs=states,
            attention_mask=mask.repeat_interleave(count, 0),
            decoder_input_ids=answers,
            use_cache=False,
        )
        return _by_prompt(out.logits[:, start - 1 :], count)

    def _continued(self, block: list[_Prompt], choices: list[list[int]]) -> torch.Tensor:
        """Returns the same for a decoder-only model; a prompt's cache serves all its choices."""
        count = len(choices)
        ids, mask = self._padded([prompt.tokens for prompt in block], left=True)
        read = self._forward(ids, mask, ids.shape[1], logits_to_keep=1)
        logits: torch.Tensor = read.logits.unsqueeze(1).expand(-1, count, -1, -1)
        rest, _ = self._padded([choice[:-1] for choice in choices])
        if not rest.shape[1]:
            return logits
        cache = read.past_key_values
        cache.batch_repeat_interleave(count)
        rest = rest.repeat(len(block), 1)
        mask = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(rest)], 1)
        more = self._forward(rest, mask, rest.shape[1], past_key_values=cache).logits
        return torch.cat([logits, _by_prompt(more, count)], 2)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, last: int, **given: Any) -> Any:
        """Runs the last tokens of rows that are padded on the left."""
        if self._takes_positions:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -last:]
        return self.model(input_ids=ids, attention_mask=mask, use_cache=True, **given)

    # Decoding.

    def _write(self, block: list[_Prompt]) -> list[Result | ElementError]:
        ids, mask = self._padded([prompt.tokens for prompt in block], left=not self.encodes)
        given, start = {}, ids.shape[1]
        if self.encodes:
            given["decoder_input_ids"], _ = self._padded([prompt.lead for prompt in block])
            start = len(block[0].lead)
        writing = _Writing(self, block, start)
        numbers = _Numbers()
        written = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(prompt.part.max_tokens for prompt in block) or 1,
            stopping_criteria=[writing],
            logits_processor=[numbers],
            **given,
        )[:, start:].tolist()
        rows = zip(block, written, writing.counts, numbers.bad.tolist(), strict=True)
        return [
            _not_finite() if wrong else self.read(prompt, row[:count])
            for prompt, row, count, wrong in rows
        ]

    def read(self, prompt: _Prompt, written: list[int]) -> Result:
        """Returns the answer in the tokens written so far, without what follows its end."""
        part = prompt.part
        tokens = written[: part.max_tokens]
        ended = next((at for at, token in enumerate(tokens) if token in self._ends), None)
        if ended is not None:
            tokens = tokens[: ended + 1]
        text = self._said(prompt, tokens)
        stops = [at for stop in part.stop if (at := text.find(stop)) >= 0]
        by_itself = ended is not None or bool(stops)
        if stops:
            text = text[: min(stops)]
        if part.characters and len(text) > part.characters:
            text, by_itself = text[: part.characters], False
        return Result(len(prompt.tokens), text=text, cut=not by_itself, tokens=tuple(tokens))

    def _said(self, prompt: _Prompt, tokens: list[int]) -> str:
        """Returns the text of tokens after a prompt, with the space before it, if there is one."""
        before = prompt.lead[1:] if self.encodes else prompt.tokens[-1:]
        known, text = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (before, [*before, *tokens])
        )
        return str(text).removeprefix(known)


class _Writing(StoppingCriteria):
    """Ends each row by its own limits: tokens, characters and stop texts.

    `counts` has the tokens that each row has written; None if it has not ended here.
    """

    def __init__(self, engine: Engine, block: list[_Prompt], start: int):
        self.engine, self.block, self.start = engine, block, start
        self.counts: list[int | None] = [None] * len(block)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, self.start :].tolist()
        for at, (prompt, row) in enumerate(zip(self.block, rows, strict=True)):
            if self.counts[at] is None and self._ends(prompt, row):
                self.counts[at] = len(row)
        return torch.tensor([count is not None for count in self.counts], device=input_ids.device)

    def _ends(self, prompt: _Prompt, row: list[int]) -> bool:
        part = prompt.part
        if len(row) >= part.max_tokens:
            return True
        if not part.stop and not part.characters:
            return False  # nothing to look for in the text
        found = self.engine.read(prompt, row)
        return not found.cut or len(found.text) >= part.characters > 0


class _Numbers(LogitsProcessor):
    """Records the rows whose scores are not finite; softmax and argmax would hide it."""

    bad: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        bad = ~scores.max(-1).values.isfinite()
        self.bad = bad if self.bad is None else self.bad | bad
        return scores


def _by_prompt(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Turns [prompts * choices, tokens, vocabulary] into [prompts, choices, tokens, vocabulary]."""
    return logits.reshape(-1, count, *logits.shape[1:])


def _not_finite() -> ModelError:
    return ModelError(
        "not_finite", "the model's scores are not numbers; a wider --dtype may help (float32)"
    )
