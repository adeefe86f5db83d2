"""Other models beside the first: for the drafts, for what it is not sure of, where it fails."""

import collections
import dataclasses
import json

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import PredictionResult
from conftest import APOLOGY, SCRIPTED, chat, read, scripted
from tiny import tiny_gemma, tiny_heads

from chatflow import metrics
from chatflow.errors import ElementError, UsageError
from chatflow.models.requests import Failure, Request
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.models.several import SeveralModels
from chatflow.models.spec import ModelSpec
from chatflow.options import NO_CLOUD, Options
from chatflow.prompts.questions import AnalysisPrompt, ChatQuestion
from chatflow.prompts.routes import routes_of, sure_of
from chatflow.prompts.templates import load_folder
from chatflow.records import AnalysedChat, Analysis, FieldValue
from chatflow.running.launch import execute
from chatflow.stages.analyse import ask_again, second_opinion
from chatflow.stages.ask import Answered, Unanswered, tried


@pytest.fixture
def model(tmp_path):
    """Writes a script under a name; returns the value of a flag for it."""

    def write(name, *rules):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(rule) + "\n" for rule in rules))
        return f"scripted:{path}"

    return write


def says(sentiment, summary="It is late.", **fits):
    return {"task": "analysis", "answer": {"sentiment": sentiment, "summary": summary}, **fits}


def run(tmp_path, lines, chats, **flags):
    options = Options(input=lines(*chats), output=f"{tmp_path}/out", **flags)
    return execute(options, []).to_dict()


CHATS = [chat("the parcel is late", chat_id=str(n)) for n in range(4)]


def test_another_model_writes_the_drafts(tmp_path, lines, model):
    first = model("first", says(-1))
    writer = model("writer", {"task": "apology", "answer": "We are sorry that it is late."})
    counts = run(tmp_path, lines, CHATS, model=first, draft_model=writer)
    assert (counts["lost"], counts["drafted"], counts["dead_letters"]) == (0, 4, 0)
    texts = {draft["text"] for draft in read(f"{tmp_path}/out", "drafts")}
    assert texts == {"We are sorry that it is late."}


def test_where_a_model_gives_no_answer_another_one_is_asked(tmp_path, lines, model):
    first = model("first", {"chat_id": "1", "error": "down"}, {"chat_id": "2", "error": "down"},
                  {"task": "apology", "error": "refused"}, says(-1))  # fmt: skip
    other = model("other", {"chat_id": "2", "error": "down", "task": "analysis"},
                  says(-1, "It is still late."), APOLOGY)  # fmt: skip
    counts = run(tmp_path, lines, CHATS, model=first, fallback_model=other)
    assert (counts["lost"], counts["analysed"], counts["drafted"]) == (0, 3, 3)
    assert counts["repaired"] == {"fallback": 1}
    analyses = {one["chat_id"]: one for one in read(f"{tmp_path}/out", "analyses")}
    assert (analyses["1"]["summary"], analyses["1"]["repairs"]) == (
        "It is still late.", ["fallback"],
    )  # fmt: skip
    assert analyses["0"]["summary"] == "It is late."
    (letter,) = read(f"{tmp_path}/out", "dead_letters")
    assert (letter["chat_id"], letter["stage"], letter["reason"]) == ("2", "model", "down")
    assert letter["error"].count("the script fails with down") == 2


@pytest.mark.parametrize("answered", [True, False])
def test_what_each_model_has_used_is_counted_by_its_name(monkeypatch, prompt, answered):
    """Also of one that gave no answer."""

    class Failing(ScriptedModelHandler):
        def load_model(self):
            return self

        def answer(self, requests):
            return [Failure("cut", "cut short", None, 5, 2, 1) for _ in requests]

        def new_counts(self):
            return {}

    good = ScriptedModelHandler(lambda request: "three short words")
    failing = Failing(lambda request: "")
    models = SeveralModels({"a#1": failing, "b#2": good if answered else failing})
    other = Request("2", "analysis", "7", "c", (), model="b#2")
    first = Request("1", "analysis", "7", "c", (), model="a#1", otherwise=other)
    (found,) = models.answer([first])
    counts = collections.Counter()
    monkeypatch.setattr(metrics, "count", lambda name, n=1: counts.update({name: n}))
    asked = prompt.question(CHATS[0], "c")
    question = dataclasses.replace(
        asked, request=first, otherwise=dataclasses.replace(asked, request=other)
    )
    coder = beam.coders.registry.get_coder(ChatQuestion)
    question = coder.decode(coder.encode(question))  # as between two steps
    (said,) = tried((question, PredictionResult(question, found)))
    assert isinstance(said, Answered if answered else Unanswered)
    assert (counts["prompt_tokens_of/a"], counts["answer_tokens_of/a"]) == (5, 2)
    used = (0, 3) if answered else (5, 2)
    assert (counts["prompt_tokens_of/b"], counts["answer_tokens_of/b"]) == used
    assert counts["answer_tokens"] == 2 + used[1]


