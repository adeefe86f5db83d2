"""The texts that chatflow writes around a chat's words, in the languages of a prompt folder."""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from chatflow.choices.sentences import SPEAKERS
from chatflow.errors import UsageError

_DRAFTS = (
    "sorry", "sorry_for_this", "quotation", "conduct", "impact", "next_unread", "next_read",
    "next_settled",
)  # fmt: skip
_OPENINGS = ("resolved", "unresolved")


@dataclasses.dataclass(frozen=True)
class Words:
    """The fixed texts of one language.

    Attributes:
      speakers: names of `sentences.SPEAKERS`.
      openings: the sentences that say how a chat stands, `resolved` and `unresolved`.
      drafts: the sentences of drafts, by name.
      clauses: what follows "We are sorry that", by grievance.
      cues: what the customer's own words must say for the clause of a grievance.
    """

    language: str
    speakers: Mapping[str, str]
    openings: Mapping[str, str]
    drafts: Mapping[str, str]
    clauses: Mapping[str, str]
    cues: Mapping[str, Cue]


@dataclasses.dataclass(frozen=True)
class Cue:
    """A regular expression in alternatives, compiled at its first use: all take a second."""

    patterns: tuple[str, ...]

    @functools.cached_property
    def compiled(self) -> re.Pattern[str]:
        return re.compile("|".join(self.patterns), re.IGNORECASE)

    def search(self, text: str) -> re.Match[str] | None:
        return self.compiled.search(text)

    def __getstate__(self) -> dict[str, Any]:
        return {"patterns": self.patterns}


def words_of(
    sources: Mapping[str, str], folder: str, ours: Collection[str] = ()
) -> dict[str, Words]:
    """Returns the words by language from a prompt folder's files `words.LANGUAGE.toml`.

    Compiles the cues of all sources that are not `ours`, to find mistakes before anything runs.
    Raises `UsageError`, with file and entry, if one has a mistake.
    """
    found = {}
    for name, source in sources.items():
        if re.fullmatch(r"words\.[a-z]{2,3}\.toml", name):
            language = name.split(".")[1]
            found[language] = _words(language, source, f"{folder}/{name}")
            if source not in ours:
                _check_cues(found[language], f"{folder}/{name}")
    return found


@functools.lru_cache(maxsize=64)
def _words(language: str, source: str, where: str) -> Words:
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: {error}") from None
    speakers = _texts(data, "speakers", SPEAKERS, where)
    openings = _texts(data, "openings", _OPENINGS, where)
    drafts = _texts(data, "drafts", _DRAFTS, where)
    for name, placeholder in (("sorry", "{clause}"), ("quotation", "{quotation}")):
        if placeholder not in drafts[name]:
            raise UsageError(f"{where}: drafts.{name} must have {placeholder} in it")
    clauses, cues = {}, {}
    table = data.get("clauses", {})
    if not isinstance(table, dict):
        raise UsageError(f"{where}: clauses must be a table")
    for grievance, entry in table.items():
        said = entry.get("clause", "") if isinstance(entry, dict) else None
        patterns = entry.get("cues", []) if isinstance(entry, dict) else None
        if (
            not isinstance(said, str)
            or not isinstance(patterns, list)
            or not all(isinstance(pattern, str) for pattern in patterns)
        ):
            raise UsageError(
                f"{where}: clauses.{grievance} must have a text `clause` and a list of `cues`"
            )
        if unknown := entry.keys() - {"clause", "cues"}:
            raise UsageError(f"{where}: clauses.{grievance}: unknown {min(unknown)}")
        if said:
            clauses[grievance] = said
        if patterns:
            cues[grievance] = Cue(tuple(patterns))
    return Words(language, speakers, openings, drafts, clauses, cues)


def _check_cues(words: Words, where: str) -> None:
    for grievance, cue in words.cues.items():
        for pattern in (*cue.patterns, "|".join(cue.patterns)):  # all must fit together, too
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"{where}: clauses.{grievance}.cues: {pattern!r}: {error}"
                ) from None


def _texts(
    data: Mapping[str, Any], name: str, needed: tuple[str, ...], where: str
) -> dict[str, str]:
    table = data.get(name)
    if not isinstance(table, dict):
        raise UsageError(f"{where}: has no table [{name}]")
    for key in needed:
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise UsageError(f"{where}: {name}.{key} must be a text")
    return {key: str(value) for key, value in table.items()}
