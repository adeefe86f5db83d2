"""Tiny random models on PyTorch, encoder-decoder and decoder-only, against transformers itself."""

import concurrent.futures
import ctypes
import gc
import json
import os
import pickle
import runpy
import signal
import sys
import threading
import weakref
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, chat, mistake, required
from fakes import environment
from fakes.dataflow import FakeCloud
from tiny import tiny_llama, tiny_t5

torch = pytest.importorskip("torch")
if not pytest.importorskip("transformers"):
    required("transformers", "pip install 'chatflow[torch]'")

from chatflow.errors import BadInputError, UsageError  # noqa: E402
from chatflow.models.pytorch.engine import LONGEST  # noqa: E402
from chatflow.models.pytorch.handler import (  # noqa: E402
    Torch,
    TorchModelHandler,
)
from chatflow.models.requests import Failure, Part, Request  # noqa: E402
from chatflow.models.several import SeveralModelsHandler  # noqa: E402
from chatflow.models.spec import Model, ModelSpec  # noqa: E402
from chatflow.options import Options, WorkerSettings  # noqa: E402
from chatflow.prompts.templates import load_template  # noqa: E402
from chatflow.records import Arrival  # noqa: E402
from chatflow.running.launch import execute  # noqa: E402
from chatflow.sources.puller import follow  # noqa: E402
from chatflow.stages.respond import AskTexts  # noqa: E402

torch.set_num_threads(1)  # others of a busy machine are waited for

EXAMPLES = ROOT / "examples"

