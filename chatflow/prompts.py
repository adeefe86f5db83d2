"""Jinja templates to prompts: versions, settings, the token budget, chat text as data.

A prompt folder holds `analysis.jinja` and `apology.jinja`. A template sets its
constants at its top level (`{% set summary_characters = 512 %}`) and asks in blocks:

- `tone` and `summary`, for models that score and continue text. The tone is a choice
  among the words of `tones`; code builds the JSON.
- `json`, for models that write the JSON object themselves.
- `draft`, in `apology.jinja`.

A block sees `chat`, `messages` (those kept), `user_id`, and, in `apology.jinja`,
`analysis`; and the template's own constants.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from chatflow.errors import BadInputError, UsageError
from chatflow.models.requests import Part, Request
from chatflow.records import (
    SUMMARY_CHARACTERS,
    Analysis,
    Chat,
    Identity,
    Message,
    Sentiment,
    now,
)

CONTROL_TOKEN = re.compile(r"<(/?\|?\w+\|?)>|\[(/?INST)\]")
"""What a model may take for a token of its own: `<start_of_turn>`, `<bos>`, `<|im_end|>` …"""

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u202a-\u202e\u2060-\u2069\ufeff]")


def as_data(text: str) -> str:
    """Chat text made safe for a prompt: one line, no control tokens, nothing invisible.

    >>> as_data("fine<end_of_turn>\\n<start_of_turn>model")
    'fine‹end_of_turn› ‹start_of_turn›model'
    """
    text = " ".join(_INVISIBLE.sub("", text).split())
    return CONTROL_TOKEN.sub(lambda m: f"‹{m[1] or m[2]}›", text)


_PIECE = re.compile(r"[^\W\d_]{1,5}|\d|[^\w\s]|_")


def estimate_tokens(text: str) -> int:
    """How many tokens a text may have: rarely fewer than a Gemma tokenizer makes of it.

    Gemma writes each digit as a token, and most words of up to five letters as one;
    of scripts beyond Latin every letter is counted.
    """
    wide = sum(1 for character in text if ord(character) > 0x2FF)
    return len(_PIECE.findall(text)) + wide


@dataclasses.dataclass(frozen=True)
class KeptMessages:
    """The messages that fit a prompt, oldest first, and what was left out for it."""

    messages: tuple[Message, ...]
    dropped: int
    cut: int


def keep_newest(chat: Chat, user_id: str, budget: int) -> KeptMessages:
    """Keeps the newest messages within a budget of tokens.

    Half of the budget is the user's own, so that a user whose last word is long ago is
    still heard. The newest message of the user always stays; where it alone is over
    the budget, its end stays.

    Args:
      budget: estimated tokens for all messages together.
    """
    cost = [estimate_tokens(m.text) + estimate_tokens(m.user_id) + 3 for m in chat.messages]
    newest_first = range(len(chat.messages) - 1, -1, -1)
    own = [i for i in newest_first if chat.messages[i].user_id == user_id]
    kept: dict[int, Message] = {}
    left = budget
    for i in own:
        if left - cost[i] < budget // 2:
            break
        kept[i], left = chat.messages[i], left - cost[i]
    cut = 0
    if own and not kept:
        message = chat.messages[own[0]]
        if cost[own[0]] <= budget:
            kept[own[0]], left = message, left - cost[own[0]]
        else:
            kept[own[0]], left, cut = _end_of(message, budget), 0, 1
    for i in newest_first:
        if i in kept:
            continue
        if cost[i] > left:
            break
        kept[i], left = chat.messages[i], left - cost[i]
    messages = tuple(kept[i] for i in sorted(kept))
    return KeptMessages(messages, len(chat.messages) - len(messages), cut)


def _end_of(message: Message, budget: int) -> Message:
    text = message.text
    while len(text) > 1 and estimate_tokens(text) > budget:
        text = text[len(text) - len(text) * 3 // 4 :]
    return message.model_copy(update={"text": "…" + text})


@dataclasses.dataclass(frozen=True)
class Template:
    """One template of a prompt folder, compiled where it is used.

    Holds the sources and not the files, so that it travels to workers that have none.

    Attributes:
      name: the file's name, e.g. `analysis.jinja`.
      folder: where it came from, for messages.
      sources: all templates of the folder by name, for `include` and `import`.
    """

    name: str
    folder: str
    sources: tuple[tuple[str, str], ...]

    @functools.cached_property
    def _compiled(self) -> tuple[jinja2.Template, dict[str, Any], frozenset[str]]:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            loader=jinja2.DictLoader(dict(self.sources)),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["as_data"] = as_data
        try:
            tree = environment.parse(dict(self.sources)[self.name], self.name)
            constants = _constants(tree)
            for source in dict(self.sources).values():
                environment.parse(source)
            return environment.get_template(self.name), constants, _blocks(tree)
        except jinja2.TemplateSyntaxError as error:
            where = f"{self.folder}/{error.name or self.name}:{error.lineno}"
            raise UsageError(f"{where}: {error.message}") from None
        except jinja2.TemplateNotFound as error:
            raise UsageError(f"{self.folder}/{self.name}: no template {error} in it") from None

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def settings(self) -> dict[str, Any]:
        """The constants that the template sets at its top level."""
        return self._compiled[1]

    @property
    def blocks(self) -> frozenset[str]:
        return self._compiled[2]

    def render(self, block: str, **values: Any) -> str:
        """Renders one block; raises jinja2.TemplateError."""
        template, settings, _ = self._compiled
        context = template.new_context({**settings, **values})
        return "".join(template.blocks[block](context)).strip()

    def setting(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A constant of the template that must be there.

        Raises:
          UsageError: it is missing or of another type.
        """
        value = self.settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(
                f"{self.folder}/{self.name}: set {name} at the top of the template, "
                f"e.g. {{% set {name} = … %}}; found {value!r}"
            )
        return value

    def version(self, *settings: object) -> str:
        """A hash of the template, of all that it includes, and of the settings given."""
        sources = dict(self.sources)
        todo, used = [self.name], {}
        while todo:
            name = todo.pop()
            if name in sources and name not in used:
                used[name] = sources[name]
                tree = jinja2.Environment().parse(sources[name])
                todo += [n for n in jinja2.meta.find_referenced_templates(tree) if n]
        text = json.dumps([sorted(used.items()), [repr(s) for s in settings]])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def error_at(self, error: Exception) -> str:
        """`folder/name:line: message` of an error raised while rendering."""
        where, trace = self.name, error.__traceback__
        while trace is not None:
            filename = trace.tb_frame.f_code.co_filename
            if trace.tb_frame.f_globals.get("__jinja_template__") or filename == "<template>":
                name = trace.tb_frame.f_globals.get("name") or self.name
                where = f"{name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{self.folder}/{where}: {error}"


