"""What leaves a worker between two steps: JSON, which other versions can read."""

import json
from datetime import UTC, datetime
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import PredictionResult
from conftest import ANALYSIS, ANGRY, APOLOGY, DRAFT

from chatflow.choices.heads import Chosen, Read
from chatflow.choices.reading import Layout
from chatflow.choices.sentences import Sentence
from chatflow.models.requests import Answer, Failure, Part, Request, Suffix, Version
from chatflow.options import Options
from chatflow.pipeline import build, plan
from chatflow.prompts.questions import ChatQuestion
from chatflow.records import (
    AnalysedChat,
    Arrival,
    Chat,
    DeadLetter,
    Event,
    Fault,
    FieldValue,
    Message,
    Range,
    RawChat,
    Redaction,
    Response,
)
from chatflow.running.runner import beam_options
from chatflow.stages.ask import Prediction
from chatflow.stages.respond import TextQuestion

WRITTEN = Path(__file__).parent / "encoded.json"
"""What version 0.3.0 wrote of `ELEMENTS`, by name; see the last line of this file."""

AT = datetime(2026, 3, 1, 10, 0, 0, 250_000, tzinfo=UTC)
SAID = Message(
    user_id="c", text="My “bag” is lost 😡", role="customer", message_id="m1", sent_at=AT,
    attributes={"channel": "mail"}, original="> old\nMy “bag” is lost 😡",
)  # fmt: skip
NOTE = Message(user_id="a", text="Rude.", role="agent", private=True)
CHAT = Chat(
    chat_id="7", messages=(SAID, NOTE), user_id="c", attributes={"tenant": "acme"}, revision=9,
    redacted=(Redaction(message=0, start=3, end=8, kind="name"),),
)  # fmt: skip
READ = Read(
    (Sentence(0, 0, 19, SAID.text, "Customer", 0, 1),),
    Chosen(
        {"tone": {"angry": 0.9, "happy": 0.1}}, {"evidence": ((0.25, 0.75),)},
        {"tone": ("angry", "happy"), "evidence": ("no", "yes")}, frozenset({"grievances"}),
    ),
)  # fmt: skip
ANALYSED = ANALYSIS.model_copy(
    update={
        "fields": {"topic": FieldValue(value=("delivery", "refund"), confidence=0.5)},
        "tone_scores": {"angry": -0.1, "happy": -2.5},
    }
)
PARTS = (
    Part(
        None, "Read this:\nCustomer: My bag is lost", shared=11,
        layout=Layout((12, 20), (1,), (0,), (True,), ((0.5, 1.0),)),
        suffixes=(Suffix("resolved", "\nSolved?", ("yes", "no"), (" yes", " no")),),
    ),
    Part(
        "sentiment", "How?", choices=(" angry", " happy"), values=(-1, 1), bias=(0.5, 0.0),
        temperature=2.0,
    ),
    Part("summary", "What?", lead="c wants", tail=".", max_tokens=9, stop=("\n",), characters=511),
)  # fmt: skip


def question(**more):
    request = Request("q1", "analysis", "7", "c", PARTS, "gemma#1", Version(1.5, "gs://b/x", 2.5))
    made = {
        "request": request, "prompt_version": "v1", "settings": {"tones": {"angry": -1}, "a": [1]},
        "chat": CHAT, "user_id": "c", "content": CHAT.content(), "language": "en",
        "speakers": {"Customer": "Customer"}, "openings": {"resolved": "Solved."},
        "dropped_messages": 1, "cut_messages": 0, "sentences": READ.sentences,
    }  # fmt: skip
    return ChatQuestion(**{**made, **more})


ELEMENTS = {
    "range": (Range, Range("/chats/a.jsonl", 64, None)),
    "arrival": (
        Arrival, Arrival(b"\xff{}", {"chat_id": "7"}, "m1", AT, "a.jsonl, line 1", 1, "a"),
    ),
    "arrival with a fault": (
        Arrival, Arrival(b"", fault=Fault("corrupt_file", "it is damaged", Range("a", 1, 2))),
    ),
    "event": (Event, Event(chat_id="7", message=SAID, at=AT)),
    "close": (Event, Event(chat_id="7", at=AT)),
    "chat": (Chat, CHAT),
    "raw chat": (RawChat, RawChat(chat_id="7", revision=9, chat=CHAT, placeholders={"[A]": "b"})),
    "analysis": (type(ANALYSED), ANALYSED),
    "draft": (type(DRAFT), DRAFT),
    "dead letter": (
        DeadLetter,
        DeadLetter(
            stage="read", reason="not_json", error="no", payload="{", failed_at=AT,
            attributes={"a": "b"},
        ),
    ),
    "response": (
        Response,
        Response(
            response_id="r", text="Hi", response="Hallo", model="m", prompt_version="v",
            responded_at=AT,
        ),
    ),
    "analysed chat": (AnalysedChat, AnalysedChat(CHAT, ANALYSED, READ)),
    "question": (ChatQuestion, question()),
    "question for a draft": (
        ChatQuestion,
        question(analysis=ANALYSED, read=READ, instead=DRAFT, otherwise=question(language="fr")),
    ),
    "second question": (ChatQuestion, question(first=AnalysedChat(CHAT, ANALYSED, READ))),
    "question about a text": (
        TextQuestion,
        TextQuestion(Request("q", "t", "q", "", PARTS), "v", {"a": 1}, Arrival(b"\xff", number=3)),
    ),
    "answer": (
        Prediction,
        PredictionResult(
            None,
            Answer(
                "Fine.", "gemma", 10, 4, 2, 0.5, "length", (("angry", float("-inf")),),
                ("fallback",), READ.chosen, Failure("busy", "no", other=Failure("down", "no")),
            ),
        ),
    ),
    "failure": (Prediction, PredictionResult(None, Failure("too_long", "it is", "…", 5, 6, 7))),
}  # fmt: skip


