"""What people are called in a chat, as the chat itself says: nobody is guessed by a list of names.

A name is given by a field (`name`, `customer_name`, …), by an id that is a name, as messengers have
it, by who introduces themselves ("my name is Ann Miller"), by a greeting ("Hi Ann,") and by how a
message is signed. It is then a name in the whole chat, and so is each of its parts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

# All is bounded, so that no text takes long.
_PART = r"(?<![\w’'-])(?!I['’])[A-ZÀ-ÖØ-ÞĀ-Ž](?:[\w’'-]{0,40}\w)(?!-?\d)"
_OF = r"(?:van|von|de|der|den|del|la|da|dos|di|le|al|zu|bin)"
_FULL = (
    rf"(?:{_OF}[ ]){{0,2}}(?:[A-Z]\.[ ]?){{0,3}}{_PART}"
    rf"(?:[ ](?:{_OF}[ ]){{0,3}}(?:{_PART}|[A-Z]\.)){{0,3}}"
)
_TWO = rf"(?:[A-Z]\.[ ]?){{0,3}}{_PART}(?:[ ](?:{_PART}|[A-Z]\.)){{1,3}}"
_LOWER = (
    r"(?!(?:on|not|in|at|is|was|wrong|missing|spelled|spelt|still|nicht|auf|falsch|the|a|an|and|"
    r"but|through|listed|under)\b)[a-zà-ž]{2,30} [a-zà-ž]{3,30}"
    r"(?=[.,;!\n]|$| (?:and|und|from|von|aus|y)\b)"
)
_TITLE = (
    r"(?:(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Madam|Herrn?|Frau|Familie|Señora?|Sra?|Don|Doña)\b\.?"
    r"[ ]){0,2}"
)
_NAMED = rf"[ ]{{1,3}}{_TITLE}(?P<name>{_FULL})"
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
        rf"[ ]{{1,3}}{_TITLE}(?P<name>{_FULL}|{_LOWER})",
        r"(?i:\b(?:my name(?:'s| is|:)|mein name (?:ist|lautet)|ich hei(?:ß|ss)e|me llamo))[ ]{1,3}"
        r"(?P<name>(?!(?:on|not|in|at|is|was|wrong|missing|still|nicht|auf|falsch)\b)[a-zà-ž]{3,30})"
        r"(?=[.,;!\n]|$| (?:and|und|from|von|aus|y)\b)",
        r"(?i:\b(?:(?:first|last|full) name|(?:vor|nach|familien)name|nombre)[ ]?:?)[ ]{1,3}"
        rf"(?P<name>{_FULL})",
        rf"(?P<name>{_FULL})(?= (?:is my name|ist mein name)\b)",
        # "this is Tom from returns", but not "I'm Canadian" or "this is Unacceptable".
        r"(?i:\b(?:hier spricht|hier schreibt|hier (?:noch ?mal|wieder)|soy|ich bin (?:die|der)|"
        r"you(?:'re| are) (?:(?:chatting|speaking|talking) (?:with|to)|through to))|[,.] hier)"
        rf"{_NAMED}",
        rf"(?i:\b(?:this is|hier ist)){_NAMED}{_FROM}",
        rf"(?i:\b(?:i am|i'm))[ ]{{1,3}}{_TITLE}"
        rf"(?P<name>(?!\w{{1,20}}(?:ian|ish|elsh|ese|can|ed|ing)\b){_FULL}){_THEN}",
        rf"(?i:\b(?:this is|hier ist|it's|it is|ich bin))[ ]{{1,3}}{_TITLE}(?P<name>{_TWO}){_THEN}",
        rf"(?i:\b(?:it's|it is))[ ]{{1,3}}{_TITLE}(?P<name>{_FULL})(?=[ ](?:from|here|again)\b)",
        rf"(?P<name>{_TWO})(?= here\b)",
        rf"[,.!?][ ](?P<name>{_PART})(?= here(?: from\b| again\b|[,.!]))",
        # "Hi Ann," but not "Hi there," or "Dear Sir or Madam".
        r"(?:^[^\w\n]{0,20}|[.!?][ ]{1,3})"
        r"(?i:hi|hello|hey|dear|(?:good )?(?:morning|afternoon|evening)|"
        r"hallo|liebe[r]?|sehr geehrte[r]?|guten (?:tag|morgen|abend)|hola|estimad[oa]|querid[oa]|"
        r"moin|servus|grü(?:ß|ss)(?: dich| gott)|thanks|thank you|thx|cheers|danke|gracias),?"
        rf"{_NAMED}(?=[ ]{{0,3}}(?:[,.!:;–—\n-]|$))",
        # "Thanks for waiting, Denise." and "Have a great weekend Sofia".
        r"(?i:\b(?:thanks|thank you|danke|gracias)\b)[^,.!?\n]{0,50},"
        rf"{_NAMED}(?=[.!?]|$)",
        r"(?i:\b(?:great|good|nice|lovely|schönen?s?|guten) (?:weekend|day|evening|one|wochenende|"
        rf"tag|abend|feierabend)),?{_NAMED}(?=[^\w\"”\n]{{0,20}}$)",
        r"(?i:^(?:hi|hello|hey|hallo)) (?P<name>[a-zà-ž]{3,30})(?= (?:thx|thanks|danke)\b)",
        # How a message is signed.
        r"(?:^|[.!?,][ ]{1,3})"
        r"(?i:(?:kind|best|warm|many)?[ ]?(?:regards|wishes|thanks)|thank you|sincerely|"
        r"yours(?: \w{1,20})?|cheers|best|mit freundlichen grüßen|mfg|(?:viele|liebe|beste|"
        r"schöne|freundliche|herzliche)n? grüße(?: aus \w{1,30})?|lg|vg|gru(?:ß|ss)|grüße|"
        r"hochachtungsvoll|danke|saludos|gracias|atentamente)[ ]{0,3}[,.!]?[ ]{0,3}"
        r"(?:[-–—][ ]{0,3}|\n[^\S\n]{0,9}(?:\n[^\S\n]{0,9}){0,2})"
        rf"{_TITLE}(?P<name>{_FULL})[ \t]{{0,9}}(?:x{{1,5}}[ \t]{{0,9}})?(?=[,.\n]|$)",
        rf"(?i:\b(?:lg|vg|mfg|gru(?:ß|ss)|grüße|regards|cheers))[^\w\n]{{1,9}}{_TITLE}"
        rf"(?P<name>{_FULL})(?=[^\w\n]{{0,20}}$)",
        rf"(?:^|[.!?][ ])[^\S\n]{{0,9}}[-–—~][ ]?{_TITLE}(?P<name>{_FULL})[^\S\n]{{0,9}}$",
        # Only persons have a title.
        rf"\b(?:Mr|Mrs|Ms|Mx|Dr|Prof|Herrn?|Frau|Familie|Señora?|Sra?)\b\.?{_NAMED}",
    )
)
_SURE = 3
"""The patterns before it say that a name follows."""

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
    "player student manager bank claims department registration examinations registrar revenues "
    "identity internal policyholder member mother breast deaf seller backer buyer pozdrawiam "
    "sincerely urgent listen company family familie everybody nurse reception accounts "
    "finance".split()
)
_NO_NAME = _NOT_NAMES | frozenset("van von de der den del la da dos di le al zu bin".split())
_KEYS = re.compile(
    r"(?:(?:first|last|full|given|family|middle|sur|display|nick|customer|client|contact|agent|"
    r"sender|author|user|from|requester|assignee|visitor|account[_.\- ]?holder|card[_.\- ]?holder|"
    r"owner|employee|operator|profile|billing|shipping)[_.\- ]?){0,3}"
    r"(?:name|vorname|nachname|nombre|apellidos?)|who",
    re.IGNORECASE,
)
_IS_NAME = re.compile(rf"{_TITLE}{_FULL}")


def in_field(key: str, value: str) -> str:
    """Returns the name that a field of this key holds, or ""."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    value = value.strip()
    if not _KEYS.fullmatch(snake) or not re.search(r"[^\W\d_]{2}", value) or len(value) > 100:
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
    for number, pattern in enumerate(_SAYS):
        is_loose = number > _SURE  # who shouts writes all words so
        for match in pattern.finditer(text):
            kept = []
            for part in match["name"].split(" "):
                if part.casefold().strip("’'.-") in _NOT_NAMES or (
                    is_loose and len(part) > 2 and part.isupper()
                ):
                    break
                kept.append(part)
            name = " ".join(kept).removesuffix("'s").removesuffix("’s")
            if len(name) > 1:
                found.append(name)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


