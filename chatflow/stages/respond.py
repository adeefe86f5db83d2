"""AskTexts: transforms plain texts into model responses, e.g. sentences to translate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import jinja2

from chatflow.chat_text import as_data, estimate_tokens
from chatflow.coders import register
from chatflow.dead_letters import DeadLettered, Outcome, payload_of
from chatflow.errors import BadAnswerError, BadInputError, UsageError
from chatflow.models.requests import Part, Request
from chatflow.models.several import SeveralModelsHandler
from chatflow.models.spec import Model
from chatflow.prompts.questions import Question
from chatflow.prompts.templates import Template
from chatflow.records import Arrival, Response, digest, now
from chatflow.stages.ask import Answered, AskModel


@dataclasses.dataclass(frozen=True)
class TextQuestion(Question):
    """A request about a text; `arrival` is the original text."""

    arrival: Arrival


register(TextQuestion)


@payload_of.register
def _text_payload(question: TextQuestion) -> dict[str, Any]:
    return payload_of(question.arrival)


@beam.typehints.with_input_types(Arrival)
@dataclasses.dataclass
class AskTexts(beam.PTransform):
    """Turns texts into responses: renders the prompt, asks the model, and takes its answer.

    Attributes:
      template: its block `prompt` gets `text` and `values`; it sets `answer_tokens`, and can set
        `stop` (texts that end a response).
      max_prompt_tokens: counted by `chat_text.estimate_tokens`; longer prompts become dead letters.

    Outputs:
      `ok`: one `Response` per text.
      `dead_letters`: one letter, with the reason, per text without a response. The payload is the
        original line. To ask again, publish it or add it to an input file; `chatflow replay` works
        only for chats.

    Raises:
      UsageError: the template has a mistake or leaves no room, or there are several models.
    """

    model: Model
    template: Template
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    max_prompt_tokens: int = 1536

    def __post_init__(self) -> None:
        if isinstance(self.model.handler, SeveralModelsHandler):
            raise UsageError("AskTexts: model: must be a single model, not several")
        if "prompt" not in self.template.blocks:
            raise UsageError(f"{self.template.where}: has no block prompt")
        if self.template.setting("answer_tokens", int) < 1:
            raise UsageError(f"{self.template.where}: answer_tokens must be at least 1")
        try:
            self.ask(Arrival(b"text"))
        except BadInputError as error:
            raise UsageError(str(error)) from None

    @property
    def version(self) -> str:
        return self.template.version(*sorted(self.values.items()))

    def expand(self, texts: beam.PCollection[Arrival]) -> Outcome:
        asked = texts | "RenderPrompt" >> DeadLettered("prompt", self.ask, TextQuestion)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "model")
        taken = answered.ok | "TakeResponse" >> DeadLettered("answer", self.take, Response)
        failed = (asked.dead_letters, answered.dead_letters, taken.dead_letters)
        return Outcome(taken.ok, failed | beam.Flatten())

    def ask(self, arrival: Arrival) -> list[TextQuestion]:
        """Returns the question about one text.

        Raises:
          BadInputError: `not_utf8`, `no_text`, `template_error` or `prompt_too_long`.
        """
        try:
            text = as_data(arrival.read().decode())
        except UnicodeDecodeError as error:
            raise BadInputError("not_utf8", f"the text is not UTF-8: {error}") from None
        if not text:
            raise BadInputError("no_text", "the text is empty")
        try:
            prompt = self.template.render("prompt", text=text, **self.values)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInputError("template_error", self.template.error_at(error)) from None
        if (tokens := estimate_tokens(prompt)) > self.max_prompt_tokens:
            raise BadInputError(
                "prompt_too_long",
                f"the prompt has about {tokens:,} tokens; max_prompt_tokens is "
                f"{self.max_prompt_tokens:,}: shorten the text, or raise this limit",
            )
        settings = self.template.settings
        part = Part(
            field=None,
            prompt=prompt,
            max_tokens=settings["answer_tokens"],
            stop=tuple(settings.get("stop", ())),
        )
        own_id = digest(arrival.message_id or "", text, self.version, self.model.handler.name)
        task = self.template.name.removesuffix(".jinja")
        request = Request(own_id, task, chat_id=own_id, user_id="", parts=(part,))
        return [TextQuestion(request, self.version, settings, arrival)]

    def take(self, answered: Answered[TextQuestion]) -> Iterable[Response]:
        """Yields the model's response; raises `BadAnswerError`: `empty_answer`."""
        question, answer = answered
        arrival = question.arrival
        if not answer.text.strip():
            said = f"the response is empty{answer.circumstances}"
            raise BadAnswerError("empty_answer", said, answer.text)
        yield Response(
            response_id=question.request.id,
            text=arrival.line.decode(),
            response=answer.text.strip(),
            message_id=arrival.message_id,
            attributes=dict(arrival.attributes) or None,
            finish_reason=answer.finish_reason,
            model=answer.model,
            prompt_version=self.version,
            responded_at=now(),
        )
