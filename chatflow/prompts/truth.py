"""Checks what a model wrote against its chat: what the chat does not bear out is refused.

The checks know words, not meanings, so they cannot prove a text true; each finds one kind of lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from chatflow.choices.languages import language_of
from chatflow.choices.sentences import CUSTOMER, OTHER, speaker_of
from chatflow.records import Chat

PROMISE = re.compile(
    r"""
    \b(?: (?:we|i|they|our\ \w+|a\ colleague) (?:['’]ll | \ will | \ can | \ shall
            | \ would\ like\ to | \ (?:are|am)\ (?:happy|glad)\ to)
        | (?:we|i) (?:['’]re | ['’]m | \ are | \ am) \ (?= \w+ing\b )
        | (?:we|i) (?:['’]ve | \ have) \ (?:issued | arranged)
        | (?:we|i) \ (?:guarantee | promise | offer)
        | (?:we|i) (?:['’]ve | \ have) \ (?:\w+\ )? (?= (?:refunded | reimbursed | compensated)\b )
        | you (?:['’]ll | \ will | \ can) \ (?:get | have | receive | be)
        | please\ accept
        | (?= (?:refund | replacement | voucher | discount | compensation)\ will\ be )
    )
    # Something that is only to be checked, or is refused, is not a promise.
    (?: (?! \b(?: (?:look | check | ask | find | investigat | review)\w* | not | cannot )\b )
        [^.!?\n] )*?
    \b(?: refund\w* | reimburs\w+ | compensat\w+ | vouchers? | discounts? | replac\w+
        | free\ of\ charge | money\ back
        | within\ (?:the\ next\ )?[\w-]+\ (?:minutes? | hours? | (?:\w+\ )?days? | weeks?)
        | tomorrow | tonight
        | (?:by | on | before)\ (?:the\ )?
            (?:(?:mon|tues|wednes|thurs|fri|satur|sun)day | end\ of | \d+)
    )\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Promises of money, goods or a deadline, which nobody has agreed to: "we will refund you", but not
"we are sorry that you wait for your refund", which is what the customer wrote about."""

ADMISSION = re.compile(
    r"\b(?:our (?:own )?(?:fault|mistake|negligence)|we (?:\w+ )?(?:admit|accept (?:full |"
    r"all )?(?:responsibility|liability)|take (?:full|all|complete) (?:responsibility|blame))|"
    r"we (?:are|were) (?:\w+ )?(?:liable|negligent|to blame|at fault)|"
    r"we (?:have )?broken? the (?:law|contract)|illegal|unlawful)\b",
    re.IGNORECASE,
)
"""Admissions of fault or liability, which support staff may not make for a company."""

BLAME = re.compile(
    r"\b(?:you (?:should|could) have|you failed to|you forgot to|your (?:own )?(?:fault|mistake|"
    r"error)|if you had (?:only )?\w+|you (?:misunderstood|neglected))\b",
    re.IGNORECASE,
)
"""Blame of the customer."""

PLACEHOLDER = re.compile(
    r"[\[{<][^\]}>\n]{1,40}[\]}>]|\bX{3,}\b|\b(?:insert|your) name\b", re.IGNORECASE
)

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_SENTENCE_END = re.compile(r"(?:^|[.!?:…\n])[\s\"'“”‘’(\[*_-]*$")
_WORD = re.compile(r"(?<!\w)(?:[^\W\d_]{2,}(?:['’-][^\W\d_]+)*|[^\W\d_]['’][^\W\d_]{3,})(?!\w)")
_POSSESSIVE = re.compile(r"['’]s\b")
_QUOTED = re.compile(r"[“\"«„]([^”\"»“\n]+)[”\"»“]")
_ADDRESS = re.compile(
    r"\b(?:https?://\S+|www\.\S+|[\w.+-]+@[\w-]+\.\w[\w.]*|"
    r"[\w.-]+\.(?:com|org|net|info|io|eu|uk|de|example)\b\S*)(?<![.,;:!?)\"'”’])",
    re.IGNORECASE,
)
_TITLES = frozenset("customer agent user support team i ok sir madam company".split())
_SPELLED = dict(
    zip(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
        "ninety".split(),
        (*range(2, 20), *range(20, 100, 10)),
        strict=True,
    )
)
_SPELLED_NUMBER = re.compile(rf"\b(?:{'|'.join(_SPELLED)})\b", re.IGNORECASE)
_OUTCOME = re.compile(
    r"\b(refund|replac|cancel|credit|repair|reimburs|compensat|deliver|unlock|reset|rebook|exchang|"
    r"escalat|apologi[sz]|upgrad|waiv)\w*\b",
    re.IGNORECASE,
)
_DEED = re.compile(
    r"\b(?:the )?(customer|user|client|agent|company|support(?: team| agent)?|representative|"
    r"staff) (?:has |have |had |already |then |also |finally )*"
    # Both sides ask and receive, so each may say this of itself.
    r"(?!ask|request|report|explain|complain|mention|describ|want|need|receiv)"
    r"(\w{3,}ed|sent|took|paid|lost|broke|gave|told|sold|bought)\b",
    re.IGNORECASE,
)


def summary_faults(text: str, chat: Chat, user_id: str) -> list[str]:
    """Returns what a summary says that its chat does not bear out, each as a phrase."""
    return [
        *_unsaid(text, chat),
        *(f"who {verb}" for verb in swapped_deeds(text, chat, user_id)),
    ]


def draft_faults(text: str, chat: Chat, user_id: str) -> list[str]:
    """Returns why a draft may not be sent, each as a phrase."""
    unsure = "?"
    own = language_of([text], unsure)
    language = own
    if own != unsure:
        language = language_of(chat.texts_of(user_id), chat.attributes.get("language") or own)
    ours = unquoted(text)
    return [
        *_unsaid(text, chat, "sorry"),
        *(f"promises {promise!r}" for promise in promises(text)),
        *(f"admits {match[0]!r}" for match in ADMISSION.finditer(ours)),
        *(f"blames the customer: {match[0]!r}" for match in BLAME.finditer(ours)),
        *(f"is in {own}, not in {language}" for _ in [0] if own not in (unsure, language)),
    ]


def promises(text: str) -> list[str]:
    """Returns the promises of a text, each from who makes it to what is promised."""
    return [match[0] for match in PROMISE.finditer(unquoted(text))]


def unquoted(text: str) -> str:
    """Returns what a text says itself: not its quotations, which are held against the chat."""
    return _QUOTED.sub(" ", text)


def _unsaid(text: str, chat: Chat, granted: str = "") -> Iterator[str]:
    """Yields what was not said; of outcomes, `granted` counts as if it was.

    What is expensive is made of the chat only if the text has something to hold against it.
    """
    said = "\n".join(message.text for message in chat.said)
    low = f"{said} {granted}".lower()
    yield from (f"the name {name}" for name in unsaid_names(text, lambda: small_words(said)))
    yield from (f"the number {number}" for number in unsaid_numbers(text, said))
    yield from (
        f"the quotation {q[1]!r}" for q in _QUOTED.finditer(text) if _flat(q[1]) not in _flat(said)
    )
    yield from (
        f"the address {a[0]}" for a in _ADDRESS.finditer(text) if a[0].lower() not in said.lower()
    )
    yield from (f"the placeholder {p[0]}" for p in PLACEHOLDER.finditer(text) if p[0] not in said)
    yield from (
        f"the outcome {o[0]!r}"
        for o in _OUTCOME.finditer(text)
        if o[1].lower()[:6] not in low
        and not (o[1].lower().startswith("apolog") and "sorry" in low)
    )


def words_of(text: str) -> list[str]:
    """Returns the words of a text, without what follows an apostrophe of possession."""
    return re.findall(r"\w+", _POSSESSIVE.sub("", text))


def small_words(text: str) -> set[str]:
    """Returns the words of a text in small letters."""
    return {word.lower() for word in words_of(text)}


def unsaid_names(text: str, known: Callable[[], set[str]]) -> Iterable[str]:
    """Returns the capitalised words inside sentences that are not among the known ones."""
    text = _POSSESSIVE.sub("", text)
    names = [
        match[0]
        for match in _WORD.finditer(text)
        if match[0][0].isupper() and not _SENTENCE_END.search(text[: match.start()])
    ]
    there = known() if names else set()
    for name in names:
        parts = small_words(name)
        if not there.issuperset(parts) and not _TITLES.issuperset(parts):
            yield name


def unsaid_numbers(text: str, said: str) -> Iterable[str]:
    """Returns the numbers of a text, in digits or words, that were not said."""
    digits, words = dict.fromkeys(_NUMBER.findall(text)), _spelled_in(text)
    if not digits and not words:
        return
    there = {_plain(number) for number in _NUMBER.findall(said)}
    there |= {str(_SPELLED[word]) for word in _spelled_in(said)}
    yield from (number for number in digits if _plain(number) not in there)
    yield from (word for word in words if str(_SPELLED[word]) not in there)


def _spelled_in(text: str) -> list[str]:
    """Returns the numbers that a text has in words, in the order of `_SPELLED`."""
    found = {match.casefold() for match in _SPELLED_NUMBER.findall(text)}
    return [word for word in _SPELLED if word in found] if found else []


def _plain(number: str) -> str:
    """Returns a number without marks of thousands, empty decimals or minutes: 1,200.00 is 1200."""
    number = re.sub(r"[.,](?=\d{3}\b)", "", number)
    return re.sub(r"[.,:]0+$", "", number).replace(",", ".")


def _flat(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def swapped_deeds(text: str, chat: Chat, user_id: str) -> Iterable[str]:
    """Returns "VERB: the customer" where a text credits one side with an act of the other.

    It does so if the other side uses the verb of itself, or this side uses it of the other, and
    this side uses it nowhere else.
    """
    deeds = list(_DEED.finditer(text))
    if not deeds:
        return
    has_roles = any(message.role for message in chat.messages)
    sides: dict[bool, str] = {True: "", False: ""}
    for message in chat.said:
        speaker = speaker_of(message, user_id, has_roles)
        if speaker != OTHER:
            sides[speaker == CUSTOMER] += f"\n{message.text.lower()}"
    said = _flat("\n".join(message.text for message in chat.said))
    for match in deeds:
        by_customer = match[1].lower() in ("customer", "user", "client")
        stem = match[2].lower().removesuffix("ed")[:7]
        theirs, own = sides[not by_customer], sides[by_customer]
        of_itself = rf"\b(?:i|we|i['’]ve|we['’]ve|i have|we have)\s+(?:\w+\s+)?{re.escape(stem)}"
        accused = rf"(?<!have )\byou(?:['’]ve| have)?\s+(?:\w+\s+)?{re.escape(match[2].lower())}\b"
        own, accusations = re.subn(accused, " ", own)
        if (
            (accusations or re.search(of_itself, theirs))
            and not re.search(rf"\b{re.escape(stem)}", own)
            and _flat(match[0]) not in said
        ):
            yield f"{match[2].lower()}: the {match[1].lower()}"


def said_of(faults: Sequence[str]) -> str:
    """Returns faults as one sentence for a complaint."""
    return f"the chat does not bear out: {'; '.join(faults)}"
