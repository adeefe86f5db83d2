"""A model, prompts and thresholds by an attribute of the chat."""

import collections
import concurrent.futures
import json
import subprocess
import sys
import threading
import uuid

import pytest
from apache_beam.io.components.adaptive_throttler import ThrottlingSignaler
from apache_beam.utils.multi_process_shared import MultiProcessShared
from conftest import ANGRY, APOLOGY, FEW_SHOT, chat, mistake, read
from tiny import tiny_gemma, tiny_heads

from chatflow.errors import BadInputError
from chatflow.models.requests import Failure, Request
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.models.several import SeveralModels, SeveralModelsHandler
from chatflow.models.spec import ModelSpec
from chatflow.options import NO_CLOUD, Options
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.routes import Routed, routes_of
from chatflow.prompts.templates import load_folder
from chatflow.prompts.updates import look
from chatflow.running.launch import execute


@pytest.fixture
def models(tmp_path):
    """Writes a file for --models."""

    def write(text):
        path = tmp_path / "models.yaml"
        path.write_text(text)
        return str(path)

    return write


def routes(path, **flags):
    options = Options(models=path, **flags)
    return routes_of(options, lambda options: ModelSpec.of(options, NO_CLOUD, False))


def told(sentiment, summary):
    return {"task": "analysis", "answer": {"sentiment": sentiment, "summary": summary}}


def scripts(script):
    return script(told(-1, "Shop."), APOLOGY), script(told(1, "Bank."), APOLOGY)


THREE_KEYS = """
attribute: tenant
models:
  - keys: [acme, globex]
    model: {shop}
  - keys: [7]
    model: {bank}
    max_prompt_tokens: 800
"""


