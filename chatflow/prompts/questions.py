"""Makes questions from chats: renders a template for one user of one chat."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jinja2

from chatflow.chat_text import KeptMessages, as_data, estimate_tokens, keep
from chatflow.choices.declared import HEAD, SUFFIX, Choice, choices_of
from chatflow.choices.heads import Heads, Read
from chatflow.choices.languages import language_of
from chatflow.choices.reading import layout_of
from chatflow.choices.sentences import Sentence, sentences_of, speaker_of
from chatflow.choices.words import Words, words_of
from chatflow.errors import BadAnswerError, BadInputError, UsageError
from chatflow.models.requests import FIRST, Part, Request, Suffix, Version
from chatflow.models.spec import ModelSpec
from chatflow.prompts.answers import ANALYSIS_SCHEMA, AnalysisAnswer, parse_analysis
from chatflow.prompts.templates import Template, default_sources
from chatflow.prompts.truth import draft_faults, said_of, summary_faults
from chatflow.records import (
    SUMMARY_CHARACTERS,
    AnalysedChat,
    Analysis,
    Chat,
    Draft,
    Identity,
    Message,
    Sentiment,
    now,
)
from chatflow.weights.heads import local_heads


@dataclasses.dataclass(frozen=True)
class Question:
    """A request to a model, and how to read its answer.

    `prompt_version` and `settings` are those of the template that asks, because templates may
    change while a pipeline runs.
    """

    request: Request
    prompt_version: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChatQuestion(Question):
    """A request about one user of a chat.

    Attributes:
      user_id: the user whose tone is asked for, or to whom the draft speaks.
      language: that of what the user writes, "" if it is not known.
      speakers, openings: the fixed texts of a summary in it; see `choices.words`.
      dropped_messages, cut_messages: what was left out of the prompt; see `Analysis`.
      sentences: those in the prompt, if it is read by heads.
      analysis: that of the draft's chat; None in a question for an analysis.
      read: what the analysis was made from, if its prompt was read.
      instead: the draft to use if the one that the model writes is unfit.
      otherwise: the same question to the model that is asked if this one does not answer.
      first: the analysis that is not sure enough, if this question asks again.
    """

    chat: Chat
    user_id: str
    language: str
    speakers: Mapping[str, str]
    openings: Mapping[str, str]
    dropped_messages: int
    cut_messages: int
    sentences: tuple[Sentence, ...] = ()
    analysis: Analysis | None = None
    read: Read | None = None
    instead: Draft | None = None
    otherwise: ChatQuestion | None = None
    first: AnalysedChat | None = None

    def id_of(self, model: str) -> str:
        """Returns the id of an answer by `model`, which may not be the model that was asked."""
        identity = Identity.of(self.chat, self.user_id, self.prompt_version, model)
        return identity.digest()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A template and its settings, which make questions from chats.

    Attributes:
      model: the model to ask; decides which blocks are asked.
      max_prompt_tokens: the budget of one prompt, in estimated tokens.
      weights: the version of the model to ask.
      fallback: asks another model if this one does not answer.

    Raises:
      UsageError: the template has a mistake; with file and line.
    """

    template: Template
    model: ModelSpec
    max_prompt_tokens: int = 1536
    weights: Version = FIRST
    fallback: Self | None = None

    def __post_init__(self) -> None:
        self.check_settings()
        for number, (chat, user_id, analysis) in enumerate(_PROBES):
            for block in self.block_names:
                try:
                    text = self._render(block, chat, chat.messages, user_id, analysis)
                except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
                    raise UsageError(self.template.error_at(error)) from None
                if number == 0 and not text:
                    raise UsageError(f"{self.template.where}: block {block} is empty")
        try:
            _ = self.probe
        except BadInputError as error:
            raise UsageError(str(error)) from None

    def texts(self, name: str, usual: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Returns a constant that lists texts, or `usual`; raises `UsageError` for another type."""
        found = self.template.settings.get(name, usual)
        if not isinstance(found, (list, tuple)) or not all(isinstance(x, str) for x in found):
            raise UsageError(f"{self.template.where}: {name} must list texts; found {found!r}")
        return tuple(found)

    @property
    def every(self) -> Iterator[Prompt]:
        """Yields the prompt, and those of other models that it leads to."""
        yield self
        if self.fallback is not None:
            yield self.fallback

    @property
    def block_names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def check_settings(self) -> None:
        raise NotImplementedError

    def part(self, block: str, text: str, lead: str, tail: str) -> Part:
        """Returns the prompt of a block as a part of a request."""
        raise NotImplementedError

    def checked(self, part: Part, chat: Chat, user_id: str) -> Part:
        """Returns a part whose answer is held against the chat, if the model writes freely."""
        return part

    @functools.cached_property
    def words(self) -> Mapping[str, Words]:
        """Returns the fixed texts by language: chatflow's own, and the folder's in their place."""
        known = default_sources()
        sources = {**known, **dict(self.template.sources)}
        return words_of(sources, self.template.folder, known.values())

    @property
    def result_name(self) -> str:
        """Returns the name of the model in results."""
        path = self.weights.path
        return self.weights.named(self.model.base_name) if path else self.model.result_name

    def of(self, chat: Chat) -> Self:
        """Returns this prompt for every chat; `routes.Routed` returns different ones."""
        return self

    @functools.cached_property
    def version(self) -> str:
        tables = [source for source in self.template.sources if source[0].endswith(".toml")]
        return self.template.version(*self.block_names, self.max_prompt_tokens, *tables)

    @functools.cached_property
    def shared(self) -> Mapping[str, str]:
        """Returns, by block, the text that every prompt begins with: instructions and examples."""
        return {block: self._shared(block) for block in self.block_names}

    def _shared(self, block: str) -> str:
        texts = [
            self._render(block, chat, chat.messages, user_id, analysis)
            for chat, user_id, analysis in _PROBES
        ]
        common = os.path.commonprefix(texts)  # noqa: RUF071 (texts, not paths)
        return common[: common.rfind("\n") + 1]  # whole lines, so that no token spans the end

    def _shared_length(self, block: str, text: str) -> int:
        if block not in self.shared:
            return 0
        return len(self.shared[block]) if text.startswith(self.shared[block]) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def question(
        self, chat: Chat, user_id: str, analysis: Analysis | None = None, read: Read | None = None
    ) -> ChatQuestion:
        """Renders all blocks for one user of a chat.

        Raises `BadInputError` (`template_error`) if the template fails on this chat.
        """
        kept = keep(chat, user_id, self._own_budget)
        sentences: tuple[Sentence, ...] = ()
        try:
            parts = [
                self.part(
                    block,
                    self._render(block, chat, kept.messages, user_id, analysis),
                    self._beside(f"{block}_start", chat, kept.messages, user_id, analysis),
                    self._beside(f"{block}_end", chat, kept.messages, user_id, analysis),
                )
                for block in self.block_names
            ]
            parts = [self.checked(part, chat, user_id) for part in parts]
            if READING in self.block_names:
                parts[0], sentences = laid_out(parts[0], chat, kept, user_id)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInputError("template_error", self.template.error_at(error)) from None
        language = self._language(chat, user_id) if analysis is None else analysis.language or ""
        words = self.words.get(language, self.words["en"])
        identity = Identity.of(chat, user_id, self.version, self.result_name)
        otherwise = None
        if self.fallback is not None and self.fallback.block_names:
            with contextlib.suppress(BadInputError):
                otherwise = self.fallback.question(chat, user_id, analysis, read)
        request = Request(
            id=identity.digest(),
            task=self.template.name.removesuffix(".jinja"),
            chat_id=chat.chat_id,
            user_id=user_id,
            parts=tuple(parts),
            model=self.model.key,
            version=self.weights,
            otherwise=otherwise.request if otherwise is not None else None,
        )
        return ChatQuestion(
            request, self.version, self.template.settings,
            chat, user_id, language, words.speakers, words.openings,
            kept.dropped, kept.cut, sentences, analysis, read, None, otherwise,
        )  # fmt: skip

    def _language(self, chat: Chat, user_id: str) -> str:
        return language_of(
            chat.texts_of(user_id),
            chat.attributes.get("language", ""),
            around=[message.text for message in chat.said if message.user_id != user_id],
            usual=tuple(self.words),
        )

    @property
    def probe(self) -> Request:
        """Returns a request of a short chat, like those to expect."""
        return self.question(*_PROBES[0]).request

    def _beside(self, block: str, *values: Any) -> str:
        return self._render(block, *values) if block in self.template.blocks else ""

    def _budget(self, blocks: Sequence[str]) -> int:
        """Returns what the longest of some blocks leaves for a chat, in estimated tokens."""
        chat, user_id, analysis = _PROBES[0]
        longest = max(
            (
                estimate_tokens(self._render(block, chat, chat.messages, user_id, analysis))
                for block in blocks
            ),
            default=0,
        )
        return max(self.max_prompt_tokens - longest, 64)

    @functools.cached_property
    def _own_budget(self) -> int:
        return self._budget(self.block_names)

    def _render(
        self,
        block: str,
        chat: Chat,
        messages: Iterable[Message],
        user_id: str,
        analysis: Analysis | None,
    ) -> str:
        has_roles = any(message.role for message in chat.messages)
        view: dict[str, Any] = {
            # Without its messages, because they may not fit the budget.
            "chat": {k: _data_view(v) for k, v in dict(chat).items() if k != "messages"},
            "messages": [
                {**_data_view(message), "speaker": speaker_of(message, user_id, has_roles)}
                for message in messages
            ],
            "user_id": as_data(user_id),
        }
        if analysis is not None:
            view["analysis"] = _data_view(analysis)
        return self.template.render(block, **view)


def _data_view(value: Any) -> Any:
    """Returns a record as dictionaries for a template, with all its strings made safe."""
    if isinstance(value, (Message, Analysis)):
        return _data_view({k: v for k, v in dict(value).items() if k != "original"})
    if isinstance(value, str):
        return as_data(value)
    if isinstance(value, Mapping):
        return {key: _data_view(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_data_view(item) for item in value]
    return value


READING = "reading"
"""The block of a prompt that is only read."""


def check_summary(
    read: Callable[[str], AnalysisAnswer], chat: Chat, user_id: str, answer: str
) -> None:
    """Raises `BadAnswerError` as `read` does, or if the summary says what the chat does not."""
    if faults := summary_faults(read(answer).summary, chat, user_id):
        raise BadAnswerError("untrue", said_of(faults), answer)


def check_draft(chat: Chat, user_id: str, answer: str) -> None:
    """Raises `BadAnswerError` if a draft says what the chat does not, promises or admits."""
    if faults := draft_faults(answer, chat, user_id):
        raise BadAnswerError("untrue", said_of(faults), answer)


def laid_out(
    part: Part, chat: Chat, kept: KeptMessages, user_id: str
) -> tuple[Part, tuple[Sentence, ...]]:
    """Returns a part with its layout, and the chat's sentences in it.

    Raises `TypeError` if the template does not show all of them.
    """
    seen = chat.model_copy(update={"messages": kept.messages})
    sentences = tuple(sentences_of(seen, user_id))
    layout = layout_of(part.prompt, part.shared, seen, sentences)
    if layout is None:
        raise TypeError("block reading must show each message's text, as it is")
    placed = tuple(s._replace(message=kept.places[s.message]) for s in sentences)
    return dataclasses.replace(part, layout=layout), placed


@functools.lru_cache(maxsize=8)
def _known_heads(path: str, written: float) -> Heads:
    return Heads.load(path)


def tones_of(settings: Mapping[str, Any]) -> dict[str, Sentiment]:
    return {word: Sentiment(value) for word, value in settings["tones"].items()}


def reader(
    settings: Mapping[str, Any], asked_for_summary: bool = True
) -> Callable[[str], AnalysisAnswer]:
    """Returns `answers.parse_analysis` for answers to a template with these settings."""
    return functools.partial(
        parse_analysis,
        summary_characters=settings["summary_characters"],
        tones=tones_of(settings),
        asked_for_summary=asked_for_summary,
    )


@dataclasses.dataclass(frozen=True)
class AnalysisPrompt(Prompt):
    """Asks for tone and summary.

    Attributes:
      second: asks another model about chats of which this one is not sure.
      sure: how sure it has to be, by field; the field `tone` is the sentiment.
    """

    second: AnalysisPrompt | None = None
    sure: tuple[tuple[str, float], ...] = ()

    @property
    def every(self) -> Iterator[Prompt]:
        yield from super().every
        if self.second is not None:
            yield self.second

    def is_unsure(self, analysis: Analysis) -> bool:
        """Returns whether an analysis is less sure of a field than `sure` asks.

        A value without a confidence counts as sure.
        """
        said = {name: field.confidence for name, field in (analysis.fields or {}).items()}
        said["tone"] = analysis.confidence
        return any((said.get(name) or 1.0) < least for name, least in self.sure)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Returns `reading` if the model has heads, `json` if it writes JSON or has no other block.

        If a template has no block `summary`, chatflow composes the summaries.
        """
        blocks = self.template.blocks
        if READING in blocks and self.model.own_heads:
            return (READING,)
        if "json" in blocks and (self.model.writes_json or "tone" not in blocks):
            return ("json",)
        return ("tone", "summary") if "summary" in blocks else ("tone",)

    @functools.cached_property
    def suffixes(self) -> tuple[Suffix, ...]:
        """Returns the questions asked after a chat that is read: the choices without heads."""
        return tuple(
            Suffix(
                choice.name,
                f"\n{choice.ask}",
                tuple(choice.values),
                tuple(f" {value.replace('_', ' ')}" for value in choice.values),
            )
            for choice in self.choices
            if choice.by == SUFFIX
        )

    def checked(self, part: Part, chat: Chat, user_id: str) -> Part:
        if part.check is None:
            return part
        read = reader(self.template.settings)
        check = functools.partial(check_summary, read, chat, user_id)
        return dataclasses.replace(part, check=check)

    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Returns the choices made about a chat that is read."""
        return choices_of(dict(self.template.sources), self.template.folder)

    def check_settings(self) -> None:
        where = self.template.where
        missing = [block for block in self.block_names if block not in self.template.blocks]
        if self.model.kind.asked_by_json and "json" not in self.template.blocks:
            missing = ["json, which remote models need"]
        if missing:
            raise UsageError(f"{where}: has no block {' and no block '.join(missing)}")
        tones = self.template.setting("tones", dict)
        if sorted(tones.values()) != sorted(Sentiment) or not all(
            isinstance(word, str) and word for word in tones
        ):
            raise UsageError(f"{where}: tones must map three words to -1, 0 and 1; found {tones!r}")
        limit = self.template.setting("summary_characters", int)
        if not 1 <= limit <= SUMMARY_CHARACTERS:
            raise UsageError(
                f"{where}: summary_characters must be 1 to {SUMMARY_CHARACTERS}; found {limit}"
            )
        grounding = self.template.setting("summary_grounding", (int, float))
        if not 0 <= grounding <= 1:
            raise UsageError(f"{where}: summary_grounding must be 0 to 1; found {grounding}")
        if self.template.setting("answer_tokens", int) < 1:
            raise UsageError(f"{where}: answer_tokens must be at least 1")
        fitted = self.template.settings.get("tone_bias", {})
        if not isinstance(fitted, dict):
            raise UsageError(f"{where}: tone_bias must map models to numbers by tone")
        for model, bias in fitted.items():
            if not isinstance(bias, dict) or set(bias) != set(tones):
                raise UsageError(
                    f"{where}: tone_bias of {model!r} must have a number for each of {list(tones)}"
                )

        languages = self.template.settings.get("proven_languages", [])
        if not isinstance(languages, (list, tuple)) or not all(
            isinstance(language, str) for language in languages
        ):
            raise UsageError(f"{where}: proven_languages must list codes; found {languages!r}")
        _ = self.words
        if READING in self.block_names:
            self._check_heads()
        temperatures = self.template.settings.get("tone_temperature", {})
        if not isinstance(temperatures, dict) or not all(
            isinstance(value, (int, float)) and value > 0 for value in temperatures.values()
        ):
            raise UsageError(f"{where}: tone_temperature must map models to numbers above 0")

    def _check_heads(self) -> None:
        """Raises `UsageError` if the heads were fitted for other choices or another template."""
        heads = self.model.own_heads
        path = local_heads(heads)
        known = _known_heads(path, os.path.getmtime(path) if os.path.exists(path) else 0)
        made = {head.name: (head.over, head.kind, head.values) for head in known.heads}
        where = f"--heads={heads}: "
        if known.template != self.reading_hash:
            raise UsageError(
                f"{where}fitted on chats as shown by another template than "
                f"{self.template.where}, block reading; fit others with `chatflow tune`, or give "
                "--heads=none"
            )
        for choice in self.choices:
            found = made.get(choice.name)
            if choice.by == HEAD and found != (choice.over, choice.kind, tuple(choice.values)):
                raise UsageError(
                    f"{where}has no head for {choice.name} as {self.template.folder}/choices.toml "
                    "declares it; fit one with `chatflow tune`"
                )
        if (tone := made.get("tone")) is None or set(tone[2]) != set(self.tones):
            raise UsageError(f"{where}has no head for the tone, of {', '.join(self.tones)}")

    @functools.cached_property
    def reading_hash(self) -> str:
        """Returns a hash of how a chat is shown to be read, whatever comments a template has."""
        chat, user_id, _ = _PROBES[0]
        shown = self._render(READING, chat, chat.messages, user_id, None)
        return hashlib.sha256(shown.encode()).hexdigest()[:16]

    @property
    def tones(self) -> dict[str, Sentiment]:
        return tones_of(self.template.settings)

    @property
    def tone_bias(self) -> dict[str, float] | None:
        """Returns the numbers to subtract from tone scores; None if not fitted for the model."""
        found = self._fitted("tone_bias")
        return {word: float(value) for word, value in found.items()} if found else None

    def _fitted(self, name: str) -> Any:
        """Returns a constant's entry for this model, or None; new weights may use their model's."""
        table = self.template.settings.get(name, {})
        model = self.model
        for known in (self.result_name, model.result_name, model.base_name):
            if known in table:
                return table[known]
        return None

    def reading(self, chat: Chat, user_id: str) -> tuple[Part, tuple[Sentence, ...]]:
        """Returns the part that is read of a chat, and its sentences, for any model.

        Raises `BadInputError` (`template_error`) if the template fails on this chat.
        """
        kept = keep(chat, user_id, self._budget([READING]))
        try:
            text = self._render(READING, chat, kept.messages, user_id, None)
            part = self.part(READING, text, "", "")
            return laid_out(part, chat, kept, user_id)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInputError("template_error", self.template.error_at(error)) from None

    def part(self, block: str, text: str, lead: str, tail: str) -> Part:
        settings = self.template.settings
        if block == "tone":
            bias = self.tone_bias or dict.fromkeys(self.tones, 0.0)
            return Part(
                field="sentiment",
                prompt=text,
                shared=self._shared_length(block, text),
                choices=tuple(("" if self.model.instruct else " ") + word for word in self.tones),
                values=tuple(int(value) for value in self.tones.values()),
                bias=tuple(bias[word] for word in self.tones),
                temperature=float(self._fitted("tone_temperature") or 1.0),
            )
        if block == READING:
            return Part(
                field=None,
                prompt=text,
                shared=self._shared_length(block, text),
                suffixes=self.suffixes,
            )
        common: dict[str, Any] = {
            "prompt": text,
            "shared": self._shared_length(block, text),
            "max_tokens": settings["answer_tokens"],
        }
        characters = settings["summary_characters"] - 1  # room for an ellipsis
        if block == "json":
            return Part(
                field=None,
                schema=ANALYSIS_SCHEMA,
                characters=max(1, characters),
                check=reader(settings),
                **common,
            )
        return Part(
            field="summary",
            lead=lead,
            tail=tail,
            stop=self.texts("stop", ("\n",)),
            characters=max(1, characters - len(lead) - len(tail)),
            **common,
        )


@dataclasses.dataclass(frozen=True)
class DraftPrompt(Prompt):
    """Asks for an apology to an angry user; without a block `draft`, chatflow composes it."""

    @property
    def block_names(self) -> tuple[str, ...]:
        return ("draft",) if "draft" in self.template.blocks else ()

    def checked(self, part: Part, chat: Chat, user_id: str) -> Part:
        return dataclasses.replace(part, check=functools.partial(check_draft, chat, user_id))

    def check_settings(self) -> None:
        where = self.template.where
        _ = self.words
        for name in ("draft_characters", "answer_tokens") if self.block_names else ():
            if self.template.setting(name, int) < 1:
                raise UsageError(f"{where}: {name} must be at least 1")
        for name in ("draft_confidence", "draft_grounding"):
            least = self.template.settings.get(name, 0)
            if not isinstance(least, (int, float)) or not 0 <= least <= 1:
                raise UsageError(f"{where}: {name} must be 0 to 1; found {least!r}")
        if self.template.settings.get("draft_confidence", 0) and self.model.writes_json:
            raise UsageError(
                f"{where}: draft_confidence: {self.model.name} does not score the tone, so its "
                "confidence is not known; leave draft_confidence out"
            )
        self.texts("refused_phrases")
        if not isinstance(self.template.settings.get("flag_accusations", False), bool):
            raise UsageError(f"{where}: flag_accusations must be true or false")

    def part(self, block: str, text: str, lead: str, tail: str) -> Part:
        settings = self.template.settings
        return Part(
            field=None,
            prompt=text,
            shared=self._shared_length(block, text),
            lead=lead,
            tail=tail,
            max_tokens=settings["answer_tokens"],
            stop=self.texts("stop"),
        )


def _probe(number: int, words: str) -> tuple[Chat, str, Analysis]:
    user = f"{number}{words[0]}"
    messages = (
        Message(user_id=user, role="customer", text=words, sent_at=now(), message_id="1"),
        Message(user_id=f"{words[1]}{number}", text=words[::-1]),
    )
    chat = Chat(chat_id=f"{number}", messages=messages, attributes={})
    analysis = Analysis(
        analysis_id=words, chat_id=chat.chat_id, user_id=user, revision=0,
        sentiment=Sentiment.ANGRY, summary=words, model="probe", prompt_version="0",
        analysed_at=now(),
    )  # fmt: skip
    return chat, user, analysis


# Two chats without any common text: what their prompts share comes from the template.
_PROBES = (_probe(1, "alpha beta"), _probe(2, "gamma delta"))
