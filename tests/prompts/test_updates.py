"""New weights and templates, taken up by a running pipeline; broken ones are refused."""

import gc
import itertools
import json
import math
import os
import pickle
import shutil
import time
import weakref

import numpy as np
import pytest
from apache_beam.io.filesystems import FileSystems
from conftest import ANGRY, APOLOGY, FEW_SHOT, chat, read
from fakes import environment
from fakes.dataflow import FakeCloud
from tiny import tiny_gemma

from chatflow.choices.heads import Chosen
from chatflow.errors import ModelError, UsageError
from chatflow.models import refreshing
from chatflow.models.base import LanguageModel
from chatflow.models.refreshing import RefreshedModel, newest_version
from chatflow.models.requests import FIRST, Answer, Failure, Request, Version
from chatflow.models.spec import ModelSpec
from chatflow.options import NO_CLOUD, Options
from chatflow.prompts.routes import routes_of
from chatflow.prompts.templates import default_folder
from chatflow.prompts.updates import _Look, look
from chatflow.running.launch import execute
from chatflow.weights.presets import forget, local_file, local_preset, use_jax

REQUEST = Request("id", "analysis", "7", "c", ())


def version(seen, path="", modified=0.0):
    return Version(seen, path, modified)


class Named(LanguageModel):
    """Answers with its name; can be told to break."""

    def __init__(self, name, result=None):
        self.name, self.result = name, result

    def answer(self, requests):
        return [self.result or Answer(self.name, self.name) for _ in requests]


def said(model, wanted=FIRST):
    (answer,) = model.answer([Request("id", "analysis", "7", "c", (), version=wanted)])
    return answer.text


def test_later_weights_take_the_place_of_earlier_ones_and_stragglers_get_the_newest():
    model = RefreshedModel(lambda wanted: Named(wanted.path or "first"))
    assert said(model) == "first"
    assert said(model, version(2, "b")) == "b"
    assert said(model, version(1, "a")) == "b"
    assert said(model) == "b"
    assert said(model, version(3)) == "first"  # the newer file was removed
    assert model.new_counts() == {"updates": 2, "copies_loaded": 3}
    assert model.new_counts() == {"copies_loaded": 0}


@pytest.mark.parametrize(
    "broken",
    [
        RuntimeError("not a model"),
        Named("bad", Failure("model_error", "cannot")),
        Named("bad", Answer("{}", "bad", tone_scores=(("angry", math.nan),))),
        Named("bad", Answer("", "bad", chosen=Chosen({"tone": {"angry": math.nan}}, {}, {}))),
    ],
)
def test_broken_weights_are_refused_once_and_the_old_go_on(broken, caplog):
    tried = []

    def load(wanted):
        tried.append(wanted.weights)
        if wanted.path == "bad" and wanted.modified == 1.0:
            if isinstance(broken, Exception):
                raise broken
            return broken
        return Named(wanted.path or "first")

    model = RefreshedModel(load, trials=[REQUEST])
    assert [said(model, version(seen, "bad", 1.0)) for seen in (1, 2, 3)] == ["first"] * 3
    assert tried == [FIRST.weights, ("bad", 1.0)]
    assert model.new_counts()["updates_refused"] == 1
    assert "bad are refused; the old ones stay in use" in caplog.text
    assert said(model, version(4, "bad", 2.0)) == "bad"  # written anew


def test_weights_that_cannot_be_loaded_are_tried_again_later(monkeypatch):
    """A service that is away for a moment is not a broken file."""
    away = [True]

    def load(wanted):
        if wanted.path and away:
            raise TimeoutError(away.pop())
        return Named(wanted.path or "first")

    model = RefreshedModel(load)
    assert said(model, version(1, "new")) == "first"
    assert said(model, version(2, "new")) == "first"  # not at once
    monkeypatch.setattr(refreshing, "RETRY_SECONDS", 0.0)
    model._refused = dict.fromkeys(model._refused, 0.0)
    assert said(model, version(3, "new")) == "new"


def test_while_new_weights_are_loaded_others_are_answered_by_the_old():
    inside = []

    def load(wanted):
        if wanted.path:
            inside.append(said(model, version(1, "new")))
        return Named(wanted.path or "first")

    model = RefreshedModel(load)
    assert said(model, version(1, "new")) == "new"
    assert inside == ["first"]


