"""Heads: files of them, for which model and template they are, and what a tiny Gemma chooses."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import chat, read
from tiny import tiny_gemma, tiny_heads

from chatflow.choices.heads import Head, Heads
from chatflow.choices.reading import Layout, States
from chatflow.choices.sentences import FEATURES
from chatflow.errors import UsageError
from chatflow.models.gemma.handler import GemmaModelHandler
from chatflow.models.spec import ModelSpec
from chatflow.options import Options, WorkerSettings
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.templates import load_folder
from chatflow.running.launch import execute


def base(heads="none", **overrides):
    template = load_folder("base")["analysis"]
    template = dataclasses.replace(template, overrides=tuple(overrides.items()))
    return AnalysisPrompt(template, ModelSpec(heads=heads))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "mine.heads.npz")


# Files.


def test_heads_are_read_as_they_were_written(path):
    rng = np.random.default_rng(1)
    layers = tuple((rng.normal(0, 1, size), rng.normal(0, 1, size[1])) for size in ((9, 5), (5, 3)))
    head = Head("tone", "chat", "one", ("a", "b", "c"), layers, 1.7)
    made = Heads("m", "w", "t", (9, 12), (head,))
    made.save(path)
    found = Heads.load(path)
    assert dataclasses.replace(found, heads=()) == dataclasses.replace(made, heads=())
    (again,) = found.heads
    assert dataclasses.replace(again, layers=()) == dataclasses.replace(head, layers=())
    x = rng.normal(0, 1, (4, 9)).astype(np.float32)
    np.testing.assert_allclose(again.probabilities(x), head.probabilities(x), atol=5e-3)


def cut(path):
    with open(path, "rb+") as file:
        file.truncate(900)


def no_zip(path):
    with open(path, "w") as file:
        file.write("no zip")


def empty(path):
    open(path, "w").close()


def other_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros(3))


def one_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def pickled(path):
    with open(path, "wb") as file:
        np.savez(file, about=np.array([{"model": "m"}], dtype=object))


@pytest.mark.parametrize("broken", [cut, no_zip, empty, other_arrays, one_array, pickled])
def test_a_file_that_is_broken_or_none_of_heads_is_said_to_be_so(path, broken):
    tiny_heads(path, base())
    broken(path)
    with pytest.raises(UsageError, match=r"--heads=mine\.heads\.npz: is not a file of heads: "):
        base(path)


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ("mine.npz", r"--heads=mine\.npz: must be auto, none, or a file .* ends in \.heads\.npz"),
        ("/none.heads.npz", r"--heads=/none\.heads\.npz: there is no such file"),
    ],
)
def test_a_name_that_is_none_of_heads_is_said_to_be_so(heads, says):
    with pytest.raises(UsageError, match=says):
        ModelSpec(heads=heads)


def test_heads_are_for_gemma_on_the_workers_alone(path):
    tiny_heads(path, base())
    with pytest.raises(UsageError, match="--heads: only for Gemma 1 to 3 on the workers"):
        ModelSpec("gemini-2.5-flash", "remote", heads=path)
    assert ModelSpec(heads=path).result_name == f"gemma3-270m@{path}"
    assert ModelSpec(heads=path).own_heads == path
    assert ModelSpec().own_heads == "support-2"
    assert ModelSpec(heads="none").own_heads == ""
    assert ModelSpec(model_kind="instruct").own_heads == ""
    assert ModelSpec("scripted:x").own_heads == ""


# For which model, template and choices they are.


def test_heads_that_fit_are_taken(path):
    tiny_heads(path, base())
    assert base(path).block_names == ("reading",)


def test_comments_and_other_blocks_are_of_no_matter_to_heads(path, tmp_path):
    tiny_heads(path, base())
    for name, text in load_folder("base")["analysis"].sources:
        (tmp_path / name).write_text(text.replace("{# Whose tone", "{# The customer's tone"))
    template = load_folder(str(tmp_path))["analysis"]
    assert AnalysisPrompt(template, ModelSpec(heads=path)).block_names == ("reading",)


def test_heads_for_another_template_are_refused(path):
    tiny_heads(path, base(), others={"template": "other"})
    with pytest.raises(UsageError) as caught:
        base(path)
    assert str(caught.value).startswith(f"--heads={path}: fitted on chats as shown by another ")
    assert "block reading" in str(caught.value)
    assert "--heads=none" in str(caught.value)


def test_a_template_that_shows_a_chat_otherwise_needs_other_heads(path, tmp_path):
    tiny_heads(path, base())
    for name, text in load_folder("base")["analysis"].sources:
        (tmp_path / name).write_text(text.replace("A support chat.", "A chat."))
    template = load_folder(str(tmp_path))["analysis"]
    with pytest.raises(UsageError, match="as shown by another template"):
        AnalysisPrompt(template, ModelSpec(heads=path))


@pytest.mark.parametrize("choice", ["topic", "grievances", "part"])
def test_a_choice_that_heads_lack_is_named(path, choice):
    tiny_heads(path, base(), without=[choice])
    with pytest.raises(UsageError) as caught:
        base(path)
    said = f"--heads={path}: has no head for {choice} as "
    assert str(caught.value).startswith(said)
    assert "choices.toml declares it; fit one with `chatflow tune`" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('praise = "nothing but praise"\n', ""),
        ('[grievances]  # what went wrong for the customer, in their own account\nkind = "all"',
         '[grievances]\nkind = "one"'),
        ('[impact]  # whether a sentence says what the trouble cost or meant for the customer\n'
         'over = "sentence"', '[impact]\nover = "message"'),
    ],
)  # fmt: skip
def test_a_choice_that_is_declared_otherwise_needs_another_head(path, tmp_path, old, new):
    tiny_heads(path, base())
    for name, text in load_folder("base")["analysis"].sources:
        if name == "choices.toml":
            assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
    template = load_folder(str(tmp_path))["analysis"]
    with pytest.raises(UsageError, match=r"has no head for \w+ as .*choices\.toml declares it"):
        AnalysisPrompt(template, ModelSpec(heads=path))


def test_heads_without_the_tones_of_the_template_are_refused(path):
    tiny_heads(path, base())
    with pytest.raises(UsageError, match="has no head for the tone, of bad, fair, good"):
        base(path, tones={"bad": -1, "fair": 0, "good": 1}, tone_bias={})


# On a tiny Gemma.


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("gemma") / "tiny")


FLOAT = WorkerSettings(dtype="float32")


def loaded(preset, heads=""):
    return GemmaModelHandler(preset, False, FLOAT, heads=heads).load_model()


@pytest.fixture(scope="module")
def fitting(preset, tmp_path_factory):
    """Heads for the tiny Gemma."""
    model = loaded(preset)  # which lets go of its weights when nobody holds it
    weights = model.engine.forward.fingerprint
    return tiny_heads(tmp_path_factory.mktemp("heads") / "mine.heads.npz", base(), weights)


def test_heads_for_another_model_are_refused(preset, path):
    tiny_heads(path, base(), weights="another", others={"model": "gemma_other"})
    with pytest.raises(UsageError) as caught:
        loaded(preset, path)
    assert str(caught.value).startswith(f"--heads={path}: fitted on gemma_other, not on {preset}")
    assert "--heads=none" in str(caught.value)


def test_models_are_told_apart_whatever_their_type(preset, tmp_path):
    one, two = loaded(preset), loaded(tiny_gemma(tmp_path / "other", seed=8))
    assert one.engine.forward.fingerprint != two.engine.forward.fingerprint
    settings = WorkerSettings(dtype="bfloat16")
    light = GemmaModelHandler(preset, False, settings).load_model()
    assert light.engine.forward.fingerprint == one.engine.forward.fingerprint


CHATS = [
    chat("The parcel is late. I am angry about it.", "Sorry!", "It is late!", chat_id="1"),
    chat("Sorry, the parcel is late.", chat_id="2"),
    chat("Hi", *["the customer is angry", "the agent said it"] * 9, chat_id="3"),
]


def test_what_is_chosen_of_a_chat_does_not_depend_on_those_beside_it(preset, fitting):
    model, prompt = loaded(preset, fitting), base(fitting)
    requests = [prompt.question(one, "c").request for one in CHATS]
    together = model.answer(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = model.answer([request])
        assert answer.text == ""
        assert answer.prompt_tokens == alone.prompt_tokens > 0
        assert set(answer.chosen.chat) >= {"tone", "toward", "topic", "grievances"}
        for name, values in answer.chosen.chat.items():
            assert values == pytest.approx(alone.chosen.chat[name], abs=2e-3)
            if name not in answer.chosen.sets:
                assert sum(values.values()) == pytest.approx(1, abs=2e-2)
        for name, rows in answer.chosen.parts.items():
            np.testing.assert_allclose(rows, alone.chosen.parts[name], atol=2e-3)
    tones = [list(answer.chosen.chat["tone"].values()) for answer in together]
    assert math.dist(tones[0], tones[1]) > 0.01


@pytest.mark.slow
def test_the_pipeline_analyses_and_drafts_what_a_model_has_read(preset, fitting, tmp_path, lines):
    options = Options(
        input=lines(*CHATS), output=f"{tmp_path}/out", model=preset, heads=fitting, dtype="float32"
    )
    counts = execute(options, []).to_dict()
    assert (counts["lost"], counts["asked"], counts["copies_loaded"]) == (0, 3, 1)
    assert not read(f"{tmp_path}/out", "dead_letters")
    analyses = {found["chat_id"]: found for found in read(f"{tmp_path}/out", "analyses")}
    prompt, model = base(fitting), loaded(preset, fitting)
    for one in CHATS:
        (answer,) = model.answer([prompt.question(one, "c").request])
        found, chosen = analyses[one.chat_id], answer.chosen.chat
        assert found["model"] == f"{preset}@{fitting}"
        assert found["summary_source"] == "quotations"
        assert found["confidence"] == pytest.approx(max(chosen["tone"].values()), abs=2e-3)
        assert found["fields"]["topic"]["confidence"] == pytest.approx(
            max(chosen["topic"].values()), abs=2e-3
        )
        for quotation in found["quotations"]:
            assert quotation["text"] in one.messages[quotation["message"]].text
            assert quotation["text"] in found["summary"]
    angry = {key for key, found in analyses.items() if found["sentiment"] == -1}
    assert {made["chat_id"] for made in read(f"{tmp_path}/out", "drafts")} == angry


# What heads see.


def test_all_that_apply_are_each_probable_by_themselves():
    weights = np.zeros((FEATURES, 2))
    head = Head("some", "sentence", "all", ("x", "y"), ((weights, np.array([0.0, 3.0])),))
    ((x, y),) = head.probabilities(np.zeros((1, FEATURES)))
    assert (x, y) == (pytest.approx(0.5), pytest.approx(1 / (1 + math.exp(-3))))


def test_choices_over_messages_see_the_mean_of_their_sentences():
    layout = Layout((1, 2, 3), (0, 1, 2), (4, 4, 7), (True, True, False), ((0.0,) * FEATURES,) * 3)
    mean = np.array([1.0, 3.0, 5.0, 9.0], np.float32).reshape(4, 1, 1)
    states = States(mean, mean * 0, np.array([1, 1, 1, 1]))
    weights = np.zeros((FEATURES + 2, 2))
    weights[FEATURES, 1] = 1.0
    head = Head("kind", "message", "one", ("x", "y"), ((weights, np.zeros(2)),))
    chosen = Heads("m", "w", "t", (1,), (head,)).choose(states, layout)
    assert chosen.column("kind", "y") == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-5))], abs=1e-3
    )
    assert chosen.column("other", "y") is None
