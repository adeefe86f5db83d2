"""Prepares chat text for prompts: makes it safe and fits it into a token budget."""

from __future__ import annotations

import dataclasses
import re

from chatflow.records import Chat, Message

CONTROL_TOKEN = re.compile(r"<(/?\|?\w+\|?)>|\[(/?INST)\]")
"""Matches what a model may take for a control token: `<start_of_turn>`, `<bos>`, `<|im_end|>` …"""

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u202a-\u202e\u2060-\u2069\ufeff]")


def as_data(text: str) -> str:
    """Makes chat text safe for a prompt: one line, no control tokens, no invisible characters.

    >>> as_data("fine<end_of_turn>\\n<start_of_turn>model")
    'fine‹end_of_turn› ‹start_of_turn›model'
    """
    text = " ".join(_INVISIBLE.sub("", text).split())
    return CONTROL_TOKEN.sub(lambda m: f"‹{m[1] or m[2]}›", text)


_PIECE = re.compile(r"[^\W\d_]{1,5}|\d|[^\w\s]|_")


def estimate_tokens(text: str) -> int:
    """Estimates the number of tokens in a text; rarely fewer than a Gemma tokenizer makes.

    Gemma makes one token of each digit and of most words of up to five letters. In scripts other
    than Latin, every letter is counted.
    """
    wide = 0 if text.isascii() else sum(character > "\u02ff" for character in text)
    return len(_PIECE.findall(text)) + wide


@dataclasses.dataclass(frozen=True)
class KeptMessages:
    """The messages that fit a prompt, oldest first; how many were dropped and how many cut."""

    messages: tuple[Message, ...]
    dropped: int
    cut: int


def keep_newest(chat: Chat, user_id: str, budget: int) -> KeptMessages:
    """Keeps the newest messages of a chat within `budget` estimated tokens.

    Half of the budget is for the user's own messages, so that a user who wrote long ago is still
    heard. The user's newest message always stays; if it alone exceeds the budget, its end stays.
    """
    said = chat.said
    cost = [estimate_tokens(m.text) + estimate_tokens(m.user_id) + 3 for m in said]
    newest_first = range(len(said) - 1, -1, -1)
    own = [i for i in newest_first if said[i].user_id == user_id]
    kept: dict[int, Message] = {}
    left = budget
    for i in own:
        if left - cost[i] < budget // 2:
            break
        kept[i], left = said[i], left - cost[i]
    cut = 0
    if own and not kept:
        message = said[own[0]]
        if cost[own[0]] <= budget:
            kept[own[0]], left = message, left - cost[own[0]]
        else:
            kept[own[0]], left, cut = _end_of(message, budget), 0, 1
    for i in newest_first:
        if i in kept:
            continue
        if cost[i] > left:
            break
        kept[i], left = said[i], left - cost[i]
    messages = tuple(kept[i] for i in sorted(kept))
    return KeptMessages(messages, len(said) - len(messages), cut)


def _end_of(message: Message, budget: int) -> Message:
    text = message.text
    while len(text) > 1 and estimate_tokens(text) > budget:
        text = text[len(text) - len(text) * 3 // 4 :]
    return message.model_copy(update={"text": "…" + text})
