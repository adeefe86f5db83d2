"""What every model keeps to, wherever it runs: scripted, on the worker, and behind a service."""

import copy
import dataclasses
import json
import pickle

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that
from conftest import FEW_SHOT, SAMPLES, chat, run_stage
from fakes import environment
from fakes.brain import SCRIPT, scripted_answer
from fakes.vertex import ENDPOINTS
from fakes.vllm import Place
from remotes import settings_of
from tiny import tiny_t5

from chatflow.errors import ElementError
from chatflow.models.gemma.handler import GemmaModelHandler
from chatflow.models.merging import merged
from chatflow.models.remote.handler import RemoteLanguageModelHandler
from chatflow.models.requests import Answer, Failure
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.models.spec import Model, ModelSpec
from chatflow.models.vllm.handler import VllmModelHandler
from chatflow.prompts.questions import AnalysisPrompt, DraftPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import load_object
from chatflow.running.runner import LOCAL_RUNNER
from chatflow.sources.chats import read_chat
from chatflow.stages.analyse import AnalyseChats, to_analysis
from chatflow.stages.ask import Answered
from chatflow.stages.draft import DraftApologies

POISON = "poisonous"


class Case:
    """A model under test.

    Attributes:
      poison: makes a chat to which this model has no answer.
    """

    def __init__(self, spec, handler, poison, folder=""):
        self.spec, self.handler, self.poison = spec, handler, poison
        templates = load_folder(folder or ("instruct" if spec.instruct else "base"))
        self.analysis = AnalysisPrompt(templates["analysis"], spec)
        self.draft = DraftPrompt(templates["apology"], spec)

    def request(self, about):
        return self.question(about).request

    def question(self, about):
        return self.analysis.question(about, about.users()[0])

    def told(self, about, answer):
        """Tone and summary: of an answer's JSON, or of what was chosen of a chat that was read."""
        if answer.chosen is None:
            found = json.loads(answer.text)
            # A base model without heads is asked for the tone alone.
            return found["sentiment"], found.get("summary", "composed")
        assert answer.text == ""
        analysis = to_analysis(Answered(self.question(about), answer))
        return int(analysis.sentiment), analysis.summary


def scripted():
    def answer(request):
        (part,) = request.parts
        if POISON in part.prompt:
            raise ElementError("poison", "the script has no answer to poison")
        return scripted_answer(part.prompt)

    return Case(ModelSpec(f"scripted:{SCRIPT}"), ScriptedModelHandler(answer), POISON)


class LoadedGemma(GemmaModelHandler):
    """Returns the model that all tests share, which does not travel."""

    loaded = None

    def load_model(self):
        return LoadedGemma.loaded

    def share_model_across_processes(self):
        return False


def on_worker(gemma, monkeypatch, heads):
    """With heads it reads a chat; without, it scores the tone and writes the summary."""
    from chatflow.models.gemma import engine

    # A prompt longer than the longest cache, which is made a short one.
    monkeypatch.setattr(engine, "TOTALS", tuple(total for total in engine.TOTALS if total <= 1024))
    shape = gemma.engine.shape
    streams = {total: block for total, block in shape.streams.items() if total <= 2048}
    monkeypatch.setattr(gemma.engine, "shape", shape._replace(streams=streams))
    spec = ModelSpec(heads=heads)
    LoadedGemma.loaded = copy.copy(gemma)
    LoadedGemma.loaded.name = spec.result_name
    LoadedGemma.loaded._merged = merged(LoadedGemma.loaded._ask, gemma.most, 0.0)
    folder = FEW_SHOT if heads == "none" else "base"
    case = Case(spec, LoadedGemma(name=spec.result_name), "longer " * 3_000, folder)
    case.analysis = AnalysisPrompt(case.analysis.template, case.spec, max_prompt_tokens=10**6)
    return case


@pytest.fixture(scope="module")
def on_pytorch(tmp_path_factory):
    """A random T5, with a tone_bias that makes it tell two chats apart."""
    pytest.importorskip("torch").set_num_threads(1)  # others of a busy machine are waited for
    folder = tmp_path_factory.mktemp("t5")
    for seed in range(20):
        spec = ModelSpec(f"torch:{tiny_t5(folder, seed)}", model_kind="instruct")
        case = Case(spec, spec.handler(), "longer " * 3_000)
        template = with_settings(case.analysis.template, "answer_tokens = 256", "answer_tokens = 8")
        case.analysis = AnalysisPrompt(template, spec, max_prompt_tokens=10**6)
        asked = [case.request(about) for about in samples(ANGRY, HAPPY)]
        answers = case.handler.load_model().answer(asked)
        scores = [dict(answer.tone_scores) for answer in answers]
        angry, happy = (score["angry"] - score["happy"] for score in scores)
        if angry > happy + 0.01 and all(json.loads(answer.text)["summary"] for answer in answers):
            break
    bias = {"angry": (angry + happy) / 2, "neutral": 1000.0, "happy": 0.0}
    fitted = f"tone_bias = {json.dumps({spec.result_name: bias})}"
    template = with_settings(template, "tone_bias = {}", fitted)
    case.analysis = AnalysisPrompt(template, spec, max_prompt_tokens=10**6)
    return case


def with_settings(template, old, new):
    sources = tuple((name, text.replace(old, new)) for name, text in template.sources)
    return dataclasses.replace(template, sources=sources)