@pytest.mark.parametrize(
    "processes",
    [
        [],
        pytest.param(
            ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_three_keys_share_two_models_and_unknown_keys_are_dead_letters(
    tmp_path, lines, script, models, processes
):
    shop, bank = script_pair(script, tmp_path)
    path = lines(
        *(
            chat("the parcel is late", chat_id=f"{tenant}-{n}", attributes={"tenant": tenant})
            for tenant in ("acme", "globex", "7", "other")
            for n in range(3)
        ),
        chat("no tenant", chat_id="none"),
    )
    options = Options(
        input=path, output=f"{tmp_path}/out", models=models(THREE_KEYS.format(shop=shop, bank=bank))
    )
    counts = execute(options, processes).to_dict()
    assert (counts["lost"], counts["copies_loaded"]) == (0, 2)
    analyses = {a["chat_id"]: a for a in read(f"{tmp_path}/out", "analyses")}
    by_tenant = collections.defaultdict(set)
    for chat_id, analysis in analyses.items():
        by_tenant[chat_id[:-2]].add((analysis["sentiment"], analysis["model"]))
    assert by_tenant == {
        "acme": {(-1, "scripted")}, "globex": {(-1, "scripted")}, "7": {(1, "scripted")}
    }  # fmt: skip
    assert len({a["prompt_version"] for a in analyses.values()}) == 2  # two budgets
    assert len(read(f"{tmp_path}/out", "drafts")) == 6
    letters = read(f"{tmp_path}/out", "dead_letters")
    assert {(one["stage"], one["reason"]) for one in letters} == {("prompt", "no_model")}
    assert len(letters) == 4
    assert (
        "no model for tenant='other', and no default" in letters[0]["error"] + letters[3]["error"]
    )


def script_pair(script, tmp_path):
    names = []
    for name, rule in (("shop", told(-1, "Shop.")), ("bank", told(1, "Bank."))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(one) for one in (rule, APOLOGY)))
        names.append(f"scripted:{path}")
    return names


def test_entries_that_differ_in_prompts_and_budget_alone_share_a_model(script, models):
    file = models(
        "attribute: tenant\nmodels:\n"
        "  - {keys: [a], max_prompt_tokens: 800}\n"
        "  - {keys: [b], prompts: base, settings: {summary_grounding: 0.5}}\n"
        "default: {}\n"
    )
    assert len(routes(file, model="gemma3-270m").specs) == 1


@pytest.mark.slow
def test_a_default_takes_all_other_chats_with_the_flags_model(tmp_path, lines, script, models):
    shop, _ = script_pair(script, tmp_path)
    file = models(
        f"attribute: tenant\nmodels: [{{keys: [acme], model: '{shop}'}}]\ndefault: {{}}\n"
    )
    path = lines(chat("hi", chat_id="a", attributes={"tenant": "acme"}), chat("hi", chat_id="b"))
    options = Options(
        input=path, output=f"{tmp_path}/out", models=file, model=script(told(0, "Neither."))
    )
    assert execute(options, []).lost == 0
    found = {a["chat_id"]: a["sentiment"] for a in read(f"{tmp_path}/out", "analyses")}
    assert found == {"a": -1, "b": 0}


def test_thresholds_and_prompts_are_those_of_the_key(script, models, tmp_path):
    file = models(
        "attribute: tenant\n"
        "models:\n"
        "  - keys: [strict]\n"
        "    settings: {summary_grounding: 0.9, draft_confidence: 0.7, draft_grounding: 0.8}\n"
        "default: {}\n"
    )
    found = look(routes(file, model="gemma3-270m", heads="none", prompts=FEW_SHOT))
    strict = chat("x", attributes={"tenant": "strict"})
    analysis, draft = found.analysis.of(strict), found.draft.of(strict)
    assert analysis.template.settings["summary_grounding"] == 0.9
    assert draft.template.settings["draft_confidence"] == 0.7
    assert draft.template.settings["draft_grounding"] == 0.8
    other = found.analysis.of(chat("x"))
    assert other.template.settings["summary_grounding"] == 0.8
    assert analysis.version != other.version
    question = analysis.question(strict, "c")
    assert question.settings["summary_grounding"] == 0.9


def test_heads_of_its_own_are_given_to_a_key_and_no_other(models, tmp_path):
    none = AnalysisPrompt(load_folder("base")["analysis"], ModelSpec(heads="none"))
    heads = tiny_heads(tmp_path / "mine.heads.npz", none)
    file = models(
        "attribute: tenant\nmodels:\n"
        f"  - {{keys: [mine], heads: '{heads}'}}\n  - {{keys: [far], model: gemma3_1b}}\n"
        "default: {}\n"
    )
    found = look(routes(file, heads="none"))
    blocks = {
        key: found.analysis.of(chat("x", attributes={"tenant": key})).block_names
        for key in ("mine", "far", "other")
    }
    assert blocks == {"mine": ("reading",), "far": ("tone",), "other": ("tone",)}


def test_prompts_without_a_block_to_be_read_are_asked_without_heads():
    def specs(**flags):
        options = Options(input="x", output="y", model="gemma3-270m", **flags)
        return routes_of(options, lambda options: ModelSpec.of(options, NO_CLOUD, False)).specs

    assert [spec.own_heads for spec in specs(prompts=FEW_SHOT)] == [""]
    assert [spec.result_name for spec in specs(prompts=FEW_SHOT)] == ["gemma3-270m"]
    assert [spec.own_heads for spec in specs()] == ["support-2"]
    assert [spec.own_heads for spec in specs(heads="none")] == [""]


def test_a_chat_without_a_model_says_which_value_it_has():
    routed = Routed("tenant", {}, None)
    with pytest.raises(BadInputError, match="no model for tenant='x'"):
        routed.of(chat("x", attributes={"tenant": "x"}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "cannot be read"),
        ("- a", "must have fields"),
        ("models: []", "attribute: name the chats' attribute"),
        ("{attribute: a, models: []}", "models: must be a list of entries"),
        ("{attribute: a, models: [{model: x}]}", "entry 1: keys: must be a list"),
        ("{attribute: a, models: [{keys: [no]}]}", "False must be text; put it in quotes"),
        ("{attribute: a, models: [{keys: [b, b]}]}", "'b' is given twice"),
        ("{attribute: a, models: [{keys: [b]}, {keys: [b]}]}", "entry 2: keys: 'b' is given twice"),
        ("{attribute: a, models: [{keys: [b], modle: x}]}", "unknown field 'modle'"),
        ("{attribute: a, models: [{keys: [b], model: 3}]}", "model: must be str; found 3"),
        ("{attribute: a, models: [{keys: [b], model: nope}]}", "entry 1: --model: unknown model"),
        ("{attribute: a, models: [{keys: [b], settings: {tone: 1}}]}", "no template in 'instruct'"),
        ("{attribute: a, models: [{keys: [b], settings: {summary_grounding: 7}}]}", "be 0 to 1"),
        ("{attribute: a, models: [{keys: [b]}], max_models: many}", "max_models: must be a number"),
        ("{attribute: a, models: [{keys: [b]}], default: 3}", "default: must have fields"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_clear_line(
    text, says, models, script, lines, tmp_path, capsys
):
    arguments = ["run", "--input=IN", "--output=OUT", "--model=MODEL", "--models=FILE"]
    places = {
        "IN": lines(chat("x")), "OUT": f"{tmp_path}/out", "MODEL": script(ANGRY, APOLOGY),
        "FILE": models(text),
    }  # fmt: skip
    found = mistake(arguments, places, capsys)
    assert says in found
    assert "--models" in found


# How many models have room (max_models).


class Loads(ScriptedModelHandler):
    """Notes how many of them are loaded at once."""

    now, most, broken = collections.Counter(), 0, ()

    def __init__(self, name):
        super().__init__(lambda request: f"{name} says hello", name)

    def load(self, version=None):
        if self.name in Loads.broken:
            raise OSError("no such file")
        model = super().load()
        alive = Alive(self.name)
        model.alive = alive
        return model


class Alive:
    def __init__(self, name):
        self.name = name
        Loads.now[name] += 1
        Loads.most = max(Loads.most, sum(Loads.now.values()))

    def __del__(self):
        Loads.now[self.name] -= 1


@pytest.fixture(autouse=True)
def no_loads():
    Loads.now.clear()
    Loads.most, Loads.broken = 0, ()


def asked(handler, manager, keys):
    batch = [Request(str(n), "analysis", "7", "c", (), key) for n, key in enumerate(keys)]
    results = handler.run_inference(batch, manager)
    return [(n, result.example.model, result.inference) for n, result in enumerate(results)]


def ready(names, most):
    handler = SeveralModelsHandler({name: Loads(name) for name in names}, most)
    return handler, handler.load_model()


def test_no_more_models_are_in_memory_than_there_is_room_for():
    handler, manager = ready("abc", 2)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        done = [threads.submit(asked, handler, manager, "abcacb") for _ in range(40)]
        for future in done:
            answers = future.result(timeout=60)
            assert [(own, key) for own, key, _ in answers] == list(enumerate("abcacb"))
            assert all(answer.model == key for _, key, answer in answers)
    assert Loads.most == 2


def test_a_model_that_is_loaded_holds_up_no_other():
    handler, manager = ready("ab", 0)
    asked(handler, manager, "a")
    began, may = threading.Event(), threading.Event()

    def slow(version=None):
        began.set()
        assert may.wait(30)
        return ScriptedModelHandler.load(handlers["b"])

    handlers = handler.handlers
    handlers["b"].load = slow
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        others = [threads.submit(asked, handler, manager, "b") for _ in range(2)]
        assert began.wait(30)
        while len(manager._waiting) < 1:  # the other one, for the same model
            concurrent.futures.wait(others, timeout=0.01)
        mine = threads.submit(asked, handler, manager, "a")
        assert mine.result(timeout=30)[0][2].model == "a"
        may.set()
        for other in others:
            assert other.result(timeout=30)[0][2].model == "b"


@pytest.mark.slow
def test_what_a_process_used_that_died_is_free_again():
    handler, _ = ready("ab", 1)
    began, may = threading.Event(), threading.Event()

    def slow(request):
        began.set()
        assert may.wait(30)
        return "slow"

    handler.handlers["a"].function = slow
    tag = f"test-{uuid.uuid4().hex}"
    manager = MultiProcessShared(handler.load_model, tag=tag, always_proxy=True).acquire()
    process = subprocess.Popen([sys.executable, "-c", ASK_A.format(tag=tag)])
    assert began.wait(60)
    process.kill()
    process.wait()
    may.set()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        found = threads.submit(asked, handler, manager, "b").result(timeout=60)
    assert found[0][2].model == "b"
    assert Loads.now == {"a": 0, "b": 1}


ASK_A = """
from apache_beam.utils.multi_process_shared import MultiProcessShared
from chatflow.models.requests import Request
model = MultiProcessShared(None, tag="{tag}", always_proxy=True).acquire()
model.answer([Request("0", "analysis", "7", "c", (), "a")])
"""


def test_models_behind_a_service_take_no_room():
    manager = SeveralModels({"a": Loads("a"), "far": Far("far")}, 1)
    assert manager._acquire("far").name == "far"
    assert manager._acquire("a").name == "a"


class Far(ScriptedModelHandler):
    holds_weights = False

    def __init__(self, name):
        super().__init__(lambda request: "far", name)


def test_what_services_throttle_is_signalled_to_the_runner(monkeypatch):
    signalled = []
    monkeypatch.setattr(ThrottlingSignaler, "signal_throttled", lambda _, s: signalled.append(s))
    handler = SeveralModelsHandler({name: Far(name) for name in "ab"}, 1)
    model = handler.load_model()
    asked(handler, model, "ab")
    for one in model._models.values():
        one.throttled = lambda: 1.2
    asked(handler, model, "ab")
    assert signalled == [3]


def test_who_waits_for_room_is_not_overtaken():
    _, manager = ready("ab", 1)
    assert manager._acquire("a").name == "a"
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        other = threads.submit(lambda: manager._acquire("b").name)
        while not manager._waiting:
            concurrent.futures.wait([other], timeout=0.01)
        again = threads.submit(lambda: manager._acquire("a").name)
        assert not concurrent.futures.wait([again], timeout=0.05).done
        manager._release("a")
        assert other.result(timeout=10) == "b"
        manager._release("b")
        assert again.result(timeout=10) == "a"
    assert Loads.most == 1


def test_a_model_that_cannot_be_loaded_fails_its_own_requests_alone(monkeypatch):
    Loads.broken = ("b",)
    handler, manager = ready("ab", 2)
    found = asked(handler, manager, "abab")
    assert [type(answer) is Failure for *_, answer in found] == [False, True, False, True]
    assert found[1][2].reason == "model_not_loaded"
    assert "no such file" in found[1][2].error
    Loads.broken = ()
    assert asked(handler, manager, "b")[0][2].reason == "model_not_loaded"  # not tried again yet
    monkeypatch.setattr("chatflow.models.several.RETRY_SECONDS", 0.0)
    assert asked(handler, manager, "b")[0][2].model == "b"


# Real weights.


def test_three_keys_on_two_gemmas_in_a_batch_and_in_a_stream(tmp_path, lines, models, pubsub):
    one, two = (tiny_gemma(tmp_path / name, seed=seed) for name, seed in (("one", 7), ("two", 8)))
    file = models(
        "attribute: language\nmax_models: 2\nmodels:\n"
        f"  - {{keys: [en, fr], model: {one}}}\n  - {{keys: [de], model: {two}}}\n"
    )
    flags = {"models": file, "dtype": "float32", "max_prompt_tokens": 400}
    chats = [
        chat("the parcel is late", chat_id=f"{language}-{n}", attributes={"language": language})
        for language in ("en", "fr", "de")
        for n in range(2)
    ]
    options = Options(input=lines(*chats), output=f"{tmp_path}/out", **flags)
    counts = execute(options, []).to_dict()
    assert counts["lost"] == 0
    assert counts["asked"] == 6
    batch = {a["chat_id"]: a for a in read(f"{tmp_path}/out", "analyses")}
    expected = {"en": one, "fr": one, "de": two}
    assert {chat_id: a["model"] for chat_id, a in batch.items()} == {
        chat_id: expected[chat_id[:2]] for chat_id in batch
    }
    assert batch
    with pubsub.inbox() as inbox, pubsub.pipeline(pubsub.options(**flags)) as run:
        pubsub.send(*chats)
        inbox.wait(lambda inbox: len(inbox.analyses) == len(batch), 120)
    assert run.summary.lost == 0
    for analysis in inbox.analyses:
        same = batch[analysis["chat_id"]]
        assert (analysis["analysis_id"], analysis["sentiment"], analysis["summary"]) == (
            same["analysis_id"], same["sentiment"], same["summary"]
        )  # fmt: skip
