"""The engine on tiny random models of the other families, against keras_hub itself."""

import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import required
from tiny import tiny_decoder

from chatflow.cli import main
from chatflow.errors import UsageError
from chatflow.models.gemma.grammar import Text
from chatflow.models.gemma.handler import GemmaModelHandler
from chatflow.models.requests import Part, Request
from chatflow.models.spec import ModelSpec
from chatflow.options import WorkerSettings
from chatflow.prompts.answers import ANALYSIS_SCHEMA, parse_analysis
from chatflow.weights.architectures import DECODERS, architecture_of
from chatflow.weights.families import FAMILIES, family_named
from chatflow.weights.presets import is_instruct, is_tuned, use_jax

use_jax()  # before the engine imports keras
from chatflow.models.gemma.engine import Row  # noqa: E402

KINDS = ("gemma3n", "gemma4", "gemma4_moe", "llama3", "qwen3", "smollm3")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    if not importlib.util.find_spec("keras_hub"):
        required("keras_hub", "pip install 'chatflow[gemma]'")
    return request.param


@pytest.fixture(scope="module")
def preset(kind, tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp(kind) / "tiny", kind)


def load(preset, instruct=False, **settings):
    settings = {"dtype": "float32", **settings}
    return GemmaModelHandler(preset, instruct, WorkerSettings(**settings)).load_model()


@pytest.fixture(scope="module")
def model(preset):
    return load(preset)


PROMPTS = [
    "the parcel is late",
    "sorry",
    "the agent said the customer is angry about the parcel and it is late but it is late",
    "it",
]
PREFIX = "the customer is angry\n"


def ids_of(engine, *texts):
    start = engine.tokenizer.start_token_id
    ids = [i for text in texts for i in engine.encode(text)]
    return ids if start is None else [start, *ids]


@pytest.mark.slow
def test_an_answer_is_keras_hubs_own_token_for_token(model):
    """`generate` of the whole prompt, greedy; over more tokens than a sliding window."""
    engine = model.engine
    theirs = engine.forward.model
    theirs.compile(sampler="greedy")
    rows = [Row(PREFIX, prompt, text=Text(), max_tokens=12) for prompt in PROMPTS]
    found = engine.run(rows)
    differ = 0
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = ids_of(engine, PREFIX, prompt)
        tokens = np.full((1, 64), ids[0], np.int32)  # 0 ends an answer of some
        tokens[0, : len(ids)] = ids
        given = {"token_ids": tokens, "padding_mask": np.arange(64)[None] < len(ids)}
        out = theirs.generate(given, stop_token_ids=list(engine.vocabulary.ends))
        said = np.asarray(out["token_ids"])[0, len(ids) : len(ids) + len(row.tokens)].tolist()
        assert list(row.tokens) == said
        assert row.prompt_tokens == len(ids)
        differ += len(set(said)) > 2
    assert differ  # the model says more than one word again and again


@pytest.mark.slow
def test_scores_are_the_log_probabilities_of_a_plain_forward_pass(model):
    engine, choices = model.engine, ("t", "a", "s")
    rows = engine.run([Row(PREFIX, prompt, choices=choices) for prompt in PROMPTS])
    plain = jax.jit(engine.forward.model)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = ids_of(engine, PREFIX, prompt)
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        given = {"token_ids": tokens, "padding_mask": np.arange(64)[None] < len(ids)}
        if engine.forward.family.name == "Gemma4":
            given["position_ids"] = np.arange(64)[None]
        logits = np.asarray(plain(given), np.float64)[0, len(ids) - 1]
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        first = [engine.encode(choice)[0] for choice in choices]
        np.testing.assert_allclose(row.scores, log_probs[first], atol=1e-3)


@pytest.mark.slow
def test_json_is_valid_whatever_a_model_says(model):
    forward, rng = model.engine.forward, np.random.default_rng(3)
    known = forward.weights
    try:
        for scale in (0.3, 3.0):
            forward.weights = [jnp.asarray(rng.normal(0, scale, w.shape), w.dtype) for w in known]
            model.engine._prefixes.clear()
            batch = [
                Request("id", "analysis", "1", "c", (part(f"say: {text}", int(tokens)),))
                for text, tokens in zip(PROMPTS, rng.integers(2, 40, 4), strict=True)
            ]
            for answer in model.answer(batch):
                assert set(parse_analysis(answer.text, 512).repairs) <= {"control_tokens"}
                assert json.loads(answer.text)["summary"]
    finally:
        forward.weights = known
        model.engine._prefixes.clear()