_TOKEN = re.compile(r"[^\W_](?:[\w]|['’-](?=\w)){0,60}")
_INITIALS = re.compile(r"(?<!\w)(?:[A-Z]\.[ ]?){1,3}$")

_WORDS_TOO = frozenset(
    "will may mark rose grace hope joy art bill drew chase frank grant rich dean max sky penny "
    "april june summer faith angel ray guy pat sue jack rob nick buck dale glen heath cliff ivy "
    "lily daisy holly iris pearl ruby jade amber dawn eve gene norm ernst klein lang kurz wolf "
    "stark braun".split()
)
"""Names that are words, too: names only where something ends behind them."""


class Names:
    """The names of a chat; each of their parts is a name, too."""

    def __init__(self, names: Iterable[str]):
        self._known: set[tuple[str, ...]] = set()
        self._given: set[str] = set()
        for name in dict.fromkeys(names):
            tokens = _TOKEN.findall(re.sub(rf"^{_TITLE}", "", name))
            self._known.add(tuple(map(_folded, tokens)))
            self._known |= {(_folded(token),) for token in tokens}
            self._given |= {*tokens}
        self._known = {
            key
            for key in self._known
            if len(key) > 1 or (key and len(key[0]) > 1 and key[0] not in _NO_NAME)
        }
        self._longest = max(map(len, self._known), default=0)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Returns where names stand in a text."""
        if not self._known:
            return []
        tokens = [(*token.span(), token[0]) for token in _TOKEN.finditer(text)]
        folded = [_folded(token) for *_, token in tokens]
        found, at = [], 0
        while at < len(tokens):
            for last in range(min(at + self._longest, len(tokens)) - 1, at - 1, -1):
                between = (text[tokens[n][1] : tokens[n + 1][0]] for n in range(at, last))
                if (*folded[at:last], _owner(folded[last])) not in self._known or any(
                    one not in (" ", ". ", ".") for one in between
                ):
                    continue
                start, end = tokens[at][0], tokens[last][1] - _possessive(tokens[last][2])
                if text[start - 1 : start] == "@" or (
                    at == last and not self._is_name(tokens[at][2], text[end : end + 1])
                ):
                    continue
                if initials := _INITIALS.search(text, max(0, start - 9), start):
                    start = initials.start()
                found.append((start, end))
                at = last
                break
            at += 1
        return found

    def _is_name(self, word: str, after: str) -> bool:
        """Returns whether one word is a name here, and not the word that it is, too."""
        if _owner(_folded(word)) in _WORDS_TOO:
            return word[0].isupper() and (not after or after in ",.!?;:)\n’'")
        return word[0].isupper() or word in self._given


def _folded(word: str) -> str:
    """Returns a word in one case; the Turkish letters without and with a dot are the same."""
    return unicodedata.normalize("NFKC", word).casefold().replace("\u0307", "").replace("ı", "i")


def _possessive(word: str) -> int:
    return 2 if word[-2:] in ("'s", "’s") else 0


def _owner(word: str) -> str:
    """Returns a word without the ending of "Ann's"."""
    return word[:-2] if _possessive(word) else word


def names_in(fields: Mapping[str, str]) -> list[str]:
    """Returns the names that fields hold by their keys."""
    return [name for key, value in fields.items() if (name := in_field(key, value))]