def unsure(confidence, **fields):
    values = {name: FieldValue(value="yes", confidence=p) for name, p in fields.items()}
    analysis = Analysis(
        analysis_id="a", chat_id="0", user_id="c", revision=0, sentiment=0, summary="Late.",
        confidence=confidence, fields=values, model="first", prompt_version="v",
        analysed_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    return AnalysedChat(CHATS[0].model_copy(update={"user_id": "c"}), analysis)


@pytest.fixture
def prompt():
    template = load_folder("instruct")["analysis"]
    second = AnalysisPrompt(template, SCRIPTED)
    return AnalysisPrompt(
        template, SCRIPTED, second=second, sure=(("tone", 0.8), ("resolved", 0.6))
    )


@pytest.mark.parametrize(
    ("confidence", "fields", "asked"),
    [(0.9, {}, 0), (0.79, {}, 1), (None, {}, 0), (0.9, {"resolved": 0.5}, 1),
     (0.9, {"resolved": 0.7, "topic": 0.1}, 0)],
)  # fmt: skip
def test_a_chat_is_asked_about_again_where_some_field_is_unsure(prompt, confidence, fields, asked):
    first = unsure(confidence, **fields)
    (found,) = ask_again(prompt, first)
    assert (found is first) == (not asked)


def answer_of(prompt, text):
    """The second opinion on an unsure chat, by a model that says a text or raises an error."""

    def say(request):
        if isinstance(text, Exception):
            raise text
        return text

    (question,) = ask_again(prompt, unsure(0.5, topic=0.9))
    handler = scripted(say).handler
    (result,) = handler.run_inference([question.request], handler.load_model())
    (found,) = (
        second for one in tried((question, result)) for second in second_opinion(one)
    )  # fmt: skip
    return found


def test_a_second_opinion_holds_the_first_one_and_what_only_that_knows(prompt):
    found = answer_of(prompt, '{"sentiment": -1, "summary": "The parcel is late."}').analysis
    assert (found.sentiment, found.summary, found.model) == (-1, "The parcel is late.", "scripted")
    assert (found.first.sentiment, found.first.confidence, found.first.model) == (0, 0.5, "first")
    assert found.fields["topic"].value == "yes"


@pytest.mark.parametrize("said", ["no JSON", ElementError("down", "is down")])
def test_without_a_second_answer_the_first_opinion_stays(prompt, said):
    found = answer_of(prompt, said)
    assert (found.analysis.model, found.analysis.first) == ("first", None)


@pytest.mark.slow
def test_a_pipeline_asks_a_second_model_and_loses_nothing(tmp_path, lines, model):
    second = model("second", {"chat_id": "3", "error": "down"}, says(-1), APOLOGY)
    folder = tiny_gemma(tmp_path / "tiny")
    spec = ModelSpec(folder, heads="none")
    loaded = spec.handler().load_model()  # held, for its weights go with it
    heads = tiny_heads(
        tmp_path / "tiny.heads.npz",
        AnalysisPrompt(load_folder("base")["analysis"], spec),
        loaded.engine.forward.fingerprint,
    )
    counts = run(
        tmp_path, lines, CHATS, model=folder, heads=heads, escalate_model=second,
        escalate_below="tone:1",
    )  # fmt: skip
    assert (counts["lost"], counts["analysed"], counts["dead_letters"]) == (0, 4, 0)
    assert counts["escalated"]["asked"] == 4
    assert counts["escalated"]["kept"] == {"down": 1}
    analyses = {one["chat_id"]: one for one in read(f"{tmp_path}/out", "analyses")}
    assert analyses["0"]["model"] == "scripted"
    assert analyses["0"]["first"]["model"].startswith(folder)
    assert analyses["3"]["model"].startswith(folder)
    assert "resolved" in analyses["0"]["fields"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"escalate_model": "scripted:x"}, "--escalate_below: give probabilities by field"),
        ({"escalate_below": "tone:0.8"}, "--escalate_below: only with --escalate_model"),
        ({"escalate_model": "scripted:x", "escalate_below": "tone:8"}, "--escalate_below: give"),
        ({"draft_model": "gemini-2.5-flash"}, "--draft_model: --model=gemini-2.5-flash: give"),
        ({"fallback_model": "openai:"}, "--fallback_model: --model=openai: give the model's"),
    ],
)
def test_a_mistake_in_the_flags_is_one_clear_line(flags, says):
    with pytest.raises(UsageError) as caught:
        routes_of(Options(**flags), lambda options: ModelSpec.of(options, NO_CLOUD, False))
    assert str(caught.value).startswith(says)