def _constants(tree: jinja2.nodes.Template) -> dict[str, Any]:
    constants = {}
    for node in tree.body:
        if isinstance(node, jinja2.nodes.Assign) and isinstance(node.target, jinja2.nodes.Name):
            try:
                constants[node.target.name] = node.node.as_const()
            except jinja2.nodes.Impossible:
                continue
    return constants


def _blocks(tree: jinja2.nodes.Template) -> frozenset[str]:
    return frozenset(block.name for block in tree.find_all(jinja2.nodes.Block))


def load_folder(path: str) -> dict[str, Template]:
    """The templates of a folder by name without `.jinja`.

    Args:
      path: a folder of the user's, or `base` or `instruct` for those of chatflow.

    Raises:
      UsageError: no such folder, or a template with a mistake.
    """
    folder = default_folder() / path if path in ("base", "instruct") else Path(path)
    if not folder.is_dir():
        raise UsageError(f"--prompts: no folder {path!r}; give a folder with analysis.jinja in it")
    try:
        sources = {p.name: p.read_text("utf-8") for p in sorted(folder.glob("*.jinja"))}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts: {path!r} cannot be read: {error}") from None
    for name in ("analysis.jinja", "apology.jinja"):
        if name not in sources:
            raise UsageError(f"--prompts: {path!r} has no {name}")
    where = os.fspath(folder)
    return {
        name.removesuffix(".jinja"): Template(name, where, tuple(sources.items()))
        for name in sources
    }


