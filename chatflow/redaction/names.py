"""What people are called in a chat, as the chat itself says: nobody is guessed by a list of names.

A name is given by a field (`name`, `customer_name`, …), by an id that is a name, as messengers have
it, by who introduces themselves ("my name is Ann Miller"), by a greeting ("Hi Ann,") and by how a
message is signed. It is then a name in the whole chat, with each of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PART = r"(?!I['’])[A-ZÀ-ÖØ-ÞĀ-Ž][\w’'-]*[\w]"
_FULL = (
    rf"(?:(?:van|von|de|der|den|del|la|da|zu|bin)[ ]){{0,2}}(?:[A-Z]\.[ ]?){{0,3}}{_PART}"
    rf"(?:[ ](?:(?:van|von|de|der|den|del|la|da|dos|di|le|al|bin)[ ])*(?:{_PART}|[A-Z]\.)){{0,3}}"
)
_TWO = rf"(?:[A-Z]\.[ ]?){{0,3}}{_PART}(?:[ ](?:{_PART}|[A-Z]\.)){{1,3}}"
_LOWER = (
    r"(?!(?:on|not|in|at|is|was|wrong|missing|spelled|spelt|still|nicht|auf|falsch|the|a|an|and|"
    r"but)\b)[a-zà-ž]{2,}(?: [a-zà-ž]{3,})?(?=[.,;!\n]|$| (?:and|und|from|von|aus|y)\b)"
)
_TITLE = (
    r"(?:(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Madam|Herrn?|Frau|Familie|Señora?|Sra?|Don|Doña)\b\.?"
    r"[ ]){0,2}"
)
_NAMED = rf"[ ]+{_TITLE}(?P<name>{_FULL})"
_FROM = r"(?=[ ]?(?:,|\(|(?:from|with|at|here|again|vom?|von|aus|hier|speaking|in)\b))"
_THEN = (
    r"(?=[ ]?(?:[,.!:;(\n–—-]|$|(?:from|with|at|here|and|again|vom?|von|aus|und|hier|de|y|"
    r"speaking|in)\b))"
)

_SAYS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        # "my name is ann miller": in lower case, too, because nothing else follows these words.
        r"(?i:\b(?:my|the) (?:full |first |last |sur)?name(?:'s| is|:)|\bname's|\bname[ ]?:|"
        r"\bmein name (?:ist|lautet)|\bich hei(?:ß|ss)e|\bme llamo|\bmi nombre es|\bje m'appelle)"
        rf"[ ]+{_TITLE}(?P<name>{_FULL}|{_LOWER})",
        r"(?i:\b(?:(?:first|last|full) name|(?:vor|nach|familien)name|nombre)[ ]?:?)[ ]+"
        rf"(?P<name>{_FULL})",
        rf"(?P<name>{_FULL})(?= (?:is my name|ist mein name)\b)",
        # "this is Tom from returns", but not "I'm Canadian" or "this is Unacceptable".
        r"(?i:\b(?:hier spricht|hier schreibt|hier (?:noch ?mal|wieder)|soy|ich bin (?:die|der)|"
        r"you(?:'re| are) (?:(?:chatting|speaking|talking) (?:with|to)|through to))|[,.] hier)"
        rf"{_NAMED}",
        rf"(?i:\b(?:this is|hier ist)){_NAMED}{_FROM}",
        rf"(?i:\b(?:i am|i'm))[ ]+{_TITLE}"
        rf"(?P<name>(?!\w+(?:ian|ish|elsh|ese|can|ed|ing)\b){_FULL}){_THEN}",
        rf"(?i:\b(?:this is|hier ist|it's|it is|ich bin))[ ]+{_TITLE}(?P<name>{_TWO}){_THEN}",
        rf"(?i:\b(?:it's|it is))[ ]+{_TITLE}(?P<name>{_FULL})(?=[ ](?:from|here|again)\b)",
        rf"(?P<name>{_TWO})(?= here\b)",
        rf"[,.!?][ ](?P<name>{_PART})(?= here(?: from\b| again\b|[,.!]))",
        # "Hi Ann," but not "Hi there," or "Dear Sir or Madam".
        r"(?i:^[\W_]*|[.!?][ ]+)(?i:hi|hello|hey|dear|(?:good )?(?:morning|afternoon|evening)|"
        r"hallo|liebe[r]?|sehr geehrte[r]?|guten (?:tag|morgen|abend)|hola|estimad[oa]|querid[oa]|"
        r"moin|servus|grü(?:ß|ss)(?: dich| gott)|thanks|thank you|thx|cheers|danke|gracias),?"
        rf"{_NAMED}(?=[ ]*(?:[,.!:;–—\n-]|$))",
        # "Thanks for waiting, Denise." and "Have a great weekend Sofia".
        r"(?i:\b(?:thanks|thank you|danke|gracias)\b)[^,.!?\n]{0,50},"
        rf"{_NAMED}(?=[.!?]|$)",
        r"(?i:\b(?:great|good|nice|lovely|schönen?s?|guten) (?:weekend|day|evening|one|wochenende|"
        rf"tag|abend|feierabend)),?{_NAMED}(?=[^\w\"”]*$)",
        r"(?i:^(?:hi|hello|hey|hallo)) (?P<name>[a-zà-ž]{3,})(?=,|!| (?:thx|thanks|thank|danke)\b)",
        # How a message is signed.
        r"(?i:^|[.!?,][ ]+)(?i:(?:kind|best|warm|many)?[ ]?(?:regards|wishes|thanks)|thank you|"
        r"sincerely|yours(?: \w+)?|cheers|best|mit freundlichen grüßen|mfg|(?:viele|liebe|beste|"
        r"schöne|freundliche|herzliche)n? grüße(?: aus \w+)?|lg|vg|gru(?:ß|ss)|grüße|"
        r"hochachtungsvoll|danke|saludos|gracias|atentamente)[ ]*[,.!]?[ ]*(?:[-–—][ ]*|\n\s*)"
        rf"{_TITLE}(?P<name>{_FULL})\s*(?:x+\s*)?(?=[,.\n]|$)",
        rf"(?i:\b(?:lg|vg|mfg|gru(?:ß|ss)|grüße|regards|cheers))(?:[^\w\n]+){_TITLE}"
        rf"(?P<name>{_FULL})(?=\W*$)",
        rf"(?i:\n|[.!?][ ])\s*[-–—~][ ]?{_TITLE}(?P<name>{_FULL})\s*$",
        # Only persons have a title.
        rf"\b(?:Mr|Mrs|Ms|Mx|Dr|Prof|Herrn?|Frau|Familie|Señora?|Sra?)\b\.?{_NAMED}",
    )
)
_NOT_NAMES = frozenset(
    "there all team everyone everybody guys folks sir madam sirs both again you support agent "
    "customer service care user bot assistant admin staff system help desk helpdesk sales billing "
    "team the this that it its i we my a an and or not no yes so very too also but if in on at of "
    "for to from with about just still here now please thanks thank regards monday tuesday "
    "wednesday thursday friday saturday sunday january february march april may june july august "
    "september october november december good morning afternoon evening day dear hi hello hey ok "
    "okay sorry angry furious happy done waiting going trying sure glad afraid unhappy upset mad "
    "zusammen alle damen herren team kundenservice kundendienst support ihr ihnen euch dir sie du "
    "wütend sauer enttäuscht guten tag morgen abend montag dienstag mittwoch donnerstag freitag "
    "samstag sonntag danke bitte grüße hallo leute buenos días señores todos cliente soporte "
    "unknown anonymous guest visitor me client owner mr mrs ms dr herr frau order card "
    "christmas easter english german french spanish american british what why when how who "
    "moin ihr ihre euer eure dein deine god gosh lord man mate dude boss great perfect wonderful "
    "fine right nice lovely love babe hun honey darling doctor professor office housing team "
    "player student manager".split()
)
_KEYS = re.compile(
    r"(?:^|[_.\- ])(?:(?:first|last|full|given|family|middle|sur|display|nick|customer|client|"
    r"contact|agent|sender|author|user|from|requester|assignee|visitor|account_holder|card_?holder)_?"
    r"(?:name)|name|who|vorname|nachname|nombre|apellidos?)$",
    re.IGNORECASE,
)
_IS_NAME = re.compile(rf"{_TITLE}{_FULL}")


def in_field(key: str, value: str) -> str:
    """Returns the name that a field of this key holds, or ""."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    value = value.strip()
    if not _KEYS.search(snake) or not re.search(r"[^\W\d_]{2}", value) or len(value) > 100:
        return ""
    return "" if all(word in _NOT_NAMES for word in _words(value)) else value


