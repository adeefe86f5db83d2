"""Computes an evaluation's figures as one dictionary for tables, page, JSON and history."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from chatflow.evaluation.checks import Checked, apologises, check_text, totals
from chatflow.evaluation.escalation import escalation
from chatflow.evaluation.labels import Label, words_of
from chatflow.evaluation.measures import (
    Confusion,
    calibration,
    compare,
    intervals,
    name_of,
)
from chatflow.evaluation.points import told, totals_of
from chatflow.evaluation.variants import Judged, Ran
from chatflow.models.requests import Part
from chatflow.prompts.truth import promises
from chatflow.records import Sentiment

LENGTHS = {"up to 20 words": 20, "21 to 60 words": 60, "more than 60 words": 10**9}
"""Groups of chats by how many words the labelled user wrote, with each group's maximum."""

_RUN = (
    "seconds", "chats_per_second", "prompt_tokens", "answer_tokens", "cost_usd", "dead_letters",
    "lost",
)  # fmt: skip


def figures(ran: Ran, first: Ran | None = None) -> dict[str, Any]:
    """Returns all figures of a variant, and its comparison with `first` if that is given."""
    all_judged = list(ran.judged.values())
    planned = ran.variant.planned
    prompts = planned.first if planned else None
    found = {
        "name": ran.variant.name,
        "model": ran.variant.model,
        "flags": planned.options.flags() if planned else [],
        "prompt_versions": {
            kind: getattr(getattr(prompts, kind, None), "version", "")
            for kind in ("analysis", "draft")
        },
        "chats": len(all_judged),
        **{name: of.to_dict() for name, of in intervals(_pairs(all_judged)).items()},
        **Confusion.of(_pairs(all_judged)).to_dict(),
        "calibration": _calibration(all_judged),
        "answers": _answers(all_judged),
        "summaries": _summaries(ran) if planned else None,
        "drafts": _drafts(ran) if planned else None,
        "told": _told(ran) if planned else None,
        "escalation": escalation(all_judged),
        "run": {name: ran.counts.get(name) for name in _RUN},
        "sources": _groups(all_judged, lambda label: label.source or "(no source)"),
        "lengths": _groups(all_judged, length_of, list(LENGTHS)),
        "wrong": [wrong(judged) for judged in all_judged if not judged.right],
    }
    if first is not None:
        found["against_first"] = compare(
            [judged.label.sentiment for judged in all_judged],
            [first.judged[key].answer for key in ran.judged],
            [judged.answer for judged in all_judged],
        ).to_dict()
    return found


def length_of(label: Label) -> str:
    words = len(words_of(label.own_text))
    return next(name for name, most in LENGTHS.items() if words <= most)


def _pairs(all_judged: Iterable[Judged]) -> list[tuple[Sentiment, Sentiment | None]]:
    return [(judged.label.sentiment, judged.answer) for judged in all_judged]


def _calibration(all_judged: Iterable[Judged]) -> dict[str, Any] | None:
    sure = [(j.confidence, j.right) for j in all_judged if j.confidence is not None]
    found = calibration(sure)
    return found.to_dict() if found else None


def _answers(all_judged: Sequence[Judged]) -> dict[str, Any]:
    mended = sum(bool(j.analysis and j.analysis.repairs) for j in all_judged)
    none = [j.unanswered for j in all_judged if j.answer is None]
    count = len(all_judged)
    return {
        "asked": count,
        "at_once": count - mended - len(none),
        "repaired": mended,
        "none": len(none),
        "reasons": dict(collections.Counter(none)),
        "valid": round(1 - len(none) / count, 4),
    }


def _groups(
    all_judged: Iterable[Judged], group: Callable[[Label], str], order: Sequence[str] = ()
) -> dict[str, Any]:
    groups: dict[str, list[Judged]] = collections.defaultdict(list)
    for judged in all_judged:
        groups[group(judged.label)].append(judged)
    made = {}
    for name in order or sorted(groups):
        if name in groups:
            confusion = Confusion.of(_pairs(groups[name]))
            made[name] = {
                "chats": confusion.total,
                "accuracy": round(confusion.accuracy, 4),
                "macro_f1": round(confusion.macro_f1, 4),
                # Undefined for a group without angry chats.
                "angry_recall": round(confusion.recall(Sentiment.ANGRY), 4)
                if confusion.labelled(Sentiment.ANGRY)
                else None,
            }
    return made