PROMPTS = [
    "the parcel is late",
    "sorry",
    "the agent said the customer is angry about the parcel and it is late",
    "angry " * 20,
    "it",
]
CHOICES = ("the customer", "angry", "sorry about it")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["t5", "llama"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def load(folder, instruct=False, state_dict_path="", dtype="auto"):
    return TorchModelHandler(
        folder, instruct, str(state_dict_path), WorkerSettings(dtype=dtype)
    ).load_model()


def part(prompt, max_tokens=12, **fields):
    return Part(field=None, prompt=prompt, max_tokens=max_tokens, **fields)


def scored(prompt, choices=CHOICES, **fields):
    return Part("sentiment", prompt, choices=choices, values=(-1, 0, 1), **fields)


def request(*parts):
    return Request("id", "analysis", "1", "c", parts)


def ids_of(engine, prompt):
    """As a decoder-only model reads it, a text goes on."""
    ids = engine.tokenizer(prompt).input_ids
    return ids if engine.encodes else ids[:-1]


def alone(engine, prompt, steps=12, **given):
    """What transformers' own `generate` writes."""
    ids = torch.tensor([ids_of(engine, prompt)])
    out = engine.model.generate(ids, max_new_tokens=steps, do_sample=False, **given)[0].tolist()
    return (
        out[len(given.get("decoder_input_ids", [[0]])[0]) :]
        if engine.encodes
        else out[ids.shape[1] :]
    )


def test_rows_of_one_batch_continue_as_each_would_alone(model):
    """Token for token, at any length."""
    engine = model.engine
    for prompt, found in zip(PROMPTS, engine.run([part(p) for p in PROMPTS]), strict=True):
        assert list(found.tokens) == alone(engine, prompt)
        assert found.prompt_tokens == len(ids_of(engine, prompt))


def test_rows_end_each_at_its_own_limit(model):
    engine = model.engine
    limits = [1, 12, 3, 7, 5]
    rows = engine.run([part(p, n) for p, n in zip(PROMPTS, limits, strict=True)])
    for prompt, limit, row in zip(PROMPTS, limits, rows, strict=True):
        assert list(row.tokens) == alone(engine, prompt, limit)
    (whole,) = engine.run([part(PROMPTS[0])])
    assert len(whole.text) > 4
    stop = whole.text[2:4]
    short, cut = engine.run([part(PROMPTS[0], stop=(stop,)), part(PROMPTS[0], characters=3)])
    assert (short.text, short.cut) == (whole.text.split(stop)[0], False)
    assert (cut.text, cut.cut) == (whole.text[:3], True)
    assert len(short.tokens) < len(whole.tokens)
    assert len(cut.tokens) < len(whole.tokens)


def test_scores_are_the_log_probabilities_of_a_plain_forward_pass(model):
    engine = model.engine
    rows = engine.run([scored(prompt) for prompt in PROMPTS])
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = ids_of(engine, prompt)
        for choice, score in zip(CHOICES, row.scores, strict=True):
            answer = engine.tokenizer(choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                if engine.encodes:
                    given = {"decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}
                    logits = engine.model(torch.tensor([ids]), **given).logits[0]
                else:
                    logits = engine.model(torch.tensor([[*ids, *answer[:-1]]])).logits[0]
            log_probs = logits[-len(answer) :].double().log_softmax(-1)
            plain = sum(log_probs[at, token].item() for at, token in enumerate(answer))
            assert score == pytest.approx(plain, abs=1e-3)
        assert row.choice == max(range(3), key=lambda at: row.scores[at])
    bias = tuple(100.0 * (at == rows[0].choice) for at in range(3))
    (other,) = engine.run([scored(PROMPTS[0], bias=bias)])
    assert other.choice != rows[0].choice


def test_one_choice_that_begins_another_is_refused(model):
    with pytest.raises(ValueError, match="begins with another"):
        model.engine.run([scored("x", ("the", "the parcel", "sorry"))])


def test_the_parts_of_a_request_make_one_answer(model):
    asked = request(
        scored(PROMPTS[0]),
        Part("summary", PROMPTS[0] + " it", lead="it", tail=" .", max_tokens=5),
    )
    (answer,) = model.answer([asked])
    found = json.loads(answer.text)
    assert found["sentiment"] in (-1, 0, 1)
    assert found["summary"].startswith("it")
    assert found["summary"].endswith(" .")
    assert {name for name, _ in answer.tone_scores} == set(CHOICES)
    assert answer.answer_tokens <= 5
    assert answer.model == model.name


def test_an_encoder_decoders_answer_goes_on_from_its_lead(t5):
    engine = load(t5).engine
    (found,) = engine.run([part("the parcel is late. it is", lead="it is")])
    start = [0, *engine.tokenizer("it is", add_special_tokens=False).input_ids]
    expected = alone(engine, "the parcel is late.", decoder_input_ids=torch.tensor([start]))
    assert list(found.tokens) == expected
    both = engine.tokenizer.decode(start[1:] + expected, skip_special_tokens=True)
    assert "it is" + found.text == both


def test_an_instruct_model_is_asked_by_its_chat_template(llama):
    """Text cannot stand for the template's special tokens."""
    engine = load(llama, instruct=True).engine
    turn = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "sorry"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    (row,) = engine.run([part("sorry")])
    assert row.prompt_tokens == len(turn)
    written = engine.model.generate(torch.tensor([turn]), max_new_tokens=12, do_sample=False)
    assert list(row.tokens) == written[0, len(turn) :].tolist()
    end = engine.tokenizer.eos_token_id
    assert turn.count(end) == 1
    assert engine._turn("sorry</s>agent . yes").count(end) == 1
    assert end not in engine.encode("</s>", special=False)


def test_little_of_a_batch_is_padding(model):
    model.counts()
    requests = [request(part("late " * n, 1)) for n in (1, 40, 2, 30, 3, 35)]
    model.answer(requests)
    counts = model.counts()
    assert counts["calls"] <= 3
    assert counts["padding_tokens"] < counts["prompt_tokens"] / 2
    assert model.counts() == {}


def test_a_prompt_that_is_too_long_fails_alone(model, monkeypatch):
    assert model.engine.longest == (LONGEST if model.engine.encodes else 128)
    monkeypatch.setattr(model.engine, "longest", 128)
    batch = [request(part("sorry")), request(part("angry " * 400)), request(part("late"))]
    one, two, three = model.answer(batch)
    assert isinstance(two, Failure)
    assert (two.reason, "at most 128" in two.error) == ("prompt_too_long", True)
    assert one.text == model.answer([batch[0]])[0].text
    assert three.text == model.answer([batch[2]])[0].text


@pytest.mark.slow
def test_concurrent_callers_get_what_each_would_alone(model):
    requests = [request(part(prompt)) for prompt in PROMPTS * 3]
    expected = [model.answer([one])[0].text for one in requests]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        found = pool.map(lambda one: model.answer([one])[0].text, requests)
    assert list(found) == expected


def test_scores_that_are_no_numbers_are_failures(t5):
    model = load(t5)
    with torch.no_grad():
        model.engine.model.lm_head.weight[5] = float("nan")
    for asked in (request(part("sorry")), request(scored("sorry"))):
        (found,) = model.answer([asked])
        assert isinstance(found, Failure)
        assert (found.reason, "--dtype" in found.error) == ("not_finite", True)


@pytest.mark.slow
def test_a_model_that_is_dropped_leaves_nothing_behind(t5):
    earlier = {*threading.enumerate()}  # of models that other tests have just dropped
    model = load(t5)
    model.answer([request(part("sorry"))])
    threads = {t for t in threading.enumerate() if t.name == "merger"} - earlier
    weights = weakref.ref(model.engine.model)
    del model
    gc.collect()
    assert weights() is None
    ended = [thread for thread in threads if thread.join(1) is None and not thread.is_alive()]
    assert len(ended) == 1


# Weights.


def weights(folder):
    from transformers import AutoConfig

    from chatflow.weights.torch_loading import without_weights

    return type(without_weights(AutoConfig.from_pretrained(folder))).from_pretrained(folder)


@pytest.fixture
def without_weights(folder, tmp_path):
    """A copy of the folder that has only the configuration and the tokenizer."""
    copy = tmp_path / "bare"
    copy.mkdir()
    for file in Path(folder).iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    return str(copy)


def test_a_state_dict_takes_the_place_of_the_folders_weights(
    model, folder, without_weights, tmp_path
):
    path = tmp_path / "weights.pt"
    torch.save(weights(folder).state_dict(), path)
    loaded = load(without_weights, state_dict_path=path)
    batch = [request(scored(p), part(p)) for p in PROMPTS]
    ours, theirs = loaded.answer(batch), model.answer(batch)
    assert [a.text for a in ours] == [a.text for a in theirs]
    assert not [n for n, t in loaded.engine.model.named_parameters() if t.is_meta]
    assert not [n for n, t in loaded.engine.model.named_buffers() if t.is_meta]


def test_halves_take_half_the_room_and_decide_the_same(model, folder, without_weights, tmp_path):
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    torch.save(weights(folder).state_dict(), whole)
    torch.save(weights(folder).half().state_dict(), half)
    assert half.stat().st_size < whole.stat().st_size * 0.75  # the rest is the files' own
    rows = [scored(prompt) for prompt in PROMPTS]
    expected = model.engine.run(rows)
    size = sum(t.nbytes for t in model.engine.model.parameters())
    kept = sum(
        t.nbytes
        for n, t in model.engine.model.named_parameters()
        if model.engine.encodes and ".wo." in n
    )
    for path, dtype in ((half, "auto"), (whole, "float16"), (half, "bfloat16"), (half, "float32")):
        engine = load(without_weights, state_dict_path=path, dtype=dtype).engine
        dtypes = {name: t.dtype for name, t in engine.model.named_parameters()}
        wanted = torch.float16 if dtype == "auto" else getattr(torch, dtype)
        wo = {name for name in dtypes if ".wo." in name}
        assert {dtypes[name] for name in dtypes if name not in wo} == {wanted}
        if wanted == torch.float16:  # T5's wo overflows in it
            assert {dtypes[name] for name in wo} <= {torch.float32}
            own = sum(t.nbytes for t in engine.model.parameters())
            assert own == (size - kept) / 2 + kept
        for ours, theirs in zip(engine.run(rows), expected, strict=True):
            tolerance = 0.5 if dtype == "bfloat16" else 0.05
            assert ours.scores == pytest.approx(theirs.scores, abs=tolerance)
            assert ours.choice == theirs.choice


def test_weights_come_from_cloud_storage(t5, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = weights(t5)
    torch.save(found.state_dict(), tmp_path / "w.pt")
    separate = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    save_file(separate, tmp_path / "w.safetensors")
    expected = load(t5).answer([request(part(PROMPTS[0]))])[0].text
    with FakeCloud("models") as fake, environment(fake.environment):
        for file in Path(t5).iterdir():
            fake.put("models", f"t5/{file.name}", file.read_bytes())
        for name in ("w.pt", "w.safetensors"):
            fake.put("models", name, (tmp_path / name).read_bytes())
        for path in ("", "gs://models/w.pt", "gs://models/w.safetensors"):
            spec = ModelSpec("torch:gs://models/t5", state_dict_path=path)
            handler = pickle.loads(pickle.dumps(spec.handler()))
            (answer,) = handler.load_model().answer([request(part(PROMPTS[0]))])
            named = "torch:gs://models/t5" + (f"@{path}" if path else "")
            assert (answer.text, answer.model) == (expected, named)
        with pytest.raises(UsageError, match=r"--state_dict_path=gs://models/no.pt: no such file"):
            ModelSpec("torch:gs://models/t5", state_dict_path="gs://models/no.pt")


def peak_of(function):
    """The most memory that a call takes, and its result, in MB."""

    def status(name):
        _, text = Path("/proc/self/status").read_text().split(name, 1)
        return int(text.split()[0]) / 1000

    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what earlier tests gave back would be taken again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS:")
    result = function()
    return status("VmHWM:") - before, result


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measured on Linux")
@pytest.mark.slow
def test_weights_are_in_memory_once(t5, tmp_path):
    """Beam's plain way has them twice, and halves as float32."""
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    T5Tokenizer.from_pretrained(t5).save_pretrained(tmp_path)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=512, num_layers=4, num_heads=8,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    path = str(tmp_path / "half.pt")
    torch.save(T5ForConditionalGeneration(config).half().state_dict(), path)
    size = os.path.getsize(path) / 1e6
    assert size > 50
    ours, _ = peak_of(lambda: load(str(tmp_path), state_dict_path=path))
    beams = PytorchModelHandlerTensor(path, T5ForConditionalGeneration, {"config": config})
    plain, _ = peak_of(beams.load_model)
    assert ours < size * 1.5  # T5's wo is widened, a seventh of it
    assert plain > size * 2.5


def test_output_weights_of_its_own_are_kept(t5, tmp_path):
    """Flan-T5 has them; transformers 5 ties them to the embedding where they are not given."""
    state_dict = weights(t5).state_dict()
    torch.save(state_dict, tmp_path / "weights.pt")
    model = load(t5, state_dict_path=tmp_path / "weights.pt").engine.model
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    for name in ("lm_head.weight", "shared.weight", "encoder.embed_tokens.weight"):
        assert torch.equal(model.state_dict()[name], state_dict[name])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda sd: sd.pop("encoder.block.0.layer.0.SelfAttention.q.weight"), "they lack encoder"),
        (lambda sd: sd.update(more=torch.zeros(1)), "they have too many: more"),
        (
            lambda sd: sd.update({"lm_head.weight": torch.zeros(3, 3)}),
            "lm_head.weight has the shape (3, 3), where",
        ),
        (
            lambda sd: sd["lm_head.weight"][0].fill_(torch.inf),
            "weights lm_head.weight are not all finite",
        ),
        (lambda sd: sd.update(step=7), "is not a state dict"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(t5, tmp_path, change, says):
    state_dict = weights(t5).state_dict()
    change(state_dict)
    torch.save(state_dict, tmp_path / "weights.pt")
    with pytest.raises(UsageError) as caught:
        load(t5, state_dict_path=tmp_path / "weights.pt")
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"--state_dict_path={tmp_path}")


def test_what_is_no_model_is_refused(t5, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no state dict can be read"):
        load(t5, state_dict_path=tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UsageError, match=f"--model=torch:{tmp_path}: "):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model=torch:./none"], "--model=torch:./none: no such folder"),
        (["--model=torch:EMPTY"], "has no config.json"),
        (["--model=torch:kaggle://a/b"], "not a name on the Hugging Face hub"),
        (["--model=torch:T5", "--state_dict_path=none.pt"], "--state_dict_path=none.pt: no such"),
        (["--model=torch:T5", "--state_dict_path=EMPTY"], "no such file"),
        (["--model=torch:T5", "--inference=remote"], "runs on the workers"),
        (["--model=torch:T5", "--quantization=int8"], "only for Gemma"),
        (["--state_dict_path=x.pt"], "only with --model=torch:NAME, not with --model=gemma3-270m"),
        (["--dtype=float16"], "only for torch: and vllm: models"),
    ],
)
def test_what_cannot_be_is_refused_at_launch(t5, tmp_path, capsys, flags, says):
    (tmp_path / "empty").mkdir()
    places = {"T5": t5, "EMPTY": str(tmp_path / "empty")}
    given = ["run", f"--input={SAMPLES}", f"--output={tmp_path}/out", *flags]
    assert says in mistake(given, places, capsys)


def test_without_pytorch_the_extra_is_named(t5, monkeypatch):
    monkeypatch.setattr(
        "chatflow.models.pytorch.handler.importlib.util.find_spec", lambda name: None
    )
    with pytest.raises(
        UsageError, match=r"torch is not installed: pip install 'chatflow\[torch\]'"
    ):
        ModelSpec(f"torch:{t5}")


@pytest.mark.parametrize(
    ("name", "instruct"),
    [
        ("torch:google/flan-t5-small", True),
        ("torch:google/t5-v1_1-small", False),
        ("torch:Qwen/Qwen2.5-0.5B-Instruct", True),
        ("torch:TinyLlama/TinyLlama-1.1B-Chat-v1.0", True),
        ("torch:hf://google/gemma-3-1b-it", True),
    ],
)
def test_its_kind_is_by_its_name(name, instruct):
    spec = ModelSpec(name)
    assert (spec.instruct, spec.writes_json, type(spec.kind)) == (instruct, False, Torch)
    assert spec.result_name == spec.handler().name == name


# Pipelines.


@pytest.mark.slow
def test_chats_of_files_become_analyses(t5, tmp_path, lines):
    chats = [chat("the parcel is late", chat_id=str(n)) for n in range(5)]
    torch.save(weights(t5).half().state_dict(), tmp_path / "half.pt")
    summary = execute(
        Options(
            input=lines(*chats), output=str(tmp_path / "out"), model=f"torch:{t5}",
            state_dict_path=str(tmp_path / "half.pt"), model_kind="instruct",
        ),
        [],
    )  # fmt: skip
    counts = json.loads(summary.to_json())
    assert (counts["chats_read"], counts["lost"]) == (5, 0)
    found = [json.loads(line) for f in (tmp_path / "out").glob("analyses*") for line in f.open()]
    assert len(found) == counts["analysed"] > 0
    assert {analysis["model"] for analysis in found} == {f"torch:{t5}@{tmp_path}/half.pt"}
    assert all(set(a["tone_scores"]) == {"angry", "neutral", "happy"} for a in found)


@pytest.mark.slow
def test_a_stream_of_messages_becomes_analyses(t5, pubsub):
    options = pubsub.options(model=f"torch:{t5}", quiet_seconds=0.5)
    with pubsub.inbox() as inbox, pubsub.pipeline(options):
        for number in range(4):
            said = {"user_id": "c", "role": "customer", "text": "the parcel is late"}
            pubsub.send({"chat_id": str(number), **said})
        inbox.wait(lambda box: len(box.analyses) + len(box.dead_letters) >= 4)
    assert {analysis["chat_id"] for analysis in inbox.analyses} == {"0", "1", "2", "3"}


def records(folder, kind):
    return [json.loads(line) for file in folder.glob(f"{kind}-*") for line in file.open()]


@pytest.mark.parametrize("kind", ["torch", "scripted"])
@pytest.mark.slow
def test_the_translate_example_runs(t5, tmp_path, script, kind, monkeypatch):
    rule = {"task": "task", "match": "^translate English to German: ", "answer": "Das Paket."}
    model = f"torch:{t5}" if kind == "torch" else script({"match": "poison", "error": "no"}, rule)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("The parcel.\n\npoison\n")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xfe not UTF-8\n")
    given = ["--input", f"{tmp_path}/in/*.txt", "--output", f"{tmp_path}/out", "--model", model]
    given += ["--task", "translate English to German"]
    monkeypatch.setattr(sys, "argv", ["translate.py", *given])
    runpy.run_path(str(EXAMPLES / "translate.py"), run_name="__main__")
    answered, failed = (records(tmp_path / "out", k) for k in ("responses", "dead_letters"))
    assert len(answered) + len(failed) == 3
    reasons = {letter["reason"] for letter in failed}
    assert "not_utf8" in reasons
    if kind == "scripted":
        (response,) = answered
        assert (response["text"], response["response"]) == ("The parcel.", "Das Paket.")
        assert reasons == {"not_utf8", "no"}
        assert "poison" in {letter["payload"] for letter in failed}
    else:
        assert {response["model"] for response in answered} <= {model}


@pytest.mark.slow
def test_the_respond_example_runs(t5, pubsub, monkeypatch):
    """On the emulator, until Ctrl-C; what fails goes to the dead letters."""
    events, responses, dead = (pubsub.topic(n) for n in ("events", "analyses", "dead_letters"))
    given = [
        f"--model=torch:{t5}", f"--messages_subscription={pubsub.subscription('events')}",
        f"--responses_topic={responses}", f"--dead_letters={dead}",
    ]  # fmt: skip
    for number, text in enumerate((*PROMPTS[:3], b"\xff")):
        data = text if isinstance(text, bytes) else text.encode()
        pubsub.publisher.publish(events, data, customer=str(number)).result(timeout=60)
    arrived, ended = [], threading.Event()

    def attend():
        while len(arrived) < 4 and not ended.is_set():
            arrived.extend(json.loads(message.data) for message in results())
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["respond.py", *given])
    with follow([responses, dead]) as results:
        thread = threading.Thread(target=attend)
        thread.start()
        try:
            runpy.run_path(str(EXAMPLES / "respond.py"), run_name="__main__")
        finally:
            ended.set()
            thread.join()
    letters = [record for record in arrived if "stage" in record]
    answered = {r["attributes"]["customer"]: r for r in arrived if "response" in r}
    assert len(letters) + len(answered) == 4
    assert {letter["reason"] for letter in letters} >= {"not_utf8"}
    assert answered
    for number, response in answered.items():
        assert response["text"] == PROMPTS[int(number)]
        assert response["message_id"]
        assert response["response"]


@pytest.mark.parametrize(
    ("example", "flags", "says"),
    [
        ("translate", ["--input=none.txt", "--output=out"], "no file matches 'none.txt'"),
        ("translate", ["--input=x", "--output=y", "--model=torch:./no"], "no such folder"),
        ("respond", ["--messages_topic=t", "--responses_topic=t", "--dead_letters=d",
                     "--rate=1"], "unknown flag --rate=1"),
    ],
)  # fmt: skip
def test_the_examples_say_what_is_wrong(example, flags, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_text_that_is_too_long_is_a_dead_letter(script):
    model = Model(ModelSpec(script({"answer": "Das Paket."})).handler())
    template = load_template(EXAMPLES / "prompts" / "respond.jinja")
    ask = AskTexts(model, template, max_prompt_tokens=200)
    (question,) = ask.ask(Arrival(b"The parcel."))
    assert "The parcel." in question.request.parts[0].prompt
    with pytest.raises(
        BadInputError, match=r"about \d,\d\d\d tokens; max_prompt_tokens is 200"
    ) as e:
        ask.ask(Arrival(b"late " * 1000))
    assert e.value.reason == "prompt_too_long"
    with pytest.raises(UsageError, match="max_prompt_tokens is 0: shorten"):
        AskTexts(model, template, max_prompt_tokens=0)


def test_texts_are_asked_of_one_model(script):
    model = Model(SeveralModelsHandler({"x": ModelSpec(script({"answer": "x"})).handler()}))
    with pytest.raises(UsageError, match="AskTexts: model: must be a single model"):
        AskTexts(model, load_template(EXAMPLES / "prompts" / "respond.jinja"))
