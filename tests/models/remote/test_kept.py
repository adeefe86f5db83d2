"""Answers that are kept: nothing is asked and paid for twice, whatever stops a run."""

import collections
import dataclasses
import json
import random
import threading

import pytest
from conftest import ROOT, chat, read
from remotes import OPENAI, is_json, request

from chatflow.choices.heads import Chosen
from chatflow.database.connections import Database
from chatflow.errors import UsageError
from chatflow.models.base import LanguageModel
from chatflow.models.kept import KeptAnswers, KeptSettings, question_id
from chatflow.models.prices import Price
from chatflow.models.requests import Answer, Failure
from chatflow.options import NO_CLOUD, Options
from chatflow.pipeline import plan
from chatflow.running.launch import execute


class Counting(LanguageModel):
    """Answers by the prompt; counts how often each one is asked."""

    def __init__(self):
        self.asked = collections.Counter()

    def answer(self, requests):
        self.asked.update(one.parts[0].prompt for one in requests)
        return [
            Failure("down", "is down")
            if "poison" in one.parts[0].prompt
            else Answer(one.parts[0].prompt.upper(), "m", 7, 3, 2, 0.5)
            for one in requests
        ]


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/answers.db"


def test_what_was_answered_is_not_asked_again_and_costs_nothing(uri):
    first, second = Counting(), Counting()
    asked = [request("a", name="1"), request("b", name="2")]
    before = KeptAnswers(first, KeptSettings(uri)).answer(asked)
    after = KeptAnswers(second, KeptSettings(uri)).answer([*asked, request("c", name="3")])
    assert [one.text for one in after] == ["A", "B", "C"]
    assert second.asked == {"c": 1}
    assert (before[0].prompt_tokens, before[0].answer_tokens) == (7, 3)
    assert (after[0].prompt_tokens, after[0].answer_tokens, after[0].cached_tokens) == (0, 0, 0)


def test_an_answer_is_kept_whole(uri):
    chosen = Chosen({"tone": {"angry": 0.9}}, {"part": ((0.5, 0.5),)}, {"part": ("a", "b")})
    whole = Answer(
        "é\u2028", "m", 1, 2, 0, 0.5, "length", (("angry", -0.1),), ("asked_again",), chosen
    )
    model = Counting()
    model.answer = lambda requests: [whole]
    kept = KeptAnswers(model, KeptSettings(uri))
    asked = [request("a")]
    kept.answer(asked)
    (found,) = kept.answer(asked)
    paid = {"prompt_tokens": 1, "answer_tokens": 2, "seconds": 0.5}
    assert dataclasses.replace(found, **paid) == whole


def test_a_failure_is_asked_again_and_counted_is_what_was_known(uri):
    model = Counting()
    kept = KeptAnswers(model, KeptSettings(uri))
    asked = [request("poison", name="1"), request("a", name="2")]
    assert isinstance(kept.answer(asked)[0], Failure)
    kept.answer(asked)
    assert model.asked == {"poison": 2, "a": 1}
    assert kept.new_counts()["answers_known"] == 1


def test_an_answer_that_cannot_be_used_is_asked_for_again(uri):
    model = Counting()
    kept = KeptAnswers(model, KeptSettings(uri))
    asked = [request("no json", check=is_json)]
    kept.answer(asked)
    kept.answer(asked)
    assert model.asked == {"no json": 2}


def test_what_another_model_answered_in_its_place_is_known_too(uri):
    model = Counting()
    kept = KeptAnswers(model, KeptSettings(uri))
    first = dataclasses.replace(request("poison"), otherwise=request("b", name="of b"))
    for _ in range(2):
        (found,) = kept.answer([first])
        assert (found.text, found.repairs) == ("B", ("fallback",))
    assert model.asked == {"poison": 2, "b": 1}


def test_a_cost_that_cannot_be_booked_counts_all_the_same(uri):
    prices = {"m": Price(input=1e6)}
    settings = KeptSettings(uri, run="r", most_usd=10.0, prices=prices)
    kept = KeptAnswers(Counting(), settings)
    with Database(uri).write() as connection:
        connection.exec_driver_sql("DROP TABLE spending")
    asked = [dataclasses.replace(request(text), model="m#1") for text in "abc"]
    found = [kept.answer([one])[0] for one in asked]
    assert [type(one) for one in found] == [Answer, Answer, Failure]
    assert found[2].reason == "over_budget"


def test_another_prompt_or_another_model_is_another_question():
    one = request("a")
    other_prompt, other_model = request("b"), dataclasses.replace(one, id="of another model")
    assert len({question_id(one), question_id(other_prompt), question_id(other_model)}) == 3
    assert question_id(one) == question_id(request("a"))


def test_an_answer_that_cannot_be_kept_is_used_all_the_same(uri):
    kept = KeptAnswers(Counting(), KeptSettings(uri))
    with Database(uri).write() as connection:
        connection.exec_driver_sql("CREATE TRIGGER full BEFORE INSERT ON answers "
                                   "BEGIN SELECT RAISE(FAIL, 'the disk is full'); END")  # fmt: skip
    (found,) = kept.answer([request("a")])
    assert found.text == "A"
    assert kept.new_counts()["answers_not_kept"] == 1