def coder(kind):
    return beam.coders.registry.get_coder(kind)


@pytest.mark.parametrize("name", ELEMENTS)
def test_an_element_is_the_same_after_it_was_json(name):
    kind, element = ELEMENTS[name]
    encoded = coder(kind).encode(element)
    json.loads(encoded[1:])
    assert coder(kind).decode(encoded) == element


@pytest.mark.parametrize("name", ELEMENTS)
def test_an_element_that_the_last_version_wrote_can_be_read(name):
    """A running stream is updated: the new version reads what the old one left between steps."""
    kind, element = ELEMENTS[name]
    assert coder(kind).decode(json.loads(WRITTEN.read_text())[name].encode()) == element


def test_fields_that_a_later_version_adds_are_left_out():
    assert coder(Event).decode(b'1{"chat_id":"7","mood":"good"}') == Event(chat_id="7")


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"b'9' is not a format of Chat .* drain the stream"):
        coder(Chat).decode(b"9{}")


@pytest.mark.parametrize(
    ("kind", "element"),
    [
        (Event, Event(chat_id="7", message=Message(user_id="c", text="half an emoji: \ud83d"))),
        (Range, Range("/chats/not-utf8-\udcff.jsonl")),
        (Prediction, PredictionResult(None, Answer("half an emoji: \ud83d", "m"))),
        (Chat, CHAT.model_copy(update={"chat_id": 7})),
    ],
)
def test_what_json_cannot_hold_passes_all_the_same(kind, element):
    assert coder(kind).decode(coder(kind).encode(element)) == element


def test_a_question_asks_the_same_after_it_was_json(draft_prompt, analysis_prompt):
    """Coders leave out the checks of answers and the other model's request."""
    for asked in (
        analysis_prompt.question(CHAT, "c"), draft_prompt.question(CHAT, "c", ANALYSED),
    ):  # fmt: skip
        again = coder(ChatQuestion).decode(coder(ChatQuestion).encode(asked)).asked
        assert again == asked.request
        for part, before in zip(again.parts, asked.request.parts, strict=True):
            assert (part.check is None) == (before.check is None)
            if before.check is not None:
                assert part.check.func is before.check.func
                assert part.check.args[-2:] == before.check.args[-2:]


@pytest.mark.parametrize("source", ["file", "projects/my-project/subscriptions/events"])
def test_no_element_is_pickled_between_two_steps(tmp_path, script, lines, source):
    """Steps that group elements have them as bytes; those of Beam's own are pickled."""
    pipeline = beam.Pipeline(options=beam_options([]))
    options = Options(
        input=lines(CHAT) if source == "file" else source,
        output=str(tmp_path / "out"), model=script(ANGRY, APOLOGY),
    )  # fmt: skip
    build(pipeline, plan(options))
    found = {}

    class Visitor(beam.pipeline.PipelineVisitor):
        def visit_transform(self, node):
            if isinstance(node.transform, beam.GroupByKey) or "Assemble/" in node.full_label:
                found[node.full_label] = node.inputs[0].element_type

    pipeline.visit(Visitor())
    ours = {name: str(kind) for name, kind in found.items() if "chatflow" in str(kind)}
    assert len(ours) >= 4
    for name in ours:
        # A time that Reshuffle keeps is Beam's own type.
        shown = str(coder(found[name])).replace("NullableCoder[FastPrimitivesCoder]", "")
        assert "Fast" not in shown, name
        assert "Pickle" not in shown, name


if __name__ == "__main__":  # writes the file anew, for a new format
    written = {name: coder(kind).encode(e).decode() for name, (kind, e) in ELEMENTS.items()}
    WRITTEN.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
