"""Parses a model's answers: accepts them, repairs them at most once, or refuses them.

An analysis is a JSON object with `sentiment` and `summary`; a draft is plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from chatflow.chat_text import CONTROL_TOKEN, as_data, encodable
from chatflow.errors import BadAnswerError
from chatflow.models.requests import Part
from chatflow.records import Chat, Sentiment

_ACCUSATION = re.compile(r"\byou(?:['’]ve| have|r)? +(\w+)")


_CONTENT_WORD = re.compile(r"\d+|[^\W\d_]{3,}")


_EMPTY_WORDS = frozenset(
    "about after again ago all also and any are because been before being but can could customer "
    "did does doing done down each even every find for from get given give going got had has have "
    "having her here him his how into its just know let like look made make making may more most "
    "much need needs not now off one only other our out over own per please said same saw say "
    "says see she should some such sure take than thank thanks that the their them then there "
    "these they thing things this those through time too two under until use user very want "
    "wanted wants was way well were what when where which while who will with would yet you your "
    "agent company service support".split()
)


TONE_WORDS: Mapping[str, Sentiment] = {
    "angry": Sentiment.ANGRY,
    "unhappy": Sentiment.ANGRY,
    "negative": Sentiment.ANGRY,
    "neutral": Sentiment.NEUTRAL,
    "happy": Sentiment.HAPPY,
    "positive": Sentiment.HAPPY,
}
"""Words that models write instead of a number."""


ANALYSIS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "sentiment": {"type": "integer", "enum": [-1, 0, 1]},
        "summary": {"type": "string"},
    },
    "required": ["sentiment", "summary"],
    "additionalProperties": False,
}
"""JSON schema of the answer, for models that write JSON."""


class AnalysisAnswer(NamedTuple):
    sentiment: Sentiment
    summary: str
    repairs: tuple[str, ...]


class DraftAnswer(NamedTuple):
    text: str
    repairs: tuple[str, ...]


def parse_analysis(
    answer: str,
    summary_characters: int,
    tones: Mapping[str, Sentiment] = TONE_WORDS,
    asked_for_summary: bool = True,
) -> AnalysisAnswer:
    """Reads sentiment and summary from a model's answer.

    Accepts JSON that is fenced, prefixed, single-quoted, cut off, one level down or has trailing
    commas. Leaves out what the model thought before; of several objects, the last counts. Cuts a
    long summary after a word, with an ellipsis. `repairs` names what was repaired. `tones` are the
    template's words for sentiments, accepted beside the usual ones. Without `asked_for_summary` it
    is "".

    Raises `BadAnswerError`: `empty_answer`, `not_json`, `no_sentiment`, `bad_sentiment`,
    `no_summary`, `empty_summary`.
    """
    if not answer.strip():
        raise BadAnswerError("empty_answer", "the model's answer is empty", answer)
    value, repairs = _answer_object(without_thoughts(answer))
    fields = {str(key).strip().lower(): item for key, item in value.items()}
    if "sentiment" not in fields:
        raise BadAnswerError("no_sentiment", "the answer has no field sentiment", answer)
    words = {**TONE_WORDS, **{word.lower(): tone for word, tone in tones.items()}}
    sentiment = _sentiment(fields["sentiment"], words)
    if sentiment is None:
        shown = json.dumps(fields["sentiment"], default=str)[:80]
        raise BadAnswerError("bad_sentiment", f"sentiment is {shown}, not -1, 0 or 1", answer)
    if not asked_for_summary:
        return AnalysisAnswer(sentiment, "", repairs)
    if "summary" not in fields:
        raise BadAnswerError("no_summary", "the answer has no field summary", answer)
    if not isinstance(fields["summary"], str):
        kind = type(fields["summary"]).__name__
        raise BadAnswerError("no_summary", f"summary is a JSON {kind}, not a string", answer)
    summary, mended = _plain_text(fields["summary"])
    summary = " ".join(summary.split())
    if not summary:
        raise BadAnswerError("empty_summary", "the summary is empty", answer)
    repairs += mended
    if len(summary) > summary_characters:
        summary, repairs = shorten(summary, summary_characters), (*repairs, "summary_cut")
    return AnalysisAnswer(sentiment, summary, repairs)


def parse_draft(answer: str, asked: Part, chat: Chat, limit: int) -> DraftAnswer:
    """Returns the checked text of a draft, cut after a sentence to at most `limit` characters.

    A draft may use words of the chat, but must not only repeat the chat or the prompt.

    Raises `BadAnswerError`: `empty_draft`, `control_tokens`, `repeats_prompt`, `repeats_itself`.
    """
    text = without_thoughts(answer).strip()
    written = text.removesuffix(asked.tail)
    if not re.search(r"\w", written.removeprefix(asked.lead)):
        raise BadAnswerError("empty_draft", "the draft has no words", answer)
    if CONTROL_TOKEN.search(text):
        raise BadAnswerError("control_tokens", "the draft holds control tokens", answer)
    if copies_template(written, asked.prompt, chat) or _words(written) in _words(asked.prompt):
        raise BadAnswerError("repeats_prompt", "the draft repeats its prompt", answer)
    if repeats_itself(written):
        raise BadAnswerError("repeats_itself", "the draft repeats itself", answer)
    if len(text) <= limit:
        return DraftAnswer(text, ())
    ends = [end.end() for end in re.finditer(r"[.!?…](?=\s|$)", text[:limit])]
    return DraftAnswer(text[: ends[-1]] if ends else shorten(text, limit), ("draft_cut",))


def says_any(text: str, phrases: Sequence[str]) -> bool:
    """Returns whether a text contains one of the phrases, as words in a row, in any case."""
    return any(_words(phrase) in _words(text) for phrase in phrases)


def shorten(text: str, limit: int) -> str:
    """Cuts a text after a word, with an ellipsis, to at most `limit` characters."""
    if len(text) <= limit:
        return text
    start = text[: limit - 1]
    at_word = start.rsplit(" ", 1)[0] if " " in start else start
    return at_word.rstrip(" ,;:") + "…"


def copies_template(text: str, prompt: str, chat: Chat) -> bool:
    """Returns whether most of a text copies the prompt's instructions or examples, not the chat."""
    template = prompt
    for message in chat.said:
        template = template.replace(as_data(message.text), "\n")
    runs, words = word_runs(text), _words(template)
    return sum(_has_run(words, run) for run in runs) * 2 > len(runs)


