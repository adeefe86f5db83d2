"""Compares texts with what the labels of their chats say that they should tell.

A chat may have, in `labels`: `key_points`, a list of sentences that a good summary tells; `part`,
the pieces that it could quote (see `evaluation.choosing`); `resolved`; and `must_not_promise`, what
a draft must not promise. A key point counts as told if the summary has at least `POINT_TOLD`
of its content words and numbers, a piece if at least `TOLD` of its characters are quoted, or of its
words said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chatflow.prompts.answers import content_words
from chatflow.prompts.truth import promises
from chatflow.records import Analysis, Chat, Quotation

POINT_TOLD, TOLD = 0.25, 0.5
"""The share of a key point's words, and of a piece's, from which it counts as told.

Of 298 key points on which two readers agreed, the first agrees with them on 80 %.
"""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a chat's texts tell of what they should.

    Attributes:
      points: of each key point, whether it is told.
      parts: of each labelled piece, its part and whether it is told.
      opening: whether the summary says the chat is resolved, `yes`, `no` or "", and if it is right.
      promised: what the draft promises, or mentions although it must not.
    """

    points: tuple[bool, ...] = ()
    parts: tuple[tuple[str, bool], ...] = ()
    opening: tuple[str, bool] = ("", True)
    promised: tuple[str, ...] = ()


def told(
    labels: Mapping[str, Any],
    chat: Chat,
    analysis: Analysis | None,
    draft: str = "",
    openings: Mapping[str, str] | None = None,
) -> Told:
    """Compares a summary and a draft with the labels of their chat.

    Args:
      openings: the sentences with which summaries say how a chat stands, and what each says.
    """
    summary = analysis.summary if analysis else ""
    quoted = analysis.quotations if analysis else ()
    said = set(content_words(summary))
    opening = next((s for text, s in (openings or {}).items() if summary.startswith(text)), "")
    resolved: Any = labels.get("resolved")
    state = {True: "yes", False: "no"}.get(resolved, resolved)
    return Told(
        tuple(is_told(point, said, POINT_TOLD) for point in labels.get("key_points", ())),
        tuple(
            (str(piece["value"]), _is_quoted(piece, chat, quoted) or is_told(piece["text"], said))
            for piece in labels.get("part", ())
        ),
        (opening, not opening or state is None or opening == state),
        (*promises(draft), *_held_out(draft, labels.get("must_not_promise", ()))),
    )


def is_told(point: str, said: set[str], least: float = TOLD) -> bool:
    words = set(content_words(point))
    return bool(words) and len(words & said) >= least * len(words)


def _is_quoted(piece: Mapping[str, Any], chat: Chat, quoted: Iterable[Quotation]) -> bool:
    whole = chat.messages[piece["message"]].text
    start = whole.find(piece["text"])
    wanted = set(range(start, start + len(piece["text"]))) if start >= 0 else set()
    found: set[int] = set()
    for quotation in quoted:
        if quotation.message == piece["message"]:
            at = whole.find(quotation.text)
            found |= set(range(at, at + len(quotation.text)))
    return bool(wanted) and len(wanted & found) >= TOLD * len(wanted)


def _held_out(draft: str, forbidden: Sequence[str]) -> Iterable[str]:
    said = set(content_words(draft))
    for text in forbidden:
        words = set(content_words(text))
        if words and words <= said:
            yield text


def totals_of(all_told: Sequence[Told]) -> dict[str, Any] | None:
    """Returns the shares over all chats; None if no chat has such labels."""
    points = [found for one in all_told for found in one.points]
    parts = [(part, found) for one in all_told for part, found in one.parts]
    if not points and not parts:
        return None
    opened = [right for one in all_told for state, right in [one.opening] if state]
    names = list(dict.fromkeys(part for part, _ in parts))
    return {
        "key_points": len(points),
        "key_points_told": _share(points),
        "parts_told": {n: _share([found for part, found in parts if part == n]) for n in names},
        "openings": len(opened),
        "false_openings": opened.count(False),
        "promising": sum(bool(one.promised) for one in all_told),
    }


def _share(found: Sequence[bool]) -> float | None:
    return round(sum(found) / len(found), 4) if found else None