def remote(vertex, name):
    vertex.reset(match={POISON: "400"}, rates={"429": 0.1}, retry_after=0.05)
    settings = settings_of(vertex, name)
    spec = ModelSpec(name, "remote", remote=settings)
    return Case(spec, RemoteLanguageModelHandler(name, settings), POISON)


class LoadedVllm(VllmModelHandler):
    """Returns the server that all tests share, which does not travel."""

    loaded = None

    def load_model(self):
        return LoadedVllm.loaded[self.name]

    def share_model_across_processes(self):
        return False


VLLMS = ["vllm:google/gemma-3-1b-it", "vllm:google/gemma-3-1b-pt"]


@pytest.fixture(scope="session")
def vllms(tmp_path_factory):
    """Models of each kind behind stand-ins for vLLM's server."""
    place = Place(tmp_path_factory.mktemp("vllm"))
    place.behave(match={POISON: "400"}, rates={"500": 0.1})
    with environment(place.install()):
        loaded = {name: ModelSpec(name).handler().load_model() for name in VLLMS}
    yield loaded
    for model in loaded.values():
        model.close()
    assert place.all_gone()


def vllm(loaded, name):
    LoadedVllm.loaded = loaded
    spec = ModelSpec(name)
    return Case(spec, LoadedVllm(name, spec.instruct), POISON)


# And gemma3-270m, in test_gemma.
MODELS = ["scripted", "torch:T5", *VLLMS, "gemini-2.5-flash", *ENDPOINTS]


@pytest.fixture(params=[name for name in MODELS if name != "empty"])
def case(request):
    if request.param == "scripted":
        return scripted()
    if request.param == "torch:T5":
        return request.getfixturevalue("on_pytorch")
    if request.param in VLLMS:
        return vllm(request.getfixturevalue("vllms"), request.param)
    name = ENDPOINTS.get(request.param, request.param)
    return remote(request.getfixturevalue("vertex"), name)


def samples(*ids):
    chats = (read_chat(load_object(line)) for line in SAMPLES.read_bytes().splitlines())
    return [chat for chat in chats if chat.chat_id in ids]


ANGRY, HAPPY = "pizza-late", "lamp-arrived"


def test_each_request_has_one_result_in_its_place(case):
    chats = samples(ANGRY, HAPPY)
    requests = [case.request(about) for about in chats]
    results = list(case.handler.run_inference(requests, case.handler.load_model()))
    assert [result.example for result in results] == requests
    tones = []
    for about, result in zip(chats, results, strict=True):
        answer = result.inference
        assert isinstance(answer, Answer)
        assert result.model_id == answer.model == case.spec.result_name
        tone, summary = case.told(about, answer)
        assert summary
        tones.append(tone)
        assert answer.prompt_tokens > 20
        assert (answer.answer_tokens > 0) == (answer.chosen is None)
        assert answer.seconds >= 0
        assert answer.finish_reason in ("stop", "length")
    assert tones == [-1, 1]


def test_a_request_that_fails_takes_no_other_with_it(case):
    good = case.request(samples(HAPPY)[0])
    bad = case.request(chat(case.poison))
    results = list(case.handler.run_inference([good, bad], case.handler.load_model()))
    kinds = [type(result.inference) for result in results]
    assert kinds == [Answer, Failure]
    assert results[1].inference.reason
    assert results[1].inference.error


def test_no_requests_have_no_results(case):
    assert list(case.handler.run_inference([], case.handler.load_model())) == []


def test_the_handler_travels_and_its_making_asks_nobody(case):
    again = pickle.loads(pickle.dumps(case.spec.handler()))
    assert again.name == case.spec.result_name
    if case.spec.inference == "remote":
        assert again.settings == case.handler.settings
    assert again.get_metrics_namespace() == "chatflow_model"
    assert again.batch_elements_kwargs()["max_batch_size"] >= 16
    assert again.get_num_bytes([case.request(samples(HAPPY)[0])]) > 0


def test_it_answers_through_beams_own_transform_with_keys(case):
    (about,) = samples(HAPPY)

    def one_answer(results):
        ((key, result),) = results
        assert key == "key"
        assert case.told(about, result.inference)[0] == 1

    with TestPipeline(runner=LOCAL_RUNNER) as pipeline:
        requests = pipeline | beam.Create([("key", case.request(about))])
        results = requests | RunInference(KeyedModelHandler(case.handler))
        assert_that(results, one_answer)


@pytest.mark.slow
def test_chats_become_analyses_drafts_and_dead_letters(case):
    chats = [*samples(ANGRY, HAPPY), chat(case.poison, chat_id="bad")]
    model = Model(case.handler)
    found = run_stage(AnalyseChats(model, case.analysis), chats, ("analysed", "dead_letters"))
    model.forget()
    tones = {each.analysis.chat_id: int(each.analysis.sentiment) for each in found["analysed"]}
    assert tones == {ANGRY: -1, HAPPY: 1}
    (letter,) = found["dead_letters"]
    assert (letter.chat_id, letter.stage) == ("bad", "model")
    assert {each.analysis.model for each in found["analysed"]} == {case.spec.result_name}

    model = Model(case.handler)
    drafted = run_stage(
        DraftApologies(model, case.draft), found["analysed"], ("drafts", "dead_letters")
    )
    model.forget()
    assert len(drafted["drafts"]) + len(drafted["dead_letters"]) == 1
    assert {record.chat_id for records in drafted.values() for record in records} == {ANGRY}
