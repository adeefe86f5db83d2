"""Reads the choices that a prompt folder declares in `choices.toml`.

A choice is one of some values, or all that apply, over a chat, its messages or its sentences:

    [topic]
    over = "chat"                  # or "message", "sentence"
    kind = "one"                   # or "all": each value by itself
    by = "head"                    # or "suffix": asked after the chat, without labels
    even = true                    # a head learns rare values as well as frequent ones
    ask = "The chat is about"      # for "suffix": how the model begins to say it
    [topic.values]                 # each with what it means; "suffix" scores their first words
    refund = "money back"
    delivery = "a parcel on its way"

`tone` is one of them: over the chat, one of the words of `tones`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping

from chatflow.choices.heads import CHAT, KINDS, ONE, OVER
from chatflow.errors import UsageError

NAME = "choices.toml"
HEAD, SUFFIX = DECIDED_BY = ("head", "suffix")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice; `values` has what each means, `ask` what the model begins to say for a suffix."""

    name: str
    over: str
    kind: str
    by: str
    values: Mapping[str, str]
    ask: str = ""
    even: bool = True


def choices_of(sources: Mapping[str, str], folder: str) -> tuple[Choice, ...]:
    """Returns the choices of a prompt folder; raises `UsageError` with file, choice and entry."""
    if NAME not in sources:
        return ()
    where = f"{folder}/{NAME}"
    try:
        data = tomllib.loads(sources[NAME])
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: {error}") from None
    return tuple(_choice(name, entry, f"{where}: {name}") for name, entry in data.items())


def _choice(name: str, entry: object, where: str) -> Choice:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: must be a table [{name}] with values")
    known = {"over": CHAT, "kind": ONE, "by": HEAD, "ask": "", "even": True, "values": {}}
    if unknown := entry.keys() - known.keys():
        raise UsageError(f"{where}: unknown {min(unknown)}; known are {', '.join(known)}")
    entry = {**known, **entry}
    for key, allowed in (("over", OVER), ("kind", KINDS), ("by", DECIDED_BY)):
        if entry[key] not in allowed:
            raise UsageError(f"{where}.{key}: must be {' or '.join(allowed)}; found {entry[key]!r}")
    values = entry["values"]
    if (
        not isinstance(values, dict)
        or len(values) < (2 if entry["kind"] == ONE else 1)
        or not all(isinstance(meaning, str) for meaning in values.values())
    ):
        raise UsageError(f"{where}.values: must list values with what each means; at least two")
    if entry["by"] == SUFFIX and (
        entry["over"] != CHAT or entry["kind"] != ONE or not entry["ask"]
    ):
        raise UsageError(
            f'{where}: by = "suffix" needs over = "chat", kind = "one" and `ask`: how the model '
            "begins to say it"
        )
    if not isinstance(entry["even"], bool):
        raise UsageError(f"{where}.even: must be true or false")
    return Choice(
        name, entry["over"], entry["kind"], entry["by"], values, entry["ask"], entry["even"]
    )
