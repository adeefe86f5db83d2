"""The engine on tiny random models of each Gemma generation, against keras_hub itself."""

import importlib.util
import io

import numpy as np
import pytest
from conftest import required

from chatflow.models.gemma import GemmaModelHandler
from chatflow.models.grammar import Text
from chatflow.models.presets import use_jax
from chatflow.models.requests import Failure, Part, Request, WorkerSettings

# chatflow.models.engine is imported when keras has its backend.
use_jax()
from chatflow.models.engine import Row  # noqa: E402

CORPUS = "the parcel is late and the customer is angry about it but the agent said sorry . " * 4


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def preset(request, tmp_path_factory):
    """A folder with a tiny random model of a generation, as keras_hub saves it."""
    if not importlib.util.find_spec("keras_hub"):
        required("keras_hub", "pip install 'chatflow[gemma]'")
    use_jax()
    import keras_hub
    import sentencepiece

    folder = str(tmp_path_factory.mktemp(request.param))
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS]), model_writer=proto, vocab_size=60, model_type="BPE",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", add_dummy_prefix=False, minloglevel=2,
        control_symbols=["<start_of_turn>", "<end_of_turn>"], user_defined_symbols=["\n"],
    )  # fmt: skip
    size = {
        "vocabulary_size": 60, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
        "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
    }  # fmt: skip
    window = {"use_sliding_window_attention": True, "sliding_window_size": 8}
    if request.param == "gemma3":
        backbone = keras_hub.models.Gemma3Backbone(
            image_size=None, vision_encoder=None, **size, **window
        )
        tokenizer = keras_hub.models.Gemma3Tokenizer(proto.getvalue(), has_vision_tokens=False)
    else:
        caps = {"attention_logit_soft_cap": 50, "final_logit_soft_cap": 30, **window}
        backbone = keras_hub.models.GemmaBackbone(
            **size, **(caps if request.param == "gemma2" else {})
        )
        tokenizer = keras_hub.models.GemmaTokenizer(proto.getvalue())
    rng = np.random.default_rng(7)
    for variable in backbone.weights:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    backbone.save_to_preset(folder)
    tokenizer.save_to_preset(folder)
    return folder


@pytest.fixture(scope="module")
def engine(preset):
    return load(preset).engine


def load(preset, instruct=False, **settings):
    settings = {"dtype": "float32", **settings}
    return GemmaModelHandler(preset, instruct, WorkerSettings(**settings)).load_model()


def logits_of(engine, ids):
    """Logits of the next token, by a plain forward pass of the whole prompt."""
    tokens = np.zeros((1, 96), np.int32)  # one shape, so that it is compiled once
    tokens[0, : len(ids)] = ids
    out = engine.forward.model(
        {"token_ids": tokens, "padding_mask": np.arange(96)[None] < len(ids)}
    )
    return np.asarray(out)[0, len(ids) - 1]


def greedy(engine, text, steps):
    """Tokens by plain forward passes, without those that no text may hold."""
    held = np.array([not piece for piece in engine.vocabulary.pieces])
    held[list(engine.vocabulary.ends)] = False
    ids = [engine.tokenizer.start_token_id, *engine.encode(text)]
    start = len(ids)
    for _ in range(steps):
        ids.append(int(np.where(held, -np.inf, logits_of(engine, ids)).argmax()))
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


def test_rows_of_one_batch_continue_as_each_would_alone(engine):
    """Also with a shared prefix, and over more tokens than the sliding window."""
    prefix = "the customer is angry\n"
    found = engine.run([write(prompt, 12, prefix) for prompt in PROMPTS])
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = greedy(engine, prefix + prompt, 12)
        assert list(row.tokens) == ids
        assert row.prompt_tokens == 1 + len(engine.encode(prefix)) + len(engine.encode(prompt))


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
    monkeypatch.setattr("chatflow.models.engine.TOTALS", (128, 192))
    handler = GemmaModelHandler(preset)
    model = load(preset)
    batch = [request("sorry"), request("angry " * 400), request("late")]
    one, two, three = (r.inference for r in handler.run_inference(batch, model))
    assert isinstance(two, Failure)
    assert (two.reason, "at most 192" in two.error) == ("prompt_too_long", True)
    assert one.text == model.answer([batch[0]])[0].text
    assert three.text == model.answer([batch[2]])[0].text


def test_bfloat16_answers_too(preset):
    model = load(preset, dtype="bfloat16")
    assert model.engine.forward.model.backbone.compute_dtype == "bfloat16"
    (answer,) = model.answer([request("the parcel is late")])
    assert answer.answer_tokens > 0


def test_a_remote_folder_is_copied_once(preset, tmp_path, monkeypatch):
    """As for gs://, here through the same interface of Beam with a local address."""
    from chatflow.models import presets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    copy = presets.copied(preset, said.append)
    assert {p.name for p in copy.iterdir()} >= {"config.json", "model.weights.h5"}
    assert said
    said.clear()
    assert presets.copied(preset, said.append) == copy
    assert not said
    assert load(str(copy)).answer([request("sorry")])
