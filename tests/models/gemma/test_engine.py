"""The engine on tiny random models of each Gemma generation, against keras_hub itself."""

import functools
import importlib.util
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import required
from tiny import CORPUS, tiny_gemma

from chatflow.models.gemma.grammar import Text
from chatflow.models.gemma.handler import GemmaModelHandler
from chatflow.models.gemma.shapes import PromptTooLongError
from chatflow.models.requests import Failure, Part, Request
from chatflow.options import Batching, WorkerSettings
from chatflow.prompts.answers import parse_analysis
from chatflow.weights.presets import use_jax

# chatflow.models.engine is imported when keras has its backend.
use_jax()
from chatflow.models.gemma.engine import Reading, Row  # noqa: E402


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def preset(request, tmp_path_factory):
    """A folder with a tiny random model of a generation, as keras_hub saves it."""
    if not importlib.util.find_spec("keras_hub"):
        required("keras_hub", "pip install 'chatflow[gemma]'")
    return tiny_gemma(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(preset):
    return load(preset).engine


EIGHT = Batching(max_batch_size=8, max_batch_duration_secs=0)


def load(preset, instruct=False, **settings):
    settings = {"dtype": "float32", **settings}
    return GemmaModelHandler(preset, instruct, WorkerSettings(**settings)).load_model()


def logits_of(engine, ids):
    """Logits of the next token, by a plain forward pass of the whole prompt."""
    tokens = np.zeros((1, 96), np.int32)  # one shape, so that it is compiled once
    tokens[0, : len(ids)] = ids
    given = {"token_ids": tokens, "padding_mask": np.arange(96)[None] < len(ids)}
    return np.asarray(plain_pass(engine.forward.model)(given))[0, len(ids) - 1]


@functools.cache
def plain_pass(model):
    return jax.jit(model)


def greedy(engine, text, steps):
    """Tokens by plain forward passes."""
    ids = [engine.tokenizer.start_token_id, *engine.encode(text)]
    start = len(ids)
    for _ in range(steps):
        ids.append(int(logits_of(engine, ids).argmax()))
        if ids[-1] == engine.tokenizer.end_token_id:
            break
    return ids[start:]


def write(prompt, max_tokens, prefix="", stop=()):
    return Row(prefix, prompt, text=Text(stop), max_tokens=max_tokens)


PROMPTS = [
    "the parcel is late",
    "sorry",
    "the agent said the customer is angry about the parcel and it is late but it is late",
    "angry " * 20,
    "it",
]


@pytest.mark.slow
def test_rows_of_one_batch_continue_as_each_would_alone(engine):
    """Also with a shared prefix, and over more tokens than the sliding window."""
    prefix = "the customer is angry\n"
    found = engine.run([write(prompt, 12, prefix) for prompt in PROMPTS])
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = greedy(engine, prefix + prompt, 12)
        assert list(row.tokens) == ids
        assert row.prompt_tokens == 1 + len(engine.encode(prefix)) + len(engine.encode(prompt))


@pytest.mark.slow
def test_an_answer_is_keras_hubs_own_token_for_token(engine):
    """`generate` of the whole prompt, greedy."""
    import keras_hub

    model = engine.forward.model
    model.compile(sampler="greedy")
    prefix = "the customer is angry\n"
    for prompt, row in zip(
        PROMPTS, engine.run([write(p, 12, prefix) for p in PROMPTS]), strict=True
    ):
        ids = [engine.tokenizer.start_token_id, *engine.encode(prefix), *engine.encode(prompt)]
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : len(ids)] = ids
        given = {"token_ids": tokens, "padding_mask": np.arange(96)[None] < len(ids)}
        if isinstance(model, keras_hub.models.Gemma3CausalLM):
            given["images"] = np.zeros((1, 0, 1, 1, 3))
        out = model.generate(given, stop_token_ids=[engine.tokenizer.end_token_id])
        theirs = np.asarray(out["token_ids"])[0, len(ids) : len(ids) + len(row.tokens)].tolist()
        assert list(row.tokens) == theirs


SCHEMA = {
    "properties": {
        "sentiment": {"type": "integer", "enum": [-1, 0, 1]},
        "summary": {"type": "string"},
    }
}