def identity(judged: Judged) -> dict[str, str]:
    return {"chat_id": judged.label.chat.chat_id, "user_id": judged.label.user_id}


def wrong(judged: Judged) -> dict[str, Any]:
    return {
        **identity(judged),
        "label": name_of(judged.label.sentiment),
        "answer": name_of(judged.answer),
        "confidence": judged.confidence,
    }


def _asked(ran: Ran, judged: Judged, of_draft: bool) -> Sequence[Part]:
    """Returns the parts of the question that a chat's summary, or its draft, answers."""
    assert ran.variant.planned is not None
    prompts = ran.variant.planned.first
    prompt = (prompts.draft if of_draft else prompts.analysis).of(judged.label.chat)
    analysis = judged.analysis if of_draft else None
    question = prompt.question(judged.label.chat, judged.label.user_id, analysis)
    return question.request.parts


def _summaries(ran: Ran) -> dict[str, Any]:
    everything, own, offenders = [], [], []
    for judged in ran.judged.values():
        if (analysis := judged.analysis) is None:
            continue
        # A composed summary is the chat's own text and does not answer a question.
        by_model = analysis.summary_source == "model"
        asked = _asked(ran, judged, False) if by_model else ()
        checked = check_text(analysis.summary, judged.label.chat, asked)
        everything.append(checked)
        if by_model:
            own.append(checked)
        if problems := _problems(checked):
            offenders.append({**identity(judged), **problems, "text": analysis.summary})
    return {
        "by_model": len(own),
        "composed": len(everything) - len(own),
        "all": totals(everything),
        "models_own": totals(own),
        "offenders": offenders,
    }


def _told(ran: Ran) -> dict[str, Any] | None:
    """Returns how much the texts tell of what the labels ask for, if they ask for anything."""
    assert ran.variant.planned is not None
    found = []
    for judged in ran.judged.values():
        prompt = ran.variant.planned.first.analysis.of(judged.label.chat)
        openings = {
            text: {"resolved": "yes", "unresolved": "no"}[state]
            for words in prompt.words.values()
            for state, text in words.openings.items()
        }
        draft = judged.draft.text or "" if judged.draft else ""
        label = judged.label
        found.append(told(label.labels, label.chat, judged.analysis, draft, openings))
    return totals_of(found)


def _drafts(ran: Ran) -> dict[str, Any]:
    texts, offenders, promising, sorry = [], [], 0, 0
    undrafted: collections.Counter[str] = collections.Counter()
    for judged in ran.judged.values():
        if judged.undrafted:
            undrafted[judged.undrafted] += 1
        if judged.draft is None or not (text := judged.draft.text):
            continue
        checked = check_text(text, judged.label.chat, _asked(ran, judged, True))
        texts.append(checked)
        promised, apology = promises(text), apologises(text)
        promising, sorry = promising + bool(promised), sorry + apology
        problems = {
            **({} if apology else {"no_apology": True}),
            **({"promises": promised} if promised else {}),
            **_problems(checked),
        }
        if problems:
            offenders.append({**identity(judged), **problems, "text": text})
    return {
        "asked": len(texts) + undrafted.total(),
        "drafted": len(texts),
        "not_drafted": dict(undrafted),
        "apologise": sorry,
        "promise": promising,
        **totals(texts),
        "offenders": offenders,
    }


def _problems(checked: Checked) -> Mapping[str, Any]:
    """Returns what is in a text but not in its chat, by name, and whether it copies its prompt."""
    found = {
        "ungrounded": list(checked.ungrounded),
        "names": list(checked.names),
        "numbers": list(checked.numbers),
        "copies_prompt": checked.copies_prompt,
    }
    return {name: value for name, value in found.items() if value}