def _has_run(words: str, run: tuple[str, ...]) -> bool:
    """Returns whether a whole run is among the words; one that is shorter must be all of them."""
    shown = f" {' '.join(run)} "
    return shown in words if len(run) == RUN else shown == words


def repeats_itself(text: str) -> bool:
    """Returns whether more than half of a text's runs of words are repetitions."""
    runs = word_runs(text)
    return len(set(runs)) * 2 < len(runs)


RUN = 5


def word_runs(text: str) -> list[tuple[str, ...]]:
    """Returns all runs of `RUN` words; for a shorter text, all its words as one run."""
    words = re.findall(r"\w+", text.lower())
    if len(words) <= RUN:
        return [tuple(words)] if words else []
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def _plain_text(text: str) -> tuple[str, tuple[str, ...]]:
    text = encodable(text)  # models write half an emoji as an escape, too
    plain = CONTROL_TOKEN.sub(" ", text)
    return plain, ("control_tokens",) if plain != text else ()


_THOUGHTS = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad"
_OPEN = rf"[<\[◁](?:\w+:)?(?:{_THOUGHTS})[>\]▷]"
_CLOSE = rf"[<\[◁]/(?:\w+:)?(?:{_THOUGHTS})[>\]▷]"
_THOUGHT = re.compile(
    # Also before an end without a start, or without an end; and gpt-oss' channels before the last.
    rf"\A.*{_CLOSE}|{_OPEN}.*?(?:{_CLOSE}|\Z)|\A.*<\|channel\|>final\s*(?:<\|message\|>)?",
    re.DOTALL | re.IGNORECASE,
)


