"""The switch, the scripted model, and what all handlers promise."""

import json
import pickle
import time

import pytest

from chatflow.errors import ElementError, UsageError
from chatflow.models.base import LanguageModel
from chatflow.models.requests import Answer, Failure, Part, Request
from chatflow.models.scripted import ScriptedModelHandler, load_script
from chatflow.models.spec import Model, ModelSpec
from chatflow.weights.presets import PRESETS_VARIABLE, check_preset, is_instruct, local_preset


def request(prompt="hello", task="analysis", chat_id="7", user_id="c"):
    return Request("id", task, chat_id, user_id, (Part(field=None, prompt=prompt),))


def answers(handler, *requests):
    model = handler.load_model()
    return [result.inference for result in handler.run_inference(requests, model)]


def rules(tmp_path, *values):
    path = tmp_path / "script.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n\n")
    return ScriptedModelHandler(load_script(str(path)))


def test_the_first_rule_that_fits_answers(tmp_path):
    handler = rules(
        tmp_path,
        {"task": "apology", "answer": "We are sorry."},
        {"chat_id": 8, "answer": {"sentiment": 0}},
        {"match": "refund(s|ed)", "answer": "money"},
        {"user_id": "d", "error": "overloaded"},
        {"match": "once", "answer": "first", "times": 1},
        {"answer": "else"},
    )
    found = answers(
        handler,
        request(task="apology"),
        request(chat_id="8"),
        request("I want refunds"),
        request(user_id="d"),
        request("once"),
        request("once"),
        request("refund"),
    )
    texts = [a.text if isinstance(a, Answer) else a.reason for a in found]
    assert texts == [
        "We are sorry.", '{"sentiment": 0}', "money", "overloaded", "first", "else", "else",
    ]  # fmt: skip


def test_a_request_that_no_rule_fits_fails_and_says_so(tmp_path):
    (found,) = answers(rules(tmp_path, {"chat_id": "8", "answer": "x"}), request())
    assert found == Failure("no_rule", "no rule of the script fits chat 7")


def test_a_rule_can_stall(tmp_path):
    started = time.monotonic()
    (found,) = answers(rules(tmp_path, {"stall_seconds": 0.05, "answer": "x"}), request())
    assert time.monotonic() - started >= 0.05
    assert found.seconds >= 0.05


def test_a_crash_of_a_batch_fails_those_alone_that_crash_it(tmp_path):
    handler = rules(tmp_path, {"match": "bad", "crash": "out of memory"}, {"answer": "fine"})
    found = answers(handler, request("good"), request("bad"), request("good"))
    assert [type(a) for a in found] == [Answer, Failure, Answer]
    assert found[1] == Failure("model_error", "RuntimeError: out of memory")


def test_too_few_answers_are_never_paired_by_position():
    class Short(LanguageModel):
        def answer(self, batch):
            return [Answer(r.id, "m") for r in batch[:1]] if len(batch) > 1 else [Answer("x", "m")]

    handler = ScriptedModelHandler(lambda _: "")
    found = [r.inference for r in handler.run_inference([request(), request()], Short())]
    assert [a.text for a in found] == ["x", "x"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "script.jsonl:1: "),
        ('\n{"answr": 1}', "script.jsonl:2: unknown ['answr']"),
        ("[1]", "a rule is a JSON object"),
        ('{"match": "("}', "script.jsonl:1: "),
    ],
)
def test_a_mistake_in_a_script_is_said_with_its_line(tmp_path, text, says):
    (tmp_path / "script.jsonl").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_script(str(tmp_path / "script.jsonl"))
    assert says in str(caught.value)


def test_a_function_answers_and_fails_one_request_with_an_element_error():
    def function(asked):
        if asked.chat_id == "8":
            raise ElementError("quota", "no more", "half an ans")
        return asked.parts[0].prompt.upper()

    found = answers(ScriptedModelHandler(function), request("a"), request(chat_id="8"))
    assert found[0].text == "A"
    assert found[1] == Failure("quota", "no more", "half an ans")


def test_two_runs_on_a_machine_never_share_a_model():
    handler = ScriptedModelHandler(str)
    assert Model(handler).identifier != Model(handler).identifier


@pytest.mark.parametrize(
    ("name", "instruct"),
    [
        ("gemma3-270m", False),
        ("gemma3_instruct_1b", True),
        ("gemma_1.1_instruct_2b_en", True),
        ("hf://google/gemma-3-1b-it", True),
        ("hf://google/gemma-3-1b-pt", False),
        ("gs://bucket/italy/gemma", False),
    ],
)
def test_instruct_models_are_known_by_their_names(name, instruct):
    assert is_instruct(name) is instruct
    assert ModelSpec("scripted:x").instruct


def test_the_kind_can_be_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert ModelSpec(str(tmp_path), model_kind="instruct").instruct
    assert not ModelSpec(str(tmp_path)).instruct


def test_the_handler_of_the_default_travels_without_loading():
    handler = pickle.loads(pickle.dumps(ModelSpec().handler()))
    assert handler.name == "gemma3-270m@support-2"
    assert handler.share_model_across_processes()
    assert handler.batch_elements_kwargs()["max_batch_size"] == 16


def test_a_preset_that_an_image_brings_along_is_taken_by_its_name(tmp_path, monkeypatch):
    for name in ("mine", "gemma3-270m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="unknown model 'mine'"):
        check_preset("mine")
    monkeypatch.setenv(PRESETS_VARIABLE, str(tmp_path))
    check_preset("mine")
    assert local_preset("mine") == str(tmp_path / "mine")
    assert local_preset("gemma3-270m") == str(tmp_path / "gemma3-270m")
    assert local_preset("hf://google/gemma-3-1b-it") == "hf://google/gemma-3-1b-it"


def test_a_folder_whose_name_begins_like_a_place_is_of_no_other_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("remote-gemma", "on_worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert type(ModelSpec(name).kind) is type(ModelSpec().kind)
