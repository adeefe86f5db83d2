"""Divides a chat into sentences, with who says each, and describes them in plain figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chatflow.records import Chat, Message

CUSTOMER, OTHER, AGENT, BOT, SOMEBODY = SPEAKERS = (
    "Customer", "Other customer", "Agent", "Bot", "Other",
)  # fmt: skip
"""Who speaks: the user whose tone is asked for, and the others by their roles."""


class Sentence(NamedTuple):
    """A sentence of a chat.

    Attributes:
      message: index of its message among `Chat.messages`.
      start, end: its characters in the message's text.
      number, siblings: which sentence of its message it is, and how many the message has.
    """

    message: int
    start: int
    end: int
    text: str
    speaker: str
    number: int
    siblings: int


_END = re.compile(
    r"(?<=[.!?…。！？])[\"')”’»]*\s+|(?<=[。！？])|\s*\n\s*|"
    r"\s+(?=[-*•–] )|(?<=[\U0001F300-\U0001FAFF\u2600-\u27bf\ufe0f])\s+(?=[A-ZÄÖÜÉÀ])"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[^\W\d_]|mr|mrs|ms|dr|prof|st|art|ref|tel|approx|ca|incl|inkl|excl|"
    r"vs|etc|e\.g|i\.e|z\.\s?b|bzw|ggf|evtl|usw|str|sr|sra|sig|dott|av|n|p\.\s?ej|p\.\s?ex|c\.\s?a|"
    r"bijv|ed|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|wed|thu|fri)\.$",
    re.IGNORECASE,
)

_NUMBER = re.compile(r"(?:^|[\s(])(?:no|nos|nr|num|tel|part|ref)\.$", re.IGNORECASE)
_DATE = re.compile(r"\d\.\d{1,2}\.$")
_MONTH = re.compile(
    r"(?<=\d\. )(?:jan|feb|mär|mar|apr|mai|may|jun|jul|aug|sep|okt|oct|nov|dez|dec)", re.IGNORECASE
)


def spans(text: str) -> list[tuple[int, int]]:
    """Returns where the sentences of a text are: cut at stops and line breaks.

    The stop of an abbreviation ("Dr. Berg", "No. 4") or a date ("16.10. um drei") ends no sentence.
    """
    found: list[tuple[int, int]] = []
    start = 0
    for end in _END.finditer(text):
        before, after = text[start : end.start()], text[end.end() : end.end() + 1]
        if "\n" not in end[0] and before.endswith("."):
            if _ABBREVIATION.search(before) and not (before[-2:-1] in "mM" and after.isupper()):
                continue
            if after.isdigit() and _NUMBER.search(before):
                continue
            if (after.islower() or after.isdigit()) and _DATE.search(before):
                continue
            if re.fullmatch(r"\s*\d\.", before) or _MONTH.match(text, end.end()):
                continue  # "1. Open the app", "am 3. Mai"
        _add(found, text, start, end.start())
        start = end.end()
    _add(found, text, start, len(text))
    return found


def _add(found: list[tuple[int, int]], text: str, start: int, end: int) -> None:
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    end = start + len(part.strip())
    while end < len(text) and text[end] in "\"')”’»" and not text[end].isspace():
        end += 1
    if end > start:
        found.append((start, end))


def speaker_of(message: Message, user_id: str, has_roles: bool) -> str:
    """Returns who speaks; without roles, whether another user is an agent is not known."""
    if message.user_id == user_id:
        return CUSTOMER
    if not has_roles:
        return SOMEBODY
    return {"customer": OTHER, "bot": BOT}.get(message.role or "", AGENT)


def sentences_of(chat: Chat, user_id: str) -> list[Sentence]:
    """Returns the sentences of what was said, in order."""
    has_roles = any(message.role for message in chat.messages)
    found = []
    for index, message in enumerate(chat.messages):
        if message.is_said:
            speaker = speaker_of(message, user_id, has_roles)
            parts = spans(message.text)
            found += [
                Sentence(index, start, end, message.text[start:end], speaker, at, len(parts))
                for at, (start, end) in enumerate(parts)
            ]
    return found


_WORD = re.compile(r"[^\W\d_]{3,}|\d[\d.,:/-]*")
_EMPTY = frozenset(
    "the and but for are was were been you she they your our this that these those not does did "
    "have has had with just can could would will them hello hey thanks thank please yes yeah there "
    "here what when how why which who got get its dont".split()
)


def content_words(text: str) -> list[str]:
    """Returns the words that may carry a matter, and numbers, in small letters."""
    return [word for word in _WORD.findall(text.lower()) if word not in _EMPTY]


MONEY = re.compile(
    r"[£$€¥₹]\s?\d|\d\s?[£$€¥₹]|\d+[.,]\d\d\b|\b(?:eur|usd|gbp|pounds?|euros?|dollars?|quid|rs|"
    r"naira|rand|chf|zł|kr)\b",
    re.IGNORECASE,
)
WHEN = re.compile(
    r"\b(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?s?\b|\b(?:jan|feb|mar|apr|"
    r"may|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\b|\b(?:today|tomorrow|yesterday|tonight|noon)\b|"
    r"\b\d{1,2}(?::\d\d|\.\d\d)?\s?(?:am|pm|h|uhr|o'?clock)\b|\b\d{1,2}[:.]\d\d\b|"
    r"\b\d{1,2}[/.-]\d{1,2}\b|\b\d{1,2}(?:st|nd|rd|th)\b",
    re.IGNORECASE,
)
NEGATION = re.compile(
    r"\b(?:not|never|no|nothing|nobody|none|dont|didnt|doesnt|wont|cant|cannot|isnt|wasnt|without|"
    r"still|again|refus\w*|fail\w*|broke\w*|wrong|lost|late|worst|terrible|awful|ridiculous|"
    r"unbelievable|disgust\w*|angry|complain\w*|cancel\w*|damag\w*|miss(?:ing|ed)|scam|lied?|"
    r"useless|nicht|kein\w*|nie|nunca|no|jamais|pas|não|non|mai|niet|geen|nooit)\b|n['’]t\b",
    re.IGNORECASE,
)
PRAISE = re.compile(
    r"\b(?:thank\w*|thx|cheers|great|perfect|love|lovely|happy|brilliant|amazing|kind|wonderful|"
    r"sorted|solved|fixed|helpful|relief|danke|gracias|merci|obrigad[oa]|grazie|bedankt|super)\b",
    re.IGNORECASE,
)
RESULT = re.compile(
    r"\b(?:i['’]?ve|i have|we['’]?ve|we have|i['’]?ll|i will|we['’]?ll|we will|refund\w*|credit\w*|"
    r"replac\w*|cancel\w*|arrives?|done|booked|fixed|reset|unfortunately|cannot|can['’]?t|"
    r"not possible|will be|has been|is now|sent|raised|ticket|within|tomorrow|today|days?)\b",
    re.IGNORECASE,
)
FILLER = re.compile(
    r"how (?:can|may) (?:i|we) help|thank(?:s| you) for (?:contact|your patience|wait|reach|get|"
    r"writ|your (?:message|e?-?mail|enquiry|inquiry))|anything else|(?:have|enjoy) (?:a|the rest|"
    r"your) |let me (?:check|look|see|pull)|one (?:moment|sec|min)|bear with|please hold|"
    r"you['’]?re welcome|welcome to|position in|my name is|this is \w+ (?:from|speaking)|"
    r"i (?:completely |do |fully )?(?:understand|apologi[sz]e)|sorry (?:to hear|for (?:the|any|"
    r"your))|apologies for|any inconvenience|order number|reference|date of birth|can i (?:have|"
    r"take|get) your|could you (?:send|give|confirm|provide)|are you still there|connecting you|"
    r"transferr|estimated wait|in the queue|^(?:kind|best|warm)? ?regards|^(?:hi|hello|hey|dear|"
    r"good (?:morning|afternoon|evening))\b.{0,30}$",
    re.IGNORECASE,
)
JUNK = re.compile(
    r"^>|^\s*(?:on|am|le|el|il|op|em) .{5,80}(?:wrote|schrieb|a écrit|escribió|ha scritto|schreef|"
    r"escreveu)\s*:?$|^-{2,}|get outlook for|sent from my|(?:this )?message (?:was )?deleted|"
    r"\b(?:rate|rating|review) (?:this|your|us|our|the)\b|how (?:did|would you rate)|survey|"
    r"unsubscribe|confidential|intended (?:only )?for the|registered (?:in|office|company)|"
    r"company (?:no|number)|vat (?:no|reg)|do not reply|no-?reply@|automat(?:ed|ic) (?:message|"
    r"reply|response)|reply above this line|image omitted|missed (?:voice|video) call|"
    r"please consider the environment|https?://\S+$|^\[?cid:|^(?:tel|phone|fax|mob|mobile|e-?mail|"
    r"web|www|subject|from|to|sent|cc|date)[.:]|icmp_seq|bytes from|^\W*$",
    re.IGNORECASE,
)
CORRECTION = re.compile(
    r"\b(?:correct(?:ion|ed|ing)?|my mistake|my bad|mistake|apolog\w+|sorry|chang\w+|moved?|"
    r"instead|actually|is now|updated?|re-?schedul\w*|amend\w*|revis\w*|should (?:be|have been|"
    r"read)|wrong|waiv\w*|scrap|ignore|withdraw\w*|withdrawn|new|rather|after all|no longer|"
    r"not any ?more|i mean|i meant|misread|typo|oops|wait|forget|never ?mind|take (?:it|that) back|"
    r"on second thought)\b",
    re.IGNORECASE,
)
_ANAPHORA = re.compile(
    r"^(?:and|but|so|or|also|then|it|its|it['’]s|this|that|that['’]s|they|he|she|which|because|"
    r"yes|no|yep|nope|yeah|ok|okay)\b",
    re.IGNORECASE,
)

FEATURES = 61
"""Plain figures of a sentence."""


def _left(message: int, places: Mapping[int, int]) -> int:
    """Returns how many of a speaker's messages follow one of them; -1 if it is somebody else's."""
    return len(places) - 1 - places[message] if message in places else -1


def features(chat: Chat, sentences: Sequence[Sentence]) -> np.ndarray:
    """Returns plain figures of each sentence, `[sentences, FEATURES]` in float32."""
    said = [index for index, message in enumerate(chat.messages) if message.is_said]
    place = {index: at for at, index in enumerate(said)}
    speaker = {s.message: s.speaker for s in sentences}
    # By message, which of the speaker's messages it is.
    mine, agents = (
        {index: at for at, index in enumerate(i for i in said if speaker.get(i) == who)}
        for who in (CUSTOMER, AGENT)
    )
    words = [content_words(s.text) for s in sentences]
    of_message: Counter[int] = Counter()
    for sentence, found in zip(sentences, words, strict=True):
        of_message[sentence.message] += len(found)
    total = Counter(word for found in words for word in found)
    spread: Counter[str] = Counter()
    for index in said:
        spread.update(set(content_words(chat.messages[index].text)))
    full = [index for index in mine if of_message[index] >= 5]
    place_in_full = {index: at for at, index in enumerate(full)}
    lengths = np.cumsum([0, *(len(chat.messages[index].text) for index in said)])
    last = len(said) - 1
    own = np.zeros((len(sentences), 49), np.float32)
    for row, (s, found) in enumerate(zip(sentences, words, strict=True)):
        at, text = place[s.message], s.text
        before = chat.messages[said[at - 1]] if at else None
        after = said[at + 1] if at < last else None
        letters = max(1, len(text))
        own[row] = (
            at / max(1, last), min(at, 30), min(last - at, 30), min(last + 1, 60),
            *(s.speaker == who for who in SPEAKERS),
            mine.get(s.message, -1), _left(s.message, mine),
            agents.get(s.message, -1), _left(s.message, agents),
            bool(full) and s.message == full[0], bool(full) and s.message == full[-1],
            place_in_full.get(s.message, -1),
            s.number, s.siblings - 1 - s.number, s.siblings,
            min(letters, 300), min(len(found), 40), len(set(found)),
            min(of_message[s.message], 120),
            "?" in text, "!" in text, any(map(str.isdigit, text)), bool(MONEY.search(text)),
            len(WHEN.findall(text)), bool(FILLER.search(text)), bool(JUNK.search(text)),
            len(NEGATION.findall(text)), len(PRAISE.findall(text)), len(RESULT.findall(text)),
            sum(map(str.isupper, text)) / letters, sum(map(str.isdigit, text)) / letters,
            sum(total[word] for word in set(found)) / max(1, len(set(found))),
            sum(spread[word] for word in set(found)),
            before is not None and "?" in before.text,
            before is not None and speaker.get(said[at - 1]) == CUSTOMER,
            after is not None and speaker.get(after) == CUSTOMER,
            bool(re.search(r"\b(?:i|we|my|our)\b", text, re.IGNORECASE)),
            bool(re.search(r"\b(?:you|your)\b", text, re.IGNORECASE)),
            lengths[at] / max(1, lengths[-1]), bool(_ANAPHORA.match(text)),
            bool(CORRECTION.search(text)), text[-1:] in ".!?…",
            bool(re.search(r"\w{15,}|\w+[@_/]\w+", text)),
            len(said) - len(mine) == 0, at == last,
        )  # fmt: skip
    # What stands around a sentence: some figures of its neighbours.
    around = own[:, (19, 23, 25, 28, 30, 31)]
    none = np.zeros((1, around.shape[1]), np.float32)
    if not len(sentences):
        return np.zeros((0, FEATURES), np.float32)
    return np.hstack([own, np.vstack([none, around[:-1]]), np.vstack([around[1:], none])])