def part(prompt, max_tokens):
    return Part(
        field=None, prompt=prompt, shared=5, schema=ANALYSIS_SCHEMA, max_tokens=max_tokens,
        characters=60,
    )  # fmt: skip


IM = "<|im_start|>user\nsorry<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"
TURNS = {
    "gemma3n": "<bos><start_of_turn>user\nsorry<end_of_turn>\n<start_of_turn>model\n",
    "gemma4": "<bos><|turn>user\nsorry<turn|>\n<|turn>model\n",
    "gemma4_moe": "<bos><|turn>user\nsorry<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nsorry<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen3": f"{IM}\n",
    "smollm3": "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
    "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nYou are a helpful AI assistant named "
    f"SmolLM, trained by Hugging Face.\n\n<|im_end|>\n{IM}",
}


def spelled(engine, ids):
    """The text of tokens, with control tokens by their names."""
    pieces = engine.vocabulary.pieces
    return "".join(pieces[i].decode() or engine.tokenizer.id_to_token(i) for i in ids)


def test_a_prompt_stands_in_the_familys_chat_template(kind, preset):
    """Without thoughts; and what a customer writes never becomes a control token."""
    engine = load(preset, instruct=True).engine
    ids = [*engine._before, *engine.encode("sorry"), *engine._after]
    assert spelled(engine, ids) == TURNS[kind]
    (row,) = engine.run([Row("", "sorry", choices=("t", "a"))])
    assert row.prompt_tokens == len(ids)
    said = "<|im_end|><end_of_turn><turn|><|eot_id|></think>"
    control = {*engine._before, *engine._after} - {*engine.encode("user\nassistant model sorry.")}
    control = {i for i in control if not engine.vocabulary.pieces[i]}
    assert control
    assert not control & {*engine.encode(said)}
    ends = {spelled(engine, [i]) for i in engine.vocabulary.ends}
    assert ends >= {*engine.forward.family.ends} & {*said.replace("><", "> <").split()}


def test_a_vocabulary_without_the_turns_is_said(preset):
    engine = load(preset).engine
    with pytest.raises(ValueError, match=r"has no <\|turn_of\|>.*--model_kind=base"):
        engine._turn("<|turn_of|>user\n")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_lighter_weights_answer_much_alike(preset, model, settings):
    rows = [Row("the customer is\n", "the parcel is late", choices=("t", "a", "s"))]
    exact = model.engine.run(rows)[0].scores
    if "quantization" in settings and not model.engine.forward.family.quantizes:
        with pytest.raises(ValueError, match="cannot quantise"):
            load(preset, **settings)
        with pytest.raises(UsageError, match=r"--quantization=int8: .*cannot"):
            ModelSpec(preset, worker=WorkerSettings(**settings))
        return
    light = load(preset, **settings).engine
    sizes = [sum(w.nbytes for w in one.forward.weights) for one in (model.engine, light)]
    assert sizes[1] < sizes[0] * 0.7
    np.testing.assert_allclose(light.run(rows)[0].scores, exact, atol=1.0)


def test_its_size_is_known_from_its_folder(preset, model):
    found = architecture_of(preset)
    assert found.parameters == pytest.approx(model.engine.forward.model.count_params(), abs=32)
    assert found.kv_bytes(10, 4) == 10 * model.engine.forward.cache_bytes


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gemma3n_e2b_it", "gemma3n_e2b"),
        ("hf://google/gemma-3n-E4B-it", "gemma3n_e4b"),
        ("gemma4_instruct_2b", "gemma4_2b"),
        ("hf://google/gemma-4-E4B-it", "gemma4_4b"),
        ("hf://google/gemma-4-26B-A4B-it", "gemma4_26b"),
        ("hf://google/gemma-4-31B", "gemma4_31b"),
        ("hf://meta-llama/Meta-Llama-3-8B-Instruct", "llama3_8b"),
        ("hf://meta-llama/Llama-3.1-70B", "llama3_70b"),
        ("llama3.2_instruct_1b", "llama3.2_1b"),
        ("hf://Qwen/Qwen3-0.6B", "qwen3_0.6b"),
        ("qwen3_32b_en", "qwen3_32b"),
        ("hf://HuggingFaceTB/SmolLM3-3B", "smollm3_3b"),
    ],
)
def test_a_models_name_tells_its_size(name, known):
    assert architecture_of(name) == DECODERS[known]


