"""Checks automatically whether summaries and drafts are about their chat.

The checks show where to look, not whether a text is good: a word that is not in the chat may be a
synonym, and a sentence in the chat's own words may still confuse who did what.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from chatflow.evaluation.labels import words_of
from chatflow.models.requests import Part
from chatflow.prompts.answers import content_words, copies_template, without_users
from chatflow.prompts.truth import unsaid_names, unsaid_numbers
from chatflow.records import Chat

APOLOGY = re.compile(r"\b(?:sorry|apolog\w+)", re.IGNORECASE)

_POSSESSIVE = re.compile(r"['’]s\b")


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the checks found in a text about a chat.

    Attributes:
      words, copied: number of its words, and of those in the longest run that one message has.
      content: number of its content words; see `prompts.answers.content_words`.
      ungrounded, names, numbers: content words, names and numbers that are not in the chat. A name
        is a capitalised word that does not begin a sentence.
      copies_prompt: whether most of it is in the instructions and examples of its prompt.
    """

    text: str
    words: int
    copied: int
    content: int
    ungrounded: tuple[str, ...]
    names: tuple[str, ...]
    numbers: tuple[str, ...]
    copies_prompt: bool

    @property
    def only_copied(self) -> bool:
        return 0 < self.words == self.copied


def check_text(text: str, chat: Chat, asked: Sequence[Part] = ()) -> Checked:
    """Compares a summary or a draft with its chat; `asked`: the parts of the request it answers.

    Leaves out the text that the template itself adds at both ends, and the ids of the chat's users.
    """
    written = text
    for part in asked:
        if part.lead and written.startswith(part.lead):
            written = "," + written.removeprefix(part.lead)  # so that no sentence begins here
        written = written.removesuffix(part.tail)
    written = without_users(_POSSESSIVE.sub("", written), chat)
    messages = [_POSSESSIVE.sub("", m.text) for m in chat.said]
    known = "\n".join(messages)
    content, words = content_words(written), words_of(written)
    known_content, known_words = set(content_words(known)), set(words_of(known))
    return Checked(
        text=text,
        words=len(words),
        copied=longest_copy(words, messages),
        content=len(content),
        ungrounded=tuple(word for word in content if word not in known_content),
        names=tuple(unsaid_names(written, lambda: known_words)),
        numbers=tuple(unsaid_numbers(written, known)),
        copies_prompt=any(copies_template(written, part.prompt, chat) for part in asked),
    )


def longest_copy(words: Sequence[str], messages: Iterable[str]) -> int:
    """Returns how many words the longest run of `words` has that occurs in one message."""
    texts = [f" {' '.join(words_of(message))} " for message in messages]
    longest = 0
    for start in range(len(words)):
        while start + longest < len(words):
            run = f" {' '.join(words[start : start + longest + 1])} "
            if not any(run in text for text in texts):
                break
            longest += 1
    return longest


def apologises(text: str) -> bool:
    return bool(APOLOGY.search(text))


def totals(texts: Sequence[Checked]) -> dict[str, Any]:
    """Returns the findings of several texts together; shares are 0 to 1, lengths characters."""
    count = max(len(texts), 1)
    lengths = [len(checked.text) for checked in texts]
    return {
        "texts": len(texts),
        "characters_mean": round(sum(lengths) / count, 1),
        "characters_longest": max(lengths, default=0),
        "ungrounded": round(
            sum(len(c.ungrounded) for c in texts) / max(sum(c.content for c in texts), 1), 4
        ),
        "copied_words_mean": round(sum(c.copied for c in texts) / count, 2),
        "only_copied": round(sum(c.only_copied for c in texts) / count, 4),
        "with_names": sum(bool(c.names) for c in texts),
        "with_numbers": sum(bool(c.numbers) for c in texts),
        "copies_of_prompt": sum(c.copies_prompt for c in texts),
    }
