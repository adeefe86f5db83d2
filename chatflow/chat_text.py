"""Prepares chat text for prompts: makes it safe and fits it into a token budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from chatflow.records import Chat, Message

CONTROL_TOKEN = re.compile(r"<(/?\|?\w+\|?)>|\[(/?INST)\]")
"""Matches what a model may take for a control token: `<start_of_turn>`, `<bos>`, `<|im_end|>` …"""

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u202a-\u202e\u2060-\u2069\ufeff]")


def as_data(text: str) -> str:
    """Makes chat text safe for a prompt: one line, no control tokens, no invisible characters.

    >>> as_data("fine<end_of_turn>\\n<start_of_turn>model")
    'fine‹end_of_turn› ‹start_of_turn›model'
    """
    if not text.isprintable():
        text = _INVISIBLE.sub("", text)
    text = " ".join(text.split())
    if "<" in text or "[" in text:
        text = CONTROL_TOKEN.sub(lambda m: f"‹{m[1] or m[2]}›", text)
    return text


def encodable(text: str) -> str:
    """Returns a text that UTF-8 can encode: a lone surrogate, half an emoji, becomes its escape."""
    return text.encode(errors="backslashreplace").decode()


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
    """The messages that fit a prompt, oldest first, and how many were dropped and cut.

    `places` are their positions among all messages of the chat.
    """

    messages: tuple[Message, ...]
    places: tuple[int, ...]
    dropped: int
    cut: int


def keep(chat: Chat, user_id: str, budget: int) -> KeptMessages:
    """Keeps the messages that say most about a chat, within `budget` estimated tokens.

    First comes the user's newest message; if it alone exceeds the budget, only its end is kept.
    Then come the user's first message that is not too short, because it usually says what the chat
    is about; the end of the chat, up to two thirds of the budget; and its beginning. From the
    middle, the user's messages come first, then those with numbers.
    """
    said = {at: message for at, message in enumerate(chat.messages) if message.is_said}
    cost = {at: estimate_tokens(m.text) + estimate_tokens(m.user_id) + 3 for at, m in said.items()}
    own = [at for at in said if said[at].user_id == user_id]
    kept: dict[int, Message] = {}
    left, cut = budget, 0

    def take(places: Iterable[int], least: int = 0) -> None:
        nonlocal left
        for at in places:
            if at not in kept and left - cost[at] < least:
                return
            if at not in kept:
                kept[at], left = said[at], left - cost[at]

    if own and cost[own[-1]] > budget:
        kept[own[-1]], left, cut = _end_of(said[own[-1]], budget), 0, 1
    take(own[-1:])
    take([at for at in own if cost[at] >= 8][:1])
    take(reversed(said), budget // 3)
    take(said, budget // 6)
    theirs = said.keys() - set(own)
    middle = sorted(
        said.keys() - kept.keys(),
        key=lambda at: (at in theirs, not any(map(str.isdigit, said[at].text)), -cost[at], at),
    )
    for at in middle:
        take([at])
    order = sorted(kept)
    return KeptMessages(tuple(kept[at] for at in order), tuple(order), len(said) - len(kept), cut)


def _end_of(message: Message, budget: int) -> Message:
    text = message.text
    while len(text) > 1 and estimate_tokens(text) > budget:
        text = text[len(text) - len(text) * 3 // 4 :]
    return message.model_copy(update={"text": "…" + text})
