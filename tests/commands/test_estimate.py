"""`chatflow estimate`: what all chats would cost, by a sample of them."""

import json

import pytest
from conftest import chat, mistake
from remotes import OPENAI

from chatflow.cli import main
from chatflow.evaluation.estimate import drawn

ANSWER = json.dumps({"sentiment": 0, "summary": "Asks where a parcel is."})


@pytest.fixture
def command(vertex, tmp_path, lines):
    vertex.brain.answer = lambda prompt: ANSWER
    (tmp_path / "prices.toml").write_text('["openai:*"]\ninput = 1000\noutput = 1000\n')
    texts = [f"Where is parcel {n}?" + " Please answer." * (n % 7) for n in range(300)]
    path = lines(*(chat(text, chat_id=str(n)) for n, text in enumerate(texts)))
    return [
        "--input", path, "--inference=remote", "--model", OPENAI, "--api_endpoint",
        f"{vertex.address}/v1", "--prices", f"{tmp_path}/prices.toml",
    ]  # fmt: skip


def test_the_whole_costs_what_was_said(command, vertex, tmp_path, capsys):
    assert main(["estimate", *command, "--summary=json", "--sample=40"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["chats"], said["sample"], said["answered"]) == (300, 40, 40)
    assert len(vertex.brain.calls) == 40
    assert main(["run", *command, "--output", f"{tmp_path}/out", "--summary=json"]) == 0
    real = json.loads(capsys.readouterr().out)
    cost = said["cost_usd"]
    assert cost["low"] <= real["cost_usd"] <= cost["high"]
    assert cost["low"] < cost["value"] < cost["high"]
    assert said["tokens_read"]["low"] <= real["prompt_tokens"] <= said["tokens_read"]["high"]
    assert said["sample_usd"] == pytest.approx(cost["value"] * 40 / 300)
    assert said["seconds"]["value"] > 0


def test_the_sample_is_not_paid_for_again(command, vertex, tmp_path, capsys):
    answers = ["--answers", f"sqlite:///{tmp_path}/answers.db"]
    main(["estimate", *command, *answers, "--sample=40"])
    said = capsys.readouterr().out
    assert "300 chats, estimated from 40 of them" in said
    assert "the sample cost" in said
    main(["run", *command, *answers, "--output", f"{tmp_path}/out", "--summary=json"])
    counts = json.loads(capsys.readouterr().out)
    assert (counts["answers_known"], counts["analysed"]) == (40, 300)
    assert len(vertex.brain.calls) == 300


def test_a_draw_gives_each_line_the_same_chance(lines):
    path = lines(*(chat("x", chat_id=str(n)) for n in range(20)))
    times = dict.fromkeys(range(20), 0)
    for seed in range(400):
        sample, count = drawn(path, 5, seed)
        assert (len(sample), count) == (5, 20)
        for line in sample:
            times[int(json.loads(line)["chat_id"])] += 1
    assert all(60 <= drawn_times <= 140 for drawn_times in times.values())  # 100 is the mean


def test_streams_and_single_messages_are_refused(lines, capsys):
    error = mistake(["estimate", "--input", "projects/p/subscriptions/s"], {}, capsys)
    assert "--input: a stream has no end" in error
    path = lines({"chat_id": "7", "user_id": "c", "text": "late"})
    error = mistake(["estimate", "--input", path], {}, capsys)
    assert "is not a chat with messages" in error