def test_a_first_version_that_is_broken_leaves_those_that_the_flag_names():
    def load(wanted):
        if wanted.path:
            raise ModelError("broken", "broken")
        return Named("first")

    model = RefreshedModel(load, version(1, "bad"))
    assert said(model, version(2, "bad")) == "first"
    assert model.new_counts() == {"updates_refused": 1, "copies_loaded": 1}


def test_old_weights_are_let_go():
    models = []

    def load(wanted):
        model = Named(wanted.path)
        models.append(weakref.ref(model))
        return model

    model = RefreshedModel(load)
    said(model, version(1, "new"))
    gc.collect()
    assert [found() is None for found in models] == [True, False]


def test_the_local_copies_of_old_weights_are_removed(tmp_path, monkeypatch):
    """Those that were replaced; not what `--model` names, nor what lies beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ("base/config.json", "v1/config.json", "v2/config.json", "a.lora.h5", "b.lora.h5")
    (tmp_path / "here").mkdir()

    def load(wanted):
        path = wanted.path or "gs://models/base"
        (local_file if path.endswith(".h5") else local_preset)(path)
        return Named(path)

    def kept():
        root = tmp_path / "cache" / "chatflow" / "presets"
        files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {path.relative_to(root).as_posix() for path in files}

    with FakeCloud("models") as fake, environment(fake.environment):
        for name in names:
            fake.put("models", name, b"{}")
        model = RefreshedModel(load)
        held = []
        for seen, path in enumerate(
            ("v1", "v2", "v2", "a.lora.h5", "b.lora.h5", f"{tmp_path}/here", "v1", ""), 1
        ):
            url = path if path.startswith("/") or not path else f"gs://models/{path}"
            assert said(model, version(seen, url, float(seen))) == (url or "gs://models/base")
            held.append(sorted(kept() - {"gs_models_base/config.json"}))
    one, two = ["gs_models_v1/config.json"], ["gs_models_v2/config.json"]
    a, b = ["gs_models/a.lora.h5"], ["gs_models/b.lora.h5"]
    assert held == [one, two, two, a, b, [], one, []]
    assert kept() == {"gs_models_base/config.json"}


@pytest.mark.parametrize("name", ["", ".", "..", "/", "gs://b/..", "gs://b/", "hf://a/b", "base"])
def test_only_a_copy_is_removed(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "chatflow"
    for path in ("presets/base", "presets/gs_b/x", "other"):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text("")
    monkeypatch.chdir(cache / "presets")
    forget(name)
    assert (cache / "presets" / "base").exists()
    assert (cache / "other").exists()


def test_the_file_that_was_written_last_counts_and_markers_stand_for_their_folder(tmp_path):
    assert newest_version(f"{tmp_path}/*/config.json", 5.0) == version(5.0)
    for number, name in enumerate(("b", "a"), 1):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (number, number))
    assert newest_version(f"{tmp_path}/*/config.json", 5.0) == version(5.0, f"{tmp_path}/a", 2.0)
    (tmp_path / "x.lora.h5").write_text("")
    found = newest_version(f"{tmp_path}/*.lora.h5", 5.0)
    assert found.path == f"{tmp_path}/x.lora.h5"


def routes(**flags):
    return routes_of(Options(**flags), lambda options: ModelSpec.of(options, NO_CLOUD, True))


def test_broken_templates_are_refused_and_the_old_go_on(tmp_path, script, caplog):
    folder = tmp_path / "prompts"
    shutil.copytree(default_folder() / "instruct", folder)
    one = routes(model=script(ANGRY, APOLOGY), prompts=str(folder))
    first = look(one)
    good = (folder / "analysis.jinja").read_text()
    (folder / "analysis.jinja").write_text(good + "{% block x %}{{ oh no }}")
    second = look(one, first)
    assert second.analysis.version == first.analysis.version
    assert "new templates are refused: " in caplog.text
    assert "the old ones stay in use" in caplog.text
    (folder / "analysis.jinja").write_text(good.replace("support", "customer support"))
    third = look(one, second)
    assert third.analysis.version != first.analysis.version
    assert look(one, second, watch_prompts=False).analysis.version == first.analysis.version
    assert pickle.loads(pickle.dumps(third)).analysis.version == third.analysis.version


def test_a_route_that_cannot_be_looked_at_leaves_the_others_theirs(tmp_path, script, monkeypatch):
    """The side input always has something, for whoever waits for it."""
    file = tmp_path / "models.yaml"
    file.write_text(
        "attribute: tenant\nmodels:\n"
        f"  - {{keys: [a], model_updates: '{tmp_path}/a/*.jsonl'}}\n"
        f"  - {{keys: [b], model_updates: '{tmp_path}/b/*.jsonl'}}\n"
    )
    both = routes(models=str(file), model=script(ANGRY, APOLOGY))
    assert len(both.specs) == 2  # each takes up its own weights
    first = look(both)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "new.jsonl").write_text("")
    match = FileSystems.match

    def fails(patterns):
        if "/a/" in patterns[0]:
            raise OSError("not allowed")
        return match(patterns)

    monkeypatch.setattr(FileSystems, "match", fails)
    (found,) = _Look(both, first, False).process(None)
    a, b = (found.analysis.by_key[key].weights.path for key in "ab")
    assert (a, b) == ("", f"{tmp_path}/b/new.jsonl")


@pytest.mark.parametrize(
    "mistake", ["{% set stop = 5 %}", "{% set tone_bias = 5 %}", "{% set tone_bias = {'m': {}} %}"]
)
def test_a_template_that_would_fail_each_chat_is_refused(tmp_path, mistake):
    shutil.copytree(FEW_SHOT, tmp_path / "prompts")
    one = routes(model="gemma3-270m", heads="none", prompts=f"{tmp_path}/prompts")
    first = look(one)
    template = tmp_path / "prompts" / "analysis.jinja"
    template.write_text(template.read_text() + mistake)
    assert look(one, first).analysis.version == first.analysis.version
    with pytest.raises(UsageError, match=r"analysis\.jinja"):
        look(one)


def by_chat(inbox):
    return {analysis["chat_id"]: analysis for analysis in inbox.analyses}


def until(pubsub, inbox, says):
    """Sends chats, one after another, until the analysis of one says it; all of them."""
    seen = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        chat_id = f"chat-{next(NUMBERS)}"
        pubsub.send(chat("My parcel is late!", chat_id=chat_id))
        inbox.wait(lambda inbox, chat_id=chat_id: chat_id in by_chat(inbox))
        seen.append(by_chat(inbox)[chat_id])
        if says(seen[-1]):
            return seen
    raise AssertionError(f"never said: {seen[-1]}")


NUMBERS = itertools.count()


def test_a_stream_takes_up_weights_and_templates_and_refuses_broken_ones(
    pubsub, tmp_path, script, caplog
):
    folder = tmp_path / "prompts"
    shutil.copytree(default_folder() / "instruct", folder)
    happy = {"task": "analysis", "answer": {"sentiment": 1, "summary": "All is well now."}}
    model = script(ANGRY, APOLOGY)
    options = pubsub.options(
        model=model, prompts=str(folder), prompt_updates=True, update_seconds=0.2,
        model_updates=f"{tmp_path}/updates/*.jsonl",
    )  # fmt: skip
    (tmp_path / "updates").mkdir()

    def publish(name, text, to="updates"):
        (tmp_path / name).write_text(text)
        os.replace(tmp_path / name, tmp_path / to / name)

    with pubsub.inbox() as inbox, pubsub.pipeline(options) as run:
        (before,) = until(pubsub, inbox, lambda analysis: True)
        assert (before["model"], before["sentiment"]) == ("scripted", -1)
        publish("v2.jsonl", json.dumps(happy))
        *_, after = until(pubsub, inbox, lambda analysis: analysis["sentiment"] == 1)
        assert after["model"] == f"scripted@{tmp_path}/updates/v2.jsonl"
        assert after["prompt_version"] == before["prompt_version"]

        publish("v3.jsonl", "no script")
        good = (folder / "analysis.jinja").read_text()
        publish("analysis.jinja", good.replace("support", "customer support"), "prompts")
        *_, fresh = until(
            pubsub, inbox, lambda one: one["prompt_version"] != before["prompt_version"]
        )
        assert (fresh["model"], fresh["sentiment"]) == (after["model"], 1)
        publish("analysis.jinja", "{% broken", "prompts")
        while "new templates are refused" not in caplog.text:
            (last,) = until(pubsub, inbox, lambda analysis: True)
        assert last["prompt_version"] == fresh["prompt_version"]
    counts = run.summary.to_dict()
    assert counts["lost"] == 0
    assert not inbox.dead_letters
    assert counts["updates"] == {"taken_up": 1, "refused": 1, "templates_refused": 1}
    assert counts["copies_loaded"] == 2  # one for both steps, and the new one
    assert "v3.jsonl are refused; the old ones stay in use" in caplog.text


# Real weights.

GEMMA = {"dtype": "float32", "max_prompt_tokens": 400}


def publish_preset(folder, made):
    """A preset comes file by file; the one that is watched for comes last."""
    os.makedirs(folder)
    for name in sorted(os.listdir(made), key=lambda name: name == "config.json"):
        source = os.path.join(made, name)
        copy = shutil.copytree if os.path.isdir(source) else shutil.copy
        copy(source, os.path.join(folder, name))


def test_a_stream_takes_up_a_gemma_and_refuses_one_of_nans(pubsub, tmp_path, caplog):
    first = tiny_gemma(tmp_path / "first")
    options = pubsub.options(
        model=first, model_updates=f"{tmp_path}/new/*/config.json", update_seconds=0.2, **GEMMA
    )
    with pubsub.inbox() as inbox, pubsub.pipeline(options) as run:
        (before,) = until(pubsub, inbox, lambda analysis: True)
        assert before["model"] == first
        second = tiny_gemma(tmp_path / "second", seed=8)
        publish_preset(tmp_path / "new" / "v2", second)
        *_, after = until(pubsub, inbox, lambda analysis: analysis["model"] != first)
        assert after["model"] == f"{first}@{tmp_path}/new/v2"
        assert after["tone_scores"] != before["tone_scores"]
        publish_preset(tmp_path / "new" / "v3", tiny_gemma(tmp_path / "third", broken=True))
        while "v3 are refused; the old ones stay in use" not in caplog.text:
            (last,) = until(pubsub, inbox, lambda analysis: True)
        assert last["model"] == after["model"]
    counts = run.summary.to_dict()
    assert counts["lost"] == 0
    assert counts["updates"] == {"taken_up": 1, "refused": 1, "templates_refused": 0}
    assert all(letter["stage"] != "model" for letter in inbox.dead_letters)


@pytest.mark.slow
def test_a_batch_begins_with_the_newest_adapter(tmp_path, lines):
    preset = tiny_gemma(tmp_path / "first")
    adapter = str(tmp_path / "adapters" / "tone.lora.h5")
    save_adapter(preset, adapter)
    path = lines(chat("the parcel is late", chat_id="1"))
    found = []
    for number, updates in enumerate(("", f"{tmp_path}/adapters/*.lora.h5")):
        output = f"{tmp_path}/out{number}"
        options = Options(input=path, output=output, model=preset, model_updates=updates, **GEMMA)
        assert execute(options, []).lost == 0
        found += read(output, "analyses")
    plain, adapted = found
    assert (plain["model"], adapted["model"]) == (preset, f"{preset}@{adapter}")
    assert plain["analysis_id"] != adapted["analysis_id"]
    by_hand = scores_by_hand(preset, adapter)
    assert list(adapted["tone_scores"].values()) == pytest.approx(by_hand, abs=1e-3)
    assert list(plain["tone_scores"].values()) != pytest.approx(by_hand, abs=1e-3)


def save_adapter(preset, path):
    use_jax()
    import keras_hub

    backbone = keras_hub.models.Backbone.from_preset(preset, dtype="float32")
    backbone.enable_lora(2)
    rng = np.random.default_rng(3)
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))
    os.makedirs(os.path.dirname(path))
    backbone.save_lora_weights(path)


def scores_by_hand(preset, adapter):
    """Log-probabilities of the tone words, by Keras's own model with its LoRA layers."""
    use_jax()
    import keras_hub

    from chatflow.models.gemma.engine import Engine
    from chatflow.models.gemma.handler import row_of

    backbone = keras_hub.models.Backbone.from_preset(preset, dtype="float32")
    backbone.load_lora_weights(adapter)
    engine = Engine(backbone, keras_hub.tokenizers.Tokenizer.from_preset(preset))
    prompt = look(routes(model=preset, **GEMMA)).analysis
    tone = prompt.question(chat("the parcel is late"), "c").request.parts[0]
    (result,) = engine.run([row_of(tone)])
    return result.scores