@pytest.mark.slow
def test_json_is_valid_for_random_weights_and_prompts(preset):
    """960 answers of 40 models that say anything."""
    model = load(preset)
    forward, rng = model.engine.forward, np.random.default_rng(3)
    known, tones = forward.weights, set()
    for _ in range(40):
        forward.weights = [
            jnp.asarray(rng.normal(0, rng.choice([0.3, 3.0]), w.shape), w.dtype) for w in known
        ]
        model.engine._prefixes.clear()
        texts = ["".join(rng.choice(list(CORPUS), rng.integers(1, 50))) for _ in range(8)]
        batch = []
        for text, tokens, characters in zip(
            texts, rng.integers(2, 40, 8), rng.integers(1, 60, 8), strict=True
        ):
            part = Part(
                field=None, prompt="say: " + text, shared=5, schema=SCHEMA,
                max_tokens=int(tokens), characters=int(characters),
            )  # fmt: skip
            batch.append(Request("id", "analysis", "1", "c", (part,)))
        for request, answer in zip(batch, model.answer(batch), strict=True):
            found = parse_analysis(answer.text, 512)
            assert found.repairs in ((), ("control_tokens",))
            value = json.loads(answer.text)
            assert set(value) == {"sentiment", "summary"}
            limit = request.parts[0].characters + (answer.finish_reason == "length")
            assert 1 <= len(value["summary"]) <= limit
            assert answer.answer_tokens <= request.parts[0].max_tokens
            tones.add(value["sentiment"])
    assert tones == {-1, 0, 1}


@pytest.mark.slow
def test_a_tone_takes_no_decoding_and_a_skeleton_no_step(engine):
    """Forced stretches are fed with the prompt, not decoded."""
    before = engine.all_counts()
    row = Row("say: ", "late", lead='{"sentiment":', choices=("-1", "0", "1"))
    (tone,) = engine.run([row])
    assert engine.all_counts()["decode_steps"] == before["decode_steps"]
    text = Text(json_string=True)
    (whole,) = engine.run([row._replace(between=',"summary":"', text=text, max_tokens=5)])
    assert whole.choice == tone.choice
    assert engine.all_counts()["decode_steps"] - before["decode_steps"] < 5
    assert len(whole.tokens) <= 5


@pytest.mark.slow
def test_what_is_compiled_is_bounded(engine):
    """The same shapes again, and shapes of the same bucket, compile nothing."""
    rows = [write("late " * n, 8, "the agent\n") for n in (1, 9, 14, 3, 7)]
    engine.run(rows)
    compiled = engine.forward.compilations
    engine.run([write("sorry " * n, 8, "the agent\n") for n in (14, 2, 8, 6, 5, 4)])
    assert engine.forward.compilations == compiled


@pytest.mark.slow
def test_a_warm_model_compiles_nothing_for_what_was_expected(preset):
    handler = GemmaModelHandler(
        preset,
        False,
        WorkerSettings(dtype="float32"),
        Batching(max_batch_size=8, max_batch_duration_secs=0),
        expected=(request("sorry"),),
    )
    model = handler.load_model()
    assert model.counts()["compilations"] > 0
    model.answer([request("late")])
    model.answer([request("late")] * 8)
    assert "compilations" not in model.counts()


@pytest.mark.usefixtures("settled")
@pytest.mark.slow
def test_int8_weights_answer_much_alike(preset, engine):
    light = load(preset, quantization="int8").engine
    sizes = [sum(w.nbytes for w in e.forward.weights) for e in (engine, light)]
    assert sizes[1] < sizes[0] * 0.6
    row = Row("the customer is\n", "the parcel is late", choices=("t", "a", "s"))
    ours, theirs = (e.run([row])[0].scores for e in (engine, light))
    np.testing.assert_allclose(ours, theirs, atol=1.0)


def test_scores_are_the_log_probabilities_of_a_plain_forward_pass(engine):
    prefix, choices = "the customer is\n", ("t", "a", "s")
    rows = engine.run([Row(prefix, prompt, choices=choices) for prompt in PROMPTS])
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = [engine.tokenizer.start_token_id, *engine.encode(prefix), *engine.encode(prompt)]
        logits = logits_of(engine, ids).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        first = [engine.encode(choice)[0] for choice in choices]
        np.testing.assert_allclose(row.scores, log_probs[first], atol=1e-3)


