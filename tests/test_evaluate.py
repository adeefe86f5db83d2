import json

import pytest
from conftest import chat

from chatflow.cli import main
from chatflow.evaluate import Confusion, fit_bias
from chatflow.records import Sentiment

A, N, H = Sentiment.ANGRY, Sentiment.NEUTRAL, Sentiment.HAPPY


def test_the_figures_are_those_of_the_textbook():
    pairs = [(A, A), (A, A), (A, N), (N, N), (N, H), (H, H), (H, A), (H, None)]
    confusion = Confusion.of(pairs)
    assert confusion.total == 8
    assert confusion.accuracy == 4 / 8
    assert confusion.precision(A) == pytest.approx(2 / 3)
    assert confusion.recall(A) == pytest.approx(2 / 3)
    assert confusion.f1(N) == pytest.approx(1 / 2)
    assert confusion.recall(H) == pytest.approx(1 / 3)  # what is not answered is wrong
    assert confusion.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 5) / 3)


def test_nothing_right_is_zero_and_not_an_error():
    assert Confusion.of([(A, H)]).macro_f1 == 0


def test_the_fitted_bias_undoes_a_preference():
    tones = {"bad": A, "so": N, "good": H}
    prefers = {"bad": -1.0, "so": 0.0, "good": 3.0}
    scores = [
        ({word: prefers[word] + 2 * (tones[word] == label) for word in tones}, label)
        for label in (A, N, H)
    ]
    bias = fit_bias(scores, tones)
    assert bias["so"] == 0
    assert -3 < bias["bad"] < 1
    assert 1 < bias["good"] < 5


def labelled(talk, sentiment, source="x-1"):
    return {**json.loads(talk.to_json()), "sentiment": sentiment, "source": source}


@pytest.fixture
def judged(lines, script):
    """Four labelled chats and one without a label; the model gets one wrong, one not at all."""
    model = script(
        *(
            {"chat_id": number, "answer": {"sentiment": tone, "summary": "It is what it is."}}
            for number, tone in (("1", -1), ("2", 0), ("3", -1))
        ),
        {"chat_id": "4", "error": "overloaded"},
        {"answer": {"sentiment": 0, "summary": "It is what it is."}},
    )
    path = lines(
        labelled(chat("one", chat_id="1"), -1),
        labelled(chat("two", chat_id="2"), 0, "y-2"),
        labelled(chat("three", chat_id="3"), 1),
        labelled(chat("four", chat_id="4"), 1),
        chat("five", chat_id="5"),
    )
    return path, model


def test_evaluate_compares_with_the_labels(judged, capsys):
    path, model = judged
    assert main(["evaluate", path, "--model", model, "--summary=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["all"]["accuracy"] == 0.5
    assert report["all"]["confusion"]["happy"] == {"angry": 1, "neutral": 0, "happy": 0, "none": 1}
    assert report["all"]["classes"]["angry"] == {"precision": 0.5, "recall": 1, "f1": 0.6667}
    assert report["sources"]["y"]["accuracy"] == 1
    assert (report["run"]["dead_letters"], report["run"]["lost"]) == (1, 0)


def test_evaluate_prints_the_confusion_matrix(judged, capsys):
    path, model = judged
    assert main(["evaluate", path, "--model", model]) == 0
    printed = capsys.readouterr().out
    for text in ("angry", "neutral", "happy", "none", "precision", "macro-F1", "recall of angry"):
        assert text in printed


def test_a_bias_cannot_be_fitted_without_scores(judged, capsys):
    path, model = judged
    assert main(["evaluate", path, "--model", model, "--fit_bias"]) == 2
    assert "does not score tone words" in capsys.readouterr().err


def test_a_bias_is_not_fitted_to_a_remote_model(judged, capsys):
    path, _ = judged
    flags = ["--inference=remote", "--model=gemini-2.5-flash", "--fit_bias"]
    assert main(["evaluate", path, *flags]) == 2
    assert "remote models give no scores" in capsys.readouterr().err


def test_a_wrong_label_is_said_with_its_line(lines, capsys):
    path = lines(labelled(chat("x"), 1), labelled(chat("y"), 5))
    assert main(["evaluate", path]) == 2
    assert f"{path}:2: " in capsys.readouterr().err
