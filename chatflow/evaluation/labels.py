"""Labelled chats: reads how their customers feel, and finds near copies of other chats."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chatflow.errors import UsageError
from chatflow.records import Arrival, Chat, Sentiment, load_object
from chatflow.sources.chats import USUAL, Customs, read_chat
from chatflow.sources.formats.objects import as_ours
from chatflow.sources.lines import whole

TONES = {"angry": -1, "neutral": 0, "happy": 1}
"""What the words of `labels.tone` stand for, as in chatflow's own prompts."""

Key = tuple[str, str]
"""(chat, user): what an analysis, and so a label, is about."""


@dataclasses.dataclass(frozen=True)
class Label:
    """A person's label for how the user of a chat feels.

    Attributes:
      source: where the chat comes from, e.g. `tweets`; empty if the file does not say.
      labels: what else the file says of the chat; see `evaluation.choosing` and `.points`.
    """

    sentiment: Sentiment
    source: str
    chat: Chat
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def user_id(self) -> str:
        return self.chat.users()[0]

    @property
    def own_text(self) -> str:
        """Returns what the user wrote, one message per line."""
        return "\n".join(self.chat.texts_of(self.user_id))


def read_labels(path: str, customs: Customs = USUAL) -> dict[Key, Label]:
    """Returns the labels of a file of chats by (chat, user), without those that have none.

    Raises:
      UsageError: the file cannot be read or has no label, or a chat's is unusable; names the line.
    """
    labels: dict[Key, Label] = {}
    places: dict[Key, str] = {}
    for arrival in whole(path, customs=customs):
        where = arrival.source.replace(", line ", ":")
        try:
            found = [*_labels_in(arrival, customs)]
        except Exception as error:  # any error of the parser must name its line
            raise UsageError(f"{where}: {error}") from None
        for label in found:
            if len(label.chat.users()) != 1:
                raise UsageError(f"{where}: has a label and several customers; give user_id")
            key = label.chat.chat_id, label.user_id
            if key in places:
                earlier = places[key].replace(f"{path}:", "line ")
                raise UsageError(f"{where}: the same chat and user as in {earlier}")
            labels[key], places[key] = label, where
    if not labels:
        raise UsageError(
            f"{path!r} has no chat with a label; a label is the field sentiment, or tone in "
            "labels; in a table, the column sentiment"
        )
    return labels


def _labels_in(arrival: Arrival, customs: Customs) -> Iterator[Label]:
    """Yields the labels of a chat, or of those that an object of another format holds."""
    value = load_object(arrival.line)
    if value.get("chat_id") is None and "row" in value:
        raise ValueError(value.get("error"))
    found = as_ours(value, arrival.name, customs.format)
    for one in found.values if found else [value]:
        chat = read_chat(one, customs)
        about = {**value, **one} if found and len(found.values) == 1 else one
        gold = {**about.get("gold", {}), **about.get("labels", {})}
        tone = about.get("sentiment", gold.get("sentiment", TONES.get(str(gold.get("tone")))))
        if tone is None and ", row " in arrival.source:  # other columns are attributes
            word = chat.attributes.get("sentiment")
            tone = word and TONES.get(word.strip().casefold(), word)
        if tone is not None:
            number: Any = float(tone) if isinstance(tone, str) else tone
            begins = str(about.get("source", "")).split("-")[0]
            yield Label(Sentiment(number), begins, chat, gold)


class NearCopy(NamedTuple):
    """A chat that shares text with another: `share` of the smaller's distinct five-word runs."""

    chat_id: str
    other_id: str
    share: float


RUN_WORDS, LEAST_RUNS, LEAST_SHARE, MESSAGE_WORDS = 5, 3, 0.2, 8


def near_copies(chats: Iterable[Chat], others: Iterable[Chat]) -> list[NearCopy]:
    """Returns which of `chats` share text with any of `others`, each with the most similar one.

    Two chats are near copies if both have at least 3 distinct runs of five words that are at least
    20 % of the smaller chat's, or the same message of at least 8 words, or the same whole text.
    Case and punctuation do not count.
    """
    ids, sizes = [], []
    having_run: dict[tuple[str, ...], list[int]] = defaultdict(list)
    having_message: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, other in enumerate(others):
        runs, messages = _runs_and_messages(other)
        ids.append(other.chat_id)
        sizes.append(len(runs))
        for run in runs:
            having_run[run].append(index)
        for message in messages:
            having_message[message].append(index)
    # Arrays, because a run that many chats have, e.g. a greeting, is slow to count otherwise.
    places = {run: np.array(indices) for run, indices in having_run.items()}
    other_sizes = np.array(sizes)
    found = []
    for chat in chats:
        runs, messages = _runs_and_messages(chat)
        same_message = [index for message in messages for index in having_message.get(message, ())]
        seen = [places[run] for run in runs if run in places]
        if not seen and not same_message:
            continue
        shared = np.bincount(np.concatenate(seen) if seen else [], minlength=len(ids))
        share = shared / np.maximum(np.minimum(other_sizes, len(runs)), 1)
        near = (shared >= LEAST_RUNS) & (share >= LEAST_SHARE)
        near[same_message] = True
        if near.any():
            best = int(np.argmax(np.where(near, share, -1)))
            found.append(NearCopy(chat.chat_id, ids[best], round(float(share[best]), 4)))
    return found


def _runs_and_messages(
    chat: Chat,
) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Returns a chat's five-word runs; and its messages of at least 8 words, and its whole text."""
    runs: set[tuple[str, ...]] = set()
    messages: set[tuple[str, ...]] = set()
    said = [words_of(message.text) for message in chat.said]
    if any(said):
        messages.add(tuple(itertools.chain.from_iterable(said)))
    for words in said:
        runs.update(zip(*(words[start:] for start in range(RUN_WORDS)), strict=False))
        if len(words) >= MESSAGE_WORDS:
            messages.add(tuple(words))
    return runs, messages


def words_of(text: str) -> Sequence[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower().replace("'", "").replace("’", ""))