def test_a_second_run_asks_nothing_and_writes_all(tmp_path, lines, script, uri):
    rule = {"task": "analysis", "answer": {"sentiment": 0, "summary": "It is late."}}
    path = lines(*(chat(f"late {n}", chat_id=str(n)) for n in range(5)))
    flags = {"input": path, "model": script(rule), "answers": uri}
    first = execute(Options(output=f"{tmp_path}/one", **flags), []).to_dict()
    second = execute(Options(output=f"{tmp_path}/two", **flags), []).to_dict()
    assert (first["answers_known"], second["answers_known"]) == (0, 5)
    assert first["prompt_tokens"] > 0 == second["prompt_tokens"]
    records = [read(f"{tmp_path}/{name}", "analyses") for name in ("one", "two")]
    ids = [{record["analysis_id"] for record in some} for some in records]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 5


def test_a_mistake_in_the_flag_is_one_clear_line(tmp_path):
    with pytest.raises(UsageError, match=r"--answers: .* is not a database"):
        plan(Options(input="x", output="y", answers="redis"), NO_CLOUD)


def test_a_budget_needs_a_database_and_a_price(uri):
    flags = {"input": "x", "output": "y", "inference": "remote", "api_endpoint": "http://x/v1"}
    with pytest.raises(UsageError, match="--max_cost_usd: also give --answers=DATABASE"):
        plan(Options(model="openai:gpt-5-mini", max_cost_usd=1.0, **flags), NO_CLOUD)
    with pytest.raises(UsageError, match="no price by tokens is known of openai:mine"):
        plan(Options(model="openai:mine", max_cost_usd=1.0, answers=uri, **flags), NO_CLOUD)


@pytest.mark.slow
def test_a_run_of_two_processes_stops_asking_at_its_budget(vertex, tmp_path, lines, uri):
    vertex.brain.answer = lambda prompt: json.dumps({"sentiment": 0, "summary": "Asks."})
    (tmp_path / "prices.toml").write_text('["openai:*"]\ninput = 1000\noutput = 1000\n')
    options = Options(
        input=lines(*(chat(f"Where is parcel {n}?", chat_id=str(n)) for n in range(400))),
        output=f"{tmp_path}/out", inference="remote", model=OPENAI, answers=uri,
        api_endpoint=f"{vertex.address}/v1", max_cost_usd=20.0, max_in_flight=4,
        prices=f"{tmp_path}/prices.toml",
    )  # fmt: skip
    two = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    counts = execute(options, two).to_dict()
    assert (counts["lost"], counts["analysed"] + counts["dead_letters"]) == (0, 400)
    assert set(counts["dead_letters_by_reason"]) == {"model/over_budget"}
    calls = len(vertex.brain.calls)
    one = counts["cost_usd"] / calls
    assert calls == counts["analysed"]
    assert 20.0 <= counts["cost_usd"] <= 20.0 + 2 * 4 * one
    letters = read(f"{tmp_path}/out", "dead_letters")
    assert all(json.loads(letter["payload"])["messages"] for letter in letters)


CHATS, KILLS, IN_FLIGHT = 1_000, 5, 16


@pytest.mark.slow
def test_a_batch_that_is_killed_five_times_pays_for_each_answer_once(
    vertex, tmp_path, lines, uri, warm
):
    path = lines(*(chat(f"Where is parcel number {n}?", chat_id=str(n)) for n in range(CHATS)))
    moments = sorted(random.Random(7).sample(range(50, CHATS - 50), KILLS))
    answered, reached = [0], threading.Event()

    def answer(prompt):
        answered[0] += 1
        if moments and answered[0] >= moments[0]:
            reached.set()
        return json.dumps({"sentiment": 0, "summary": "Asks where a parcel is."})

    vertex.brain.answer = answer
    command = [
        "-m", "chatflow", "run", "--input", path, "--output", f"{tmp_path}/out",
        "--inference=remote", "--model", OPENAI, "--api_endpoint", f"{vertex.address}/v1",
        "--answers", uri, "--summary=json", f"--max_in_flight={IN_FLIGHT}",
    ]  # fmt: skip
    while moments:
        with warm.start(*command, cwd=ROOT) as run:
            assert reached.wait(300)
            run.kill()
            run.communicate()
        moments.pop(0)
        reached.clear()
    done = warm.run(*command, cwd=ROOT)
    assert done.returncode == 0, done.complained
    counts = json.loads(done.said)
    assert (counts["analysed"], counts["lost"], counts["dead_letters"]) == (CHATS, 0, 0)
    assert len({one["chat_id"] for one in read(f"{tmp_path}/out", "analyses")}) == CHATS
    # Only what was on its way when a run was killed is asked again: the service had answered it,
    # and nobody was there to hear it.
    again = sum(count - 1 for count in vertex.brain.answered.values())
    assert again <= KILLS * IN_FLIGHT