def test_an_answer_ends_before_a_stop_text(engine):
    (whole,) = engine.run([write("the parcel", 12)])
    stop = whole.text[3:5]
    (cut,) = engine.run([write("the parcel", 12, stop=(stop,))])
    assert cut.text == whole.text.split(stop, 1)[0]
    assert not cut.cut
    assert whole.cut
    assert len(cut.tokens) <= len(whole.tokens)


# Reading.


TALKS = [
    ["the parcel is late", " sorry", " it is the parcel .", " so"],
    ["angry", " so"],
    ["the agent said it " * 4, " the customer is angry about it" * 3, " but", " so"],
    ["it is late but the agent said sorry " * 8, " so"],
    ["late", "", " sorry", ""],
]
"""Pieces of texts; the last follows what a chat says."""


def reading(pieces, prefix="the customer is angry\n"):
    ends = tuple(itertools.accumulate(map(len, pieces)))[:-1]
    return Reading(prefix, "".join(pieces), ends)


def same(found, expected, **tolerance):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for name in ("mean", "last"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **tolerance)


def states_of(engine, ids, layers):
    """States after layers, by a plain forward pass of keras_hub's own layers, without a cache."""
    backbone = engine.forward.model.backbone
    x = backbone.token_embedding(np.array([ids])) * np.sqrt(backbone.hidden_dim)
    found = []
    for number, layer in enumerate(backbone.transformer_layers, 1):
        x = layer(x, padding_mask=np.ones((1, len(ids)), bool))
        if number in layers:
            found.append(np.asarray(x)[0])
    states = np.stack(found, axis=1)
    return states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + 1e-6)


def test_what_is_read_does_not_depend_on_the_batch(engine):
    together = engine.read([reading(pieces) for pieces in TALKS], (1, 2))
    for pieces, found in zip(TALKS, together, strict=True):
        (alone,) = engine.read([reading(pieces)], (1, 2))
        assert found.mean.shape == found.last.shape == (len(pieces), 2, 16)
        same(found, alone, rtol=1e-4, atol=1e-5)
    turned = engine.read([reading(pieces) for pieces in TALKS[::-1]], (1, 2))
    for found, other in zip(together, turned[::-1], strict=True):
        same(found, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(1, 2), (1,), (2,)])
def test_states_are_those_of_a_plain_forward_pass(engine, layers):
    """Of each token; a piece has their mean, and the last one's."""
    prefix = reading(TALKS[0]).prefix
    found = engine.read([reading(pieces) for pieces in TALKS], layers)
    for pieces, read in zip(TALKS, found, strict=True):
        tokens = [engine.encode(piece) for piece in pieces]
        before = [engine.tokenizer.start_token_id, *engine.encode(prefix)]
        states = states_of(engine, [*before, *itertools.chain(*tokens)], layers)
        assert read.tokens.tolist() == [len(ids) for ids in tokens]
        at = len(before)
        for number, ids in enumerate(tokens):
            own = states[at : at + len(ids)] if ids else states[at - 1 : at]
            at += len(ids)
            np.testing.assert_allclose(read.mean[number], own.mean(axis=0), atol=1e-3)
            np.testing.assert_allclose(read.last[number], own[-1], atol=1e-3)


def test_a_shared_prefix_changes_nothing_of_what_is_read(engine):
    prefix = "the customer is angry\n"
    for pieces in TALKS:
        (shared,) = engine.read([reading(pieces, prefix)], (1, 2))
        (whole,) = engine.read([reading([prefix, *pieces], "")], (1, 2))
        assert whole.tokens[0] == len(engine.encode(prefix))
        expected = type(whole)(whole.mean[1:], whole.last[1:], whole.tokens[1:])
        same(shared, expected, rtol=1e-3, atol=1e-4)


def test_texts_of_different_prefixes_are_read_in_one_call(engine):
    prefixes = ["the customer is angry\n", "", "sorry\n"]
    every = [reading(pieces, prefix) for pieces in TALKS[:3] for prefix in prefixes]
    for asked, found in zip(every, engine.read(every, (1, 2)), strict=True):
        (alone,) = engine.read([asked], (1, 2))
        same(found, alone, rtol=1e-4, atol=1e-5)


