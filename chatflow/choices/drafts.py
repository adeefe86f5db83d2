"""Composes an apology from approved clauses and the customer's own words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chatflow.choices.sentences import (
    AGENT,
    CUSTOMER,
    JUNK,
    MONEY,
    NEGATION,
    PRAISE,
    Sentence,
    content_words,
)
from chatflow.choices.words import Words, says
from chatflow.records import Flag

LONGEST_QUOTATION = 230


class Apology(NamedTuple):
    """An apology, or a flag that says why there is none.

    Attributes:
      grievances: what went wrong, the likeliest first.
      quoted: the sentences that it quotes, as indices.
    """

    text: str | None
    flag: Flag | None
    grievances: tuple[str, ...] = ()
    quoted: tuple[int, ...] = ()


def apology(
    sentences: Sequence[Sentence],
    words: Words,
    grievances: Mapping[str, float],
    evidence: np.ndarray | None = None,
    impact: np.ndarray | None = None,
    settled: float = 0.0,
) -> Apology:
    """Composes two to four sentences.

    Args:
      grievances: the probability of each, for the whole chat; may be empty.
      evidence, impact: of each sentence, the probability that it shows what went wrong, and that
        it says what this meant for the customer; None: judged by plain signs.
      settled: the probability that nothing is left to do.
    """
    mine = [at for at, s in enumerate(sentences) if s.speaker == CUSTOMER]
    score = _scores(sentences, mine, evidence)
    fit = quotable if evidence is not None else plainly_quotable
    usable = [at for at in mine if fit(sentences[at].text) and score[at] > LEAST_EVIDENCE]
    likely = sorted(grievances.items(), key=lambda pair: -pair[1])
    named = tuple(name for name, p in likely if p >= 0.3)[:3]
    if not usable:
        return Apology(None, "no_evidence", named)
    best = max(usable, key=lambda at: score[at])
    quoted = _with_neighbour(best, sentences, usable, score)
    quotation = _quotation([sentences[at] for at in quoted])
    everything = " ".join(sentences[at].text for at in mine)
    clause = clause_for(likely, words, quotation, everything)
    if clause is None:
        parts = [f"{words.drafts['sorry_for_this']} {_marked(words, quotation)}"]
    else:
        parts = [
            words.drafts["sorry"].format(clause=words.clauses[clause]),
            words.drafts["quotation"].format(quotation=quotation),
        ]
        named = (clause, *(name for name in named if name != clause))[:3]
    conduct = max(
        (grievances.get(name, 0.0) for name in ("rude_staff", "discrimination")), default=0
    )
    hurt = impact is not None and any(impact[at] > 0.6 for at in mine)
    if conduct > 0.5 and clause not in ("rude_staff", "discrimination"):
        parts.append(words.drafts["conduct"])
    elif hurt and settled < SETTLED:
        parts.append(words.drafts["impact"])
    answered = any(s.speaker == AGENT and s.message > sentences[best].message for s in sentences)
    closing = "next_read" if answered else "next_unread"
    parts.append(words.drafts["next_settled" if settled >= SETTLED else closing])
    return Apology(" ".join(parts), None, named, tuple(quoted))


LEAST_EVIDENCE, SETTLED = 0.15, 0.5
"""The least probabilities at which a sentence is quoted, and a matter counts as settled."""


def clause_for(
    likely: Sequence[tuple[str, float]], words: Words, quotation: str, everything: str
) -> str | None:
    """Returns the grievance whose clause the customer's own words bear out, or None."""
    for name, p in likely[:6]:
        cue = words.cues.get(name)
        sure = p > 0.2 and p > 0.5 * likely[0][1]
        if name in words.clauses and cue and sure and says(cue, quotation):
            return name
    for name, p in likely[:2]:
        cue = words.cues.get(name)
        sure = p > 0.5 and p > 0.7 * likely[0][1]
        if name in words.clauses and cue and sure and says(cue, everything):
            return name
    if not likely:  # nothing was read: use what the quotation says plainly
        hits = [
            name
            for name, cue in words.cues.items()
            if name in words.clauses and says(cue, quotation)
        ]
        return hits[0] if len(hits) == 1 else None
    return None


_UNFIT = re.compile(
    r"\b(?:i want|i would like|i['’]?d like|i expect|i demand|solicitor|lawyer|regulator|ombudsman|"
    r"tribunal|never (?:again|book|use|buy)|sue|court|pathetic|idiots?|liars?|thie(?:f|ves)|joke|"
    r"clowns?|wtf|ffs|bloody|damn|crap|shit\w*|fuck\w*|ridiculous|disgrace\w*|scam\w*|useless)\b",
    re.IGNORECASE,
)
_NO_EVIDENCE = re.compile(
    r"\b(?:please|last time|cancel my|review|thank\w*|cheers|compensation|shame|lovely|brilliant|"
    r"wonderful|congratulations|well done|great job|just checking|presumably)\b",
    re.IGNORECASE,
)
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
_HANGING = re.compile(
    r"^(?:no|nope|yes|yeah|yep|so|and|but|ok|okay|or|well|also|then|it|its|it['’]s|this|that|that['’]s|they|he|she|"
    r"which|because)\b",
    re.IGNORECASE,
)
_STRONG = re.compile(
    r"\b(?:third|second|twice|again|still|nobody|no ?one|never|weeks?|months?|days?|hours?|"
    r"you (?:took|told|said|cancelled|charged|sent|promised|closed|lost|gave|moved|refused|cut)|"
    r"your (?:driver|agent|crew|shop|courier|technician|system|app|colleague|man|people|staff))\b",
    re.IGNORECASE,
)


