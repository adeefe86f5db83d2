"""AskTexts: texts that are no chats to a model's responses, e.g. sentences to translate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import jinja2

from chatflow.asking import Answered, AskModel
from chatflow.chat_text import as_data
from chatflow.dead_letters import DeadLettered, Outcome, payload_of
from chatflow.errors import BadAnswerError, BadInputError, UsageError
from chatflow.models import Model
from chatflow.models.requests import Part, Request
from chatflow.prompts import Question
from chatflow.records import Arrival, Chat, Response, digest, now
from chatflow.templates import Template


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextQuestion(Question):
    """A request about a text. There is no chat that it is about.

    Attributes:
      arrival: the text, as it came.
    """

    arrival: Arrival


@payload_of.register
def _text_payload(question: TextQuestion) -> dict[str, Any]:
    return payload_of(question.arrival)


@beam.typehints.with_input_types(Arrival)
@dataclasses.dataclass
class AskTexts(beam.PTransform):
    """Texts to responses: render the prompt, ask the model, take what it says.

    Attributes:
      model: who answers; see `chatflow.models`.
      template: its block `prompt` sees the `text`, and `values`; it sets `answer_tokens`, and may
        set `stop`, texts that end a response.
      values: what else the template sees.

    Outputs:
      `ok`: a `Response` for each text.
      `dead_letters`: a letter for each text that has none, with the reason.

    Raises:
      UsageError: the template has a mistake, with file and line.
    """

    model: Model
    template: Template
    values: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
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
        asked = texts | "RenderPrompt" >> DeadLettered("prompt", self.ask, Question)
        answered = asked.ok | "AskModel" >> AskModel(self.model, "model")
        taken = answered.ok | "TakeResponse" >> DeadLettered("answer", self.take, Response)
        failed = (asked.dead_letters, answered.dead_letters, taken.dead_letters)
        return Outcome(taken.ok, failed | beam.Flatten())

    def ask(self, arrival: Arrival) -> list[Question]:
        """The question of one text.

        Raises:
          BadInputError: `not_utf8`, `no_text` or `template_error`.
        """
        try:
            text = as_data(arrival.line.decode())
        except UnicodeDecodeError as error:
            raise BadInputError("not_utf8", f"the text is not UTF-8: {error}") from None
        if not text:
            raise BadInputError("no_text", "the text is empty")
        try:
            prompt = self.template.render("prompt", text=text, **self.values)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInputError("template_error", self.template.error_at(error)) from None
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
        nobody = Chat(chat_id=own_id, messages=())
        question = TextQuestion(nobody, "", request, 0, 0, self.version, settings, arrival=arrival)
        return [question]

    def take(self, answered: Answered) -> Iterable[Response]:
        """What the model said.

        Raises:
          BadAnswerError: `empty_answer`.
        """
        question, answer = answered
        assert isinstance(question, TextQuestion)  # of ask
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
