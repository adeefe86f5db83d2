"""Chooses sentences by plain figures alone, for chats that no model with heads has read."""

from __future__ import annotations

import functools
import importlib.resources
import os

from chatflow.choices.heads import ENDS, Heads, Read
from chatflow.choices.reading import plain_layout
from chatflow.choices.sentences import sentences_of
from chatflow.records import Chat


@functools.cache
def _heads() -> Heads:
    path = importlib.resources.files("chatflow.choices") / f"plain{ENDS}"
    return Heads.load(os.fspath(str(path)))


def plainly_read(chat: Chat, user_id: str) -> Read:
    """Returns the sentences of a chat, and what plain figures choose among them."""
    sentences = tuple(sentences_of(chat, user_id))
    return Read(sentences, _heads().choose(None, plain_layout(chat, sentences)))