def quotable(text: str) -> bool:
    """Returns whether an apology can repeat a sentence: no questions, demands, insults, footers."""
    return (
        8 <= len(text) <= LONGEST_QUOTATION
        and not text.rstrip("\"'”’)").endswith("?")
        and not text.lstrip().startswith(">")
        and not JUNK.search(text)
        and not _EMOJI.search(text)
        and not _UNFIT.search(text)
    )


def plainly_quotable(text: str) -> bool:
    """Returns whether a sentence is also not a request or praise, and says something by itself."""
    return (
        quotable(text)
        and len(text) >= 18
        and len(content_words(text)) >= 3
        and not _NO_EVIDENCE.search(text)
        and not PRAISE.search(text)
    )


def _scores(
    sentences: Sequence[Sentence], mine: Sequence[int], evidence: np.ndarray | None
) -> np.ndarray:
    """Returns how well each sentence shows what went wrong."""
    if evidence is not None:
        return evidence
    score = np.zeros(len(sentences))
    for at in mine:
        text = sentences[at].text
        score[at] = (
            0.2
            + 0.1 * min(2, len(NEGATION.findall(text)))
            + 0.12 * min(2, len(_STRONG.findall(text)))
            + 0.05 * bool(MONEY.search(text))
            - 0.15 * bool(_HANGING.match(text))
        )
    return score


def _with_neighbour(
    best: int, sentences: Sequence[Sentence], usable: Sequence[int], score: np.ndarray
) -> list[int]:
    """Returns the best sentence, and another one if that says how bad it is.

    The other one is next to it in its message or, if the best one is short, the next best.
    """
    for beside in (best + 1, best - 1):
        if (
            beside in usable
            and sentences[beside].message == sentences[best].message
            and score[beside] > max(0.3, 0.5 * score[best])
            and len(sentences[beside].text) + len(sentences[best].text) < LONGEST_QUOTATION
        ):
            return sorted((best, beside))
    others = [at for at in usable if at != best and score[at] >= SECOND]
    if len(sentences[best].text) < SHORT and others:
        return sorted((best, max(others, key=lambda at: score[at])))
    return [best]


SECOND, SHORT = 0.4, 45
"""The least probability of a second quotation; the characters below which a first one is short."""


_GREETING = re.compile(
    r"^(?:(?:(?:hi|hello|hey|hiya|good (?:morning|afternoon|evening))"
    r"(?: (?:there|all|team|everyone))?|bon(?:jour|soir)|hola|buen[oa]s(?: (?:d[ií]as|tardes|"
    r"noches))?|ol[áa]|bom dia|boa (?:tarde|noite)|ciao|salve|buon(?:giorno|asera)|hallo|beste|"
    r"goede(?:morgen|middag|navond)|moin|guten (?:tag|morgen|abend))[,.!:;–-]*|"
    r"(?:dear [^,.]{2,30}|no|nope|yes|yeah|well|so|ok|okay|look|listen|sorry|mate|and|but|oh|right|"
    r"again|fyi|as i said|donc|pues|entonces|allora|dus)[,.!:;–-]+)\s+(?=\w)",
    re.IGNORECASE,
)


def _quotation(sentences: Sequence[Sentence]) -> str:
    """Returns sentences as they are quoted: without a greeting, with a stop at the end."""
    texts = [_GREETING.sub("", " ".join(sentence.text.split())) for sentence in sentences]
    apart = sentences[0].message != sentences[-1].message
    text = " … ".join(text.rstrip(" .,;:-–—") for text in texts) if apart else " ".join(texts)
    for mark in "“”«»„":
        text = text.replace(mark, '"')
    if text.count('"') % 2:
        text = text.replace('"', "")
    text = text.rstrip(" ,;:-–—")
    return text if text[-1:] in '.!?…")' else f"{text}."


def _marked(words: Words, quotation: str) -> str:
    """Returns a quotation in the marks of its language."""
    sentence = words.drafts["quotation"]
    at = sentence.index("{quotation}")
    before = sentence[:at].rpartition(" ")[2] if not sentence[:at].endswith(" ") else ""
    after = sentence[at + len("{quotation}") :]
    return f"{before}{quotation}{after}".strip()