def test_texts_fill_several_streams_and_long_ones_several_blocks(engine, monkeypatch):
    """Whatever a stream holds, and wherever its blocks and pieces end."""
    every = [reading(pieces) for pieces in [*TALKS, *TALKS[::-1]]]
    alone = [engine.read([asked], (1, 2))[0] for asked in every]
    shape = engine.shape._replace(streams={64: 32, 128: 64, 512: 64}, together=128, piece=16)
    monkeypatch.setattr(engine, "shape", shape)
    monkeypatch.setattr(engine, "_prefixes", type(engine._prefixes)())
    for found, expected in zip(engine.read(every, (1, 2)), alone, strict=True):
        same(found, expected, rtol=1e-3, atol=1e-4)


def test_reading_leaves_what_is_written_as_it_is(engine):
    row = write("the parcel is late", 6, reading(TALKS[0]).prefix)
    (before,) = engine.run([row])
    engine.read([reading(pieces) for pieces in TALKS], (1,))
    (after,) = engine.run([row])
    assert before.tokens == after.tokens


def test_a_text_that_is_too_long_to_be_read_fails_alone(engine, monkeypatch):
    monkeypatch.setattr(engine, "shape", engine.shape._replace(streams={256: 64, 512: 64}))
    long = reading(["angry " * 800, " so"])
    one, two, three = engine.read([reading(TALKS[0]), long, reading(TALKS[1])], (1, 2))
    assert isinstance(two, PromptTooLongError)
    for found, pieces in ((one, TALKS[0]), (three, TALKS[1])):
        same(found, engine.read([reading(pieces)], (1, 2))[0], rtol=1e-4, atol=1e-5)


def test_nothing_to_read_is_nothing(engine):
    assert engine.read([], (1, 2)) == []


def test_choices_that_begin_alike_are_refused(engine):
    with pytest.raises(ValueError, match="first token"):
        engine.run([Row("", "x", choices=("the parcel", "the agent"))])


def test_instruct_prompts_are_wrapped_in_turns_by_id(preset):
    engine = load(preset, instruct=True).engine
    start, end = (engine.tokenizer.token_to_id(f"<{x}_of_turn>") for x in ("start", "end"))
    assert engine._before[:2] == [engine.tokenizer.start_token_id, start]
    assert engine._after[0] == end
    assert start in engine._after
    assert start not in engine.encode("<start_of_turn>")
    ids = [*engine._before, *engine.encode("sorry"), *engine._after]
    assert engine.run([Row("", "sorry", choices=("t", "a"))])[0].prompt_tokens == len(ids)


def request(prompt, chat_id="1"):
    part = Part(field=None, prompt=prompt, max_tokens=4)
    return Request("id", "analysis", chat_id, "c", (part,))


def test_a_prompt_that_is_too_long_fails_alone(preset, monkeypatch):
    monkeypatch.setattr("chatflow.models.gemma.engine.TOTALS", (128, 192))
    handler = GemmaModelHandler(preset)
    model = load(preset)
    batch = [request("sorry"), request("angry " * 400), request("late")]
    one, two, three = (r.inference for r in handler.run_inference(batch, model))
    assert isinstance(two, Failure)
    assert (two.reason, "at most 192" in two.error) == ("prompt_too_long", True)
    assert one.text == model.answer([batch[0]])[0].text
    assert three.text == model.answer([batch[2]])[0].text


@pytest.mark.slow
def test_bfloat16_answers_too(preset):
    model = load(preset, dtype="bfloat16")
    assert model.engine.forward.model.backbone.compute_dtype == "bfloat16"
    (answer,) = model.answer([request("the parcel is late")])
    assert answer.answer_tokens > 0


@pytest.mark.slow
def test_a_remote_folder_is_copied_once(preset, tmp_path, monkeypatch):
    """As for gs://, here through the same interface of Beam with a local address."""
    from chatflow.weights import presets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    copy = presets.copied(preset, said.append)
    assert {p.name for p in copy.iterdir()} >= {"config.json", "model.weights.h5"}
    assert said
    said.clear()
    assert presets.copied(preset, said.append) == copy
    assert not said
    assert load(str(copy)).answer([request("sorry")])


def test_its_size_is_known_from_its_folder(preset, engine):
    from chatflow.weights.architectures import architecture_of

    assert architecture_of(preset).parameters == engine.forward.model.count_params()