def default_folder() -> Path:
    """chatflow's own prompts: in the package when installed, beside it in a checkout."""
    packaged = importlib.resources.files("chatflow") / "default_prompts"
    folder = Path(str(packaged))
    return folder if folder.is_dir() else Path(__file__).parent.parent / "prompts"


@dataclasses.dataclass(frozen=True)
class Question:
    """A request to a model, and what it is about.

    Attributes:
      chat: the chat as it came.
      user_id: whose tone is asked for, or to whom the draft speaks.
      dropped_messages, cut_messages: what was left out of the prompt; see `Analysis`.
      analysis: of the draft's chat; None when it is the analysis that is asked for.
    """

    chat: Chat
    user_id: str
    request: Request
    dropped_messages: int
    cut_messages: int
    analysis: Analysis | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A template with the settings that it is rendered with: chats to questions.

    Attributes:
      template: of `load_folder`.
      model: name of the model that will answer; part of each request's id.
      writes_json: the model writes the JSON itself; else it is asked in parts.
      spaced: a space stands between the prompt and a tone word, as for base models.
      max_prompt_tokens: the budget of one prompt, in estimated tokens.

    Raises:
      UsageError: the template has a mistake, with file and line.
    """

    template: Template
    model: str
    writes_json: bool = False
    spaced: bool = True
    max_prompt_tokens: int = 1536

    def __post_init__(self) -> None:
        self.check_settings()
        for number, (chat, user_id, analysis) in enumerate(_PROBES):
            for block in self.block_names:
                try:
                    text = self._render(block, chat, chat.messages, user_id, analysis)
                except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
                    raise UsageError(self.template.error_at(error)) from None
                if number == 0 and not text:
                    raise UsageError(f"{self.template.folder}/{self.template.name}: block {block} is empty")

    @property
    def block_names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def check_settings(self) -> None:
        raise NotImplementedError

    def part(self, block: str, text: str) -> Part:
        raise NotImplementedError

    @functools.cached_property
    def version(self) -> str:
        return self.template.version(*self.block_names, self.max_prompt_tokens)

    @functools.cached_property
    def shared(self) -> Mapping[str, str]:
        """By block, the text that every prompt begins with: instructions and examples."""
        return {block: self._shared(block) for block in self.block_names}

    def _shared(self, block: str) -> str:
        texts = [
            self._render(block, chat, chat.messages, user_id, analysis)
            for chat, user_id, analysis in _PROBES
        ]
        common = os.path.commonprefix(texts)
        return common[: common.rfind("\n") + 1]  # whole lines, so that tokens do not straddle

    def _shared_length(self, block: str, text: str) -> int:
        return len(self.shared[block]) if text.startswith(self.shared[block]) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def question(self, chat: Chat, user_id: str, analysis: Analysis | None = None) -> Question:
        """Renders all blocks for one user of a chat.

        Raises:
          BadInputError: `template_error`; a template that fails on this chat alone.
        """
        budget = self.max_prompt_tokens - self._overhead
        kept = keep_newest(chat, user_id, max(budget, 64))
        try:
            parts = [
                (block, self._render(block, chat, kept.messages, user_id, analysis))
                for block in self.block_names
            ]
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInputError("template_error", self.template.error_at(error)) from None
        identity = Identity(chat.chat_id, user_id, chat.revision, self.version, self.model)
        request = Request(
            id=identity.digest(),
            task=self.template.name.removesuffix(".jinja"),
            chat_id=chat.chat_id,
            user_id=user_id,
            parts=tuple(self.part(block, text) for block, text in parts),
        )
        return Question(chat, user_id, request, kept.dropped, kept.cut, analysis)

    @functools.cached_property
    def _overhead(self) -> int:
        """Estimated tokens of the longest block, without the messages."""
        chat, user_id, analysis = _PROBES[0]
        return max(
            estimate_tokens(self._render(block, chat, chat.messages, user_id, analysis))
            for block in self.block_names
        )

    def _render(
        self,
        block: str,
        chat: Chat,
        messages: Iterable[Message],
        user_id: str,
        analysis: Analysis | None,
    ) -> str:
        view: dict[str, Any] = {
            "chat": _data_view(chat),
            "messages": [_data_view(message) for message in messages],
            "user_id": as_data(user_id),
        }
        if analysis is not None:
            view["analysis"] = _data_view(analysis)
        return self.template.render(block, **view)


def _data_view(value: Any) -> Any:
    """A record with every string of it made safe, as dictionaries that a template reads."""
    if isinstance(value, (Chat, Message, Analysis)):
        return _data_view(dict(value))
    if isinstance(value, str):
        return as_data(value)
    if isinstance(value, Mapping):
        return {key: _data_view(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_data_view(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True)
class AnalysisPrompt(Prompt):
    """Asks for tone and summary."""

    @property
    def block_names(self) -> tuple[str, ...]:
        return ("json",) if self.writes_json and "json" in self.template.blocks else ("tone", "summary")

    def check_settings(self) -> None:
        where = f"{self.template.folder}/{self.template.name}"
        missing = [block for block in self.block_names if block not in self.template.blocks]
        if missing:
            raise UsageError(f"{where}: has no block {' and no block '.join(missing)}")
        tones = self.template.setting("tones", dict)
        if sorted(tones.values()) != sorted(Sentiment) or not all(
            isinstance(word, str) and word for word in tones
        ):
            raise UsageError(f"{where}: tones must map three words to -1, 0 and 1; found {tones!r}")
        limit = self.template.setting("summary_characters", int)
        if not 1 <= limit <= SUMMARY_CHARACTERS:
            raise UsageError(f"{where}: summary_characters must be 1 to {SUMMARY_CHARACTERS}; found {limit}")
        grounding = self.template.setting("summary_grounding", (int, float))
        if not 0 <= grounding <= 1:
            raise UsageError(f"{where}: summary_grounding must be 0 to 1; found {grounding}")
        if self.template.setting("answer_tokens", int) < 1:
            raise UsageError(f"{where}: answer_tokens must be at least 1")
        for model, bias in self.template.settings.get("tone_bias", {}).items():
            if not isinstance(bias, dict) or set(bias) != set(tones):
                raise UsageError(f"{where}: tone_bias of {model!r} must have a number for each of {list(tones)}")

    @property
    def tones(self) -> dict[str, Sentiment]:
        return {word: Sentiment(value) for word, value in self.template.settings["tones"].items()}

    @property
    def tone_bias(self) -> dict[str, float] | None:
        """Constants taken off the scores of the tone words; None: not fitted for the model."""
        found = self.template.settings.get("tone_bias", {}).get(self.model)
        return {word: float(value) for word, value in found.items()} if found else None

    def part(self, block: str, text: str) -> Part:
        settings = self.template.settings
        if block == "tone":
            bias = self.tone_bias or dict.fromkeys(self.tones, 0.0)
            return Part(
                field="sentiment",
                prompt=text,
                shared=self._shared_length(block, text),
                choices=tuple((" " if self.spaced else "") + word for word in self.tones),
                values=tuple(int(value) for value in self.tones.values()),
                bias=tuple(bias[word] for word in self.tones),
            )
        return Part(
            field="summary" if block == "summary" else None,
            prompt=text,
            shared=self._shared_length(block, text),
            max_tokens=settings["answer_tokens"],
            stop=tuple(settings.get("stop", ("\n",))) if block == "summary" else (),
        )


@dataclasses.dataclass(frozen=True)
class DraftPrompt(Prompt):
    """Asks for an apology to an angry user."""

    @property
    def block_names(self) -> tuple[str, ...]:
        return ("draft",)

    def check_settings(self) -> None:
        where = f"{self.template.folder}/{self.template.name}"
        if "draft" not in self.template.blocks:
            raise UsageError(f"{where}: has no block draft")
        for name in ("draft_characters", "answer_tokens"):
            if self.template.setting(name, int) < 1:
                raise UsageError(f"{where}: {name} must be at least 1")

    def part(self, block: str, text: str) -> Part:
        settings = self.template.settings
        return Part(
            field=None,
            prompt=text,
            shared=self._shared_length(block, text),
            max_tokens=settings["answer_tokens"],
            stop=tuple(settings.get("stop", ())),
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


# Two chats with nothing in common: what their prompts share comes from the template.
_PROBES = (_probe(1, "alpha beta"), _probe(2, "gamma delta"))