def without_thoughts(answer: str) -> str:
    """Returns an answer without what a model that reasons wrote before it."""
    return _THOUGHT.sub("", answer) if _MARK.search(answer) else answer


_MARK = re.compile(rf"{_OPEN}|{_CLOSE}|<\|channel\|>", re.IGNORECASE)


def _answer_object(answer: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the JSON object with the fields that we ask for, and what was repaired.

    Of several it is the last whole one, because models change their minds.
    """
    found = [item for value in _whole_objects(answer) for item in _within(value)]
    if not found and (start := answer.find("{")) >= 0:
        import json_repair

        try:
            value = json_repair.loads(answer[start:])
        except Exception:  # an error inside json_repair means a bad answer, too
            value = None
        parts = value if isinstance(value, list) else [value]
        if found := [item for part in parts for item in _within(part)]:
            return _last(found), ("json",)
    if not found:
        raise BadAnswerError("not_json", "the answer holds no JSON object with the fields", answer)
    last = _last(found)
    return last, ("last_of_several",) if any(item != last for item in found) else ()


def _last(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the last object with both fields, or what all of them say together."""
    whole = [item for item in found if len(_fields(item)) == 2]
    return whole[-1] if whole else {k: v for item in found for k, v in item.items()}


def _within(value: Any) -> list[dict[str, Any]]:
    """Returns the objects with our fields: a value itself, or those one level below it."""
    if _fields(value):
        return [value]
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    items = [part for item in below for part in (item if isinstance(item, list) else [item])]
    found = []
    for item in items:
        if isinstance(item, str) and "{" in item:
            found += [inner for inner in _whole_objects(item) if _fields(inner)]
        elif _fields(item):
            found.append(item)
    return found


def _fields(value: Any) -> set[str]:
    """Returns which of our fields a value has."""
    if not isinstance(value, dict):
        return set()
    return {str(key).strip().lower() for key in value} & {"sentiment", "summary"}


def _whole_objects(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)


def _sentiment(value: Any, tones: Mapping[str, Sentiment]) -> Sentiment | None:
    if isinstance(value, str):
        word = value.strip().lower()
        if word in tones:
            return tones[word]
        try:
            value = float(word)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return Sentiment(int(value)) if value in (-1, 0, 1) else None


def content_words(text: str) -> list[str]:
    """Returns numbers and words with meaning, cut to 5 letters: "refunded" matches "refund"."""
    words = _CONTENT_WORD.findall(text.lower())
    return [word[:5] for word in words if word not in _EMPTY_WORDS]


def grounding(
    text: str, chat: Chat, user_id: str, least: int = 2, ignored: Collection[str] = ()
) -> float:
    """Returns the share of a text's content words that the user wrote, too.

    Names of the chat's users and `ignored` words do not count. The share is 0 if a text has fewer
    than `least` different content words, and so says nothing.
    """
    known = set(content_words(" ".join(chat.texts_of(user_id))))
    words = [word for word in content_words(without_users(text, chat)) if word not in ignored]
    return sum(word in known for word in words) / len(words) if len(set(words)) >= least else 0.0


def without_users(text: str, chat: Chat) -> str:
    """Returns a text without the names of the chat's users."""
    for name in {m.user_id for m in chat.messages if m.user_id in text}:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text)
    return text


def accuses(text: str, chat: Chat, user_id: str) -> bool:
    """Returns whether a text says "you lost …" or "your driver …" as the customer said of us."""
    own = " ".join(chat.texts_of(user_id))
    said = set(_ACCUSATION.findall(own.lower()))
    return not said.isdisjoint(_ACCUSATION.findall(text.lower()))


_APOLOGY_WORDS = frozenset(
    content_words(
        "sorry regret apologise apologize apology sincerely understand inconvenience "
        "frustrating annoying upset disappointed feel trouble experience"
    )
)


def draft_grounding(written: str, chat: Chat, user_id: str) -> float:
    """Returns the `grounding` of a draft; words of apology do not count."""
    return grounding(written, chat, user_id, 1, _APOLOGY_WORDS)