def test_sizes_are_those_that_keras_hub_states():
    from keras_hub import models

    stated = {
        name: preset["metadata"]["params"]
        for family in FAMILIES
        for name, preset in getattr(models, f"{family}Backbone").presets.items()
        if name.startswith(("gemma3n", "gemma4_", "llama3", "qwen3_", "smollm3"))
        and not any(word in name for word in ("assistant", "embedding", "int8"))
    }
    assert len(stated) > 25
    for name, parameters in stated.items():
        assert architecture_of(name).parameters == pytest.approx(parameters, rel=1e-6), name


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("hf://Qwen/Qwen3-4B", True),
        ("hf://Qwen/Qwen3-4B-Base", False),
        ("smollm3_3b_en", True),
        ("hf://HuggingFaceTB/SmolLM3-3B-Base", False),
        ("llama3.2_instruct_1b", True),
        ("llama3.2_1b", False),
        ("gemma3n_e2b_it", True),
        ("gemma4_2b", False),
    ],
)
def test_a_name_tells_whether_a_model_follows_instructions(name, tuned):
    assert is_tuned(name) is tuned
    assert is_instruct("Qwen/Qwen3-4B") is False  # as torch: and vllm: take it


@pytest.mark.parametrize("given", [{"heads": "mine.heads.npz"}, {"adapter": "mine.lora.h5"}])
def test_what_cannot_be_fitted_to_a_family_is_said_at_launch(preset, given):
    with pytest.raises(UsageError, match=f"--{next(iter(given))}: only for Gemma 1 to 3"):
        ModelSpec(preset, **given)


def test_a_family_that_cannot_be_tuned_is_named_at_launch(preset, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    labels.touch()
    output = str(tmp_path / "mine.heads.npz")
    assert main(["tune", str(labels), "--output", output, "--model", preset]) == 2
    assert "cannot be tuned here; give a Gemma 1 to 3" in capsys.readouterr().err


def test_a_family_that_does_not_run_is_named_at_launch(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(UsageError, match=r"the model is a mistral; Gemma 1 to 4 .*torch:"):
        ModelSpec(str(tmp_path))
    assert main(["size", "--model", str(tmp_path)]) == 2
    assert "the model is a mistral" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 32000}')
    with pytest.raises(UsageError, match="the model is a Llama 1 or 2"):
        ModelSpec(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("hf://me/mine", None), ("hf://HuggingFaceTB/SmolLM-360M", None), ("llama-30b", None),
        ("DeepSeek-R1-Distill-Qwen-32B", None), ("Qwen3-30B-A3B", None), ("t5gemma-2b", None),
        ("qwen3.5-4b", None), ("Qwen3-VL-4B", None), ("gemma-3-1b-it", "Gemma3"),
        ("gemma-2b", "Gemma"), ("gemma-3n-E2B", "Gemma3n"), ("Qwen/Qwen3-30B", "Qwen3"),
    ],
)  # fmt: skip
def test_a_name_tells_the_family(name, family):
    found = family_named(name)
    assert (found.name if found else None) == family


def test_a_model_that_only_thinks_is_refused():
    with pytest.raises(UsageError, match="it thinks before each answer"):
        ModelSpec("hf://Qwen/Qwen3-4B-Thinking-2507")


def test_a_qwen_that_never_thinks_is_not_told_so():
    backbone = types.SimpleNamespace(rope_max_wavelength=5e6)
    assert FAMILIES["Qwen3"].turns(backbone)[1].endswith("assistant\n")
