"""Finds the language in which people write."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

SURE, LETTERS, GUESSED = 0.9, 25, 10
"""The least probability and number of characters to accept a language at once; the least number of
characters to guess one."""


@functools.cache
def _identifier() -> Any:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language_of(
    texts: Sequence[str], declared: str = "", around: Sequence[str] = (), usual: Sequence[str] = ()
) -> str:
    """Returns the ISO 639-1 code of a language, "" if there are too few words to tell.

    Args:
      texts: what somebody wrote.
      declared: what the chat's attributes say; used if there are few words.
      around: what others wrote in the same chat; used if there are few words.
      usual: the languages to guess from, if nothing is sure.
    """
    declared, likeliest, text = declared.lower()[:2], "", ""
    for some in (texts, [*texts, *around]):
        text = " ".join(" ".join(some).split())[:2000]
        if any(map(str.isalpha, text)):
            found, probability = _identifier().classify(text)
            if probability >= SURE and len(text) >= LETTERS:
                return str(found)
            if declared:
                return declared
            if len(text) >= GUESSED:
                ranks = _identifier().rank(text)
                likeliest = next((str(code) for code, _ in ranks if code in usual), "")
    return declared or likeliest