def test_each_entry_of_models_has_others_of_its_own(tmp_path, model):
    path = tmp_path / "models.yaml"
    first, second = model("first", says(0)), model("second", says(1))
    path.write_text(f"""
attribute: tenant
models:
  - keys: [acme]
    model: {first}
    escalate: {{model: {second}, below: {{tone: 0.7}}}}
  - keys: [globex]
    model: {first}
    fallback: {{model: "openai:small", api_endpoint: "http://localhost:1/v1"}}
""")
    routes = routes_of(
        Options(models=str(path)), lambda options: ModelSpec.of(options, NO_CLOUD, False)
    )
    assert routes.escalates
    assert [spec.name for spec in routes.specs] == [first, second, "openai:small"]
    assert routes.routes[0].escalate.sure == (("tone", 0.7),)
    assert routes.specs[2].inference == "remote"


def specs(**flags):
    found = routes_of(Options(**flags), lambda options: ModelSpec.of(options, NO_CLOUD, False))
    return {spec.name: (spec.remote.api_key, spec.remote.api_endpoint) for spec in found.specs}


def test_a_key_and_an_address_go_to_one_service_alone():
    key, address = "env:KEY", "http://localhost:1/v1"
    both = {"inference": "remote", "api_key": key, "api_endpoint": address}
    assert specs(model="openai:a", fallback_model="openai:b", **both) == {
        "openai:a": (key, address), "openai:b": (key, address),
    }  # fmt: skip
    assert specs(fallback_model="openai:b", api_key=key, api_endpoint=address)["openai:b"] == (
        key, address,
    )  # fmt: skip
    with pytest.raises(UsageError, match="--fallback_model: --model=anthropic:b: give --api_key"):
        specs(model="openai:a", fallback_model="anthropic:b", **both)
    with pytest.raises(UsageError, match="--api_key: belongs to one service"):
        specs(draft_model="openai:a", fallback_model="anthropic:b", api_key=key)


def test_a_fallback_that_writes_what_no_draft_may_say_is_composed(tmp_path, lines, model):
    first = model("first", {"task": "apology", "error": "refused"}, says(-1))
    other = model("other", {"task": "apology", "answer": "We will refund you 500 euros today."})
    angry = chat("You lost my parcel three weeks ago and nobody has answered my letters since.")
    counts = run(tmp_path, lines, [angry], model=first, fallback_model=other)
    assert (counts["drafted"], counts["dead_letters"]) == (1, 0)
    (draft,) = read(f"{tmp_path}/out", "drafts")
    assert draft["repairs"][-1] == "composed"
    assert "500" not in draft["text"]


def test_probabilities_by_field_are_read_from_a_flag_or_a_mapping():
    assert sure_of("tone:0.8,resolved:0.7", "--x") == (("tone", 0.8), ("resolved", 0.7))
    assert sure_of({"tone": 0.8}, "--x") == (("tone", 0.8),)
    with pytest.raises(UsageError, match="--x: give"):
        sure_of("tone", "--x")


def test_a_fallback_that_cannot_be_rendered_takes_nothing_from_the_first(prompt):
    broken = dataclasses.replace(prompt, second=None, sure=())
    object.__setattr__(broken, "question", _refuse)
    question = dataclasses.replace(prompt, fallback=broken).question(CHATS[0], "c")
    assert question.otherwise is None
    assert question.request.otherwise is None


def _refuse(*_):
    from chatflow.errors import BadInputError

    raise BadInputError("template_error", "no")