def of_id(user_id: str) -> str:
    """Returns the name that an author's id is, as in WhatsApp's export, or "" of other ids."""
    is_name = _IS_NAME.fullmatch(user_id.strip()) and not re.search(r"[\d_]", user_id)
    if not is_name or any(word in _NOT_NAMES for word in _words(user_id)):
        return ""
    return user_id.strip()


def said_in(text: str) -> list[str]:
    """Returns the names that a message gives to its author or to whom it speaks to."""
    found = []
    for pattern in _SAYS:
        for match in pattern.finditer(text):
            kept = []
            for part in match["name"].split(" "):
                if part.casefold().strip("’'.-") in _NOT_NAMES:
                    break
                kept.append(part)
            name = " ".join(kept).removesuffix("'s").removesuffix("’s")
            if len(name) > 1:
                found.append(name)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


class Names:
    """The names of a chat; each of their parts stands for the first name that has it."""

    def __init__(self, names: Iterable[str]):
        self.full: dict[str, str] = {}
        for name in sorted(dict.fromkeys(names), key=len, reverse=True):
            bare = re.sub(rf"^{_TITLE}", "", name).strip()
            for form in (bare, *bare.split(" ")):
                if form.casefold().strip(".") in _NOT_NAMES or len(form.strip(".")) < 2:
                    continue
                if form == bare or not form.islower():
                    self.full.setdefault(form, bare)
        self._pattern = None
        if self.full:
            forms = "|".join(re.escape(form) for form in sorted(self.full, key=len, reverse=True))
            # A name of two words is one in any case; one word, only as it was given, or shouted.
            self._pattern = re.compile(
                rf"(?<![\w@])(?:(?:[A-Z]\.[ ]?){{0,2}})(?P<form>{forms})(?=(?:['’]s)?(?!\w))",
                re.IGNORECASE,
            )
            self._folded = {form.casefold(): full for form, full in self.full.items()}

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """Returns where names stand in a text, and whose."""
        if self._pattern is None:
            return []
        return [
            (*match.span(), self._folded[match["form"].casefold()])
            for match in self._pattern.finditer(text)
            if " " in match["form"] or match["form"] in self.full or match["form"][0].isupper()
        ]

    def name_of(self, form: str) -> str:
        """Returns the whole name of which a form is a part, or the form."""
        return self._folded.get(form.casefold(), form) if self.full else form


def names_in(fields: Mapping[str, str]) -> list[str]:
    """Returns the names that fields hold by their keys."""
    return [name for key, value in fields.items() if (name := in_field(key, value))]
