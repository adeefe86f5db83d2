import importlib.util
import math
import random
import sys
import types

import pytest
from conftest import chat, required
from hypothesis import given, settings
from hypothesis import strategies as st

from chatflow.errors import UsageError
from chatflow.evaluation.baselines import vader
from chatflow.evaluation.bias import fit_constants
from chatflow.evaluation.labels import Label
from chatflow.evaluation.measures import (
    ANSWERS,
    CLASSES,
    Confusion,
    calibration,
    compare,
    intervals,
    mcnemar,
)
from chatflow.records import Sentiment

A, N, H = Sentiment.ANGRY, Sentiment.NEUTRAL, Sentiment.HAPPY

PAIRS = st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(ANSWERS)), min_size=1)
TRIPLES = st.lists(
    st.tuples(st.sampled_from(CLASSES), st.sampled_from(ANSWERS), st.sampled_from(ANSWERS)),
    min_size=1,
)


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
    assert Confusion.of([]).accuracy == 0


@given(PAIRS)
def test_a_confusion_holds_each_chat_once(pairs):
    confusion = Confusion.of(pairs)
    rows = confusion.to_dict()["confusion"].values()
    assert sum(sum(row.values()) for row in rows) == confusion.total == len(pairs)
    assert sum(confusion.labelled(c) for c in CLASSES) == len(pairs)


@settings(max_examples=30)
@given(PAIRS)
def test_intervals_hold_the_figures_of_the_confusion(pairs):
    confusion, found = Confusion.of(pairs), intervals(pairs)
    exact = {
        "accuracy": confusion.accuracy,
        "macro_f1": confusion.macro_f1,
        "angry_recall": confusion.recall(A),
        "angry_precision": confusion.precision(A),
    }
    for name, value in exact.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].low - 1e-9 <= value <= found[name].high + 1e-9, name


def test_the_interval_of_a_share_is_that_of_the_binomial():
    pairs = [(A, A)] * 80 + [(A, N)] * 20
    accuracy = intervals(pairs)["accuracy"]
    assert accuracy.low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.01)
    assert accuracy.high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.01)
    assert intervals(pairs) == intervals(pairs)  # the seed is fixed


@settings(max_examples=30)
@given(PAIRS)
def test_a_model_does_not_differ_from_itself(pairs):
    labels, answers = zip(*pairs, strict=True)
    found = compare(labels, answers, answers)
    assert found.accuracy == found.macro_f1 == (0, 0, 0)
    assert found.p_value == 1
    assert "no more than chance" in found.verdict


@settings(max_examples=30)
@given(TRIPLES)
def test_turned_around_a_comparison_says_the_opposite(triples):
    labels, first, second = zip(*triples, strict=True)
    there, back = compare(labels, first, second), compare(labels, second, first)
    assert there.accuracy.value == pytest.approx(-back.accuracy.value)
    assert (there.better, there.worse) == (back.worse, back.better)
    assert there.p_value == back.p_value


def test_mcnemars_test_is_that_of_the_textbook():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)  # two-sided, a coin that falls alike five times
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(5, 5) == 1


def test_a_comparison_says_in_words_what_is_more_than_chance():
    labels = [A] * 40
    found = compare(labels, [A] * 20 + [N] * 20, [A] * 40)
    assert found.verdict == "better, more than chance (p < 0.001)"
    assert found.accuracy.value == 0.5
    assert 0.3 < found.accuracy.low < 0.5 < found.accuracy.high < 0.7
    assert compare(labels, [A] * 40, [A] * 34 + [N] * 6).verdict.startswith("worse, more than")
    assert compare(labels, [A] * 40, [A] * 36 + [N] * 4).verdict.startswith("no more than chance")


def test_calibration_is_that_of_the_textbook():
    found = calibration([(0.95, True), (0.85, True), (0.85, False), (0.4, False)])
    assert [(b.low, b.count, b.accuracy) for b in found.bins] == [
        (0.3, 1, 0),
        (0.8, 2, 0.5),
        (0.9, 1, 1),
    ]
    assert found.bins[1].confidence == pytest.approx(0.85)
    assert found.ece == pytest.approx((1 * 0.4 + 2 * 0.35 + 1 * 0.05) / 4)
    assert found.brier == pytest.approx((0.05**2 + 0.15**2 + 0.85**2 + 0.4**2) / 4)
    assert calibration([]) is None
    assert calibration([(0.0, False), (1.0, True)]).ece == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_bins_hold_each_answer_once(answers):
    found = calibration(answers)
    assert sum(part.count for part in found.bins) == found.count == len(answers)
    assert 0 <= found.ece <= 1
    assert all(part.low - 1e-9 <= part.confidence <= part.high + 1e-9 for part in found.bins)


def test_the_fitted_constants_are_those_by_which_the_scores_were_made():
    tones = {"so": N, "good": H, "bad": A}
    bias, temperature = {"so": 0.0, "good": 2.2, "bad": -0.7}, 1.8
    rng = random.Random(1)
    scores = []
    for _ in range(5000):
        likely = {word: math.exp(rng.gauss(0, 1)) for word in tones}
        label = tones[rng.choices(list(tones), [likely[word] for word in tones])[0]]
        drawn = {word: temperature * math.log(likely[word]) + bias[word] for word in tones}
        scores.append((drawn, label))
    fitted, found = fit_constants(scores, tones)
    assert fitted["good"] == pytest.approx(bias["good"], abs=0.15)
    assert fitted["so"] == 0
    called = [max(tones, key=lambda word: of[word] - fitted[word]) for of, _ in scores]
    assert called.count("bad") == pytest.approx([tone for _, tone in scores].count(A), abs=20)
    assert found == pytest.approx(temperature, abs=0.15)


def test_constants_stay_small_where_no_answer_is_wrong():
    tones = {"bad": A, "so": N, "good": H}
    scores = [
        ({word: float(tones[word] == label) for word in tones}, label) for label in tones.values()
    ]
    bias, temperature = fit_constants(scores, tones)
    assert all(abs(value) < 1 for value in bias.values())
    assert 0.05 < temperature < 1


def test_vader_reads_what_the_user_wrote(monkeypatch):
    class Analyser:
        def polarity_scores(self, text):
            return {"compound": {"fine": 0.05, "so": 0.049, "bad": -0.05}[text]}

    module = types.ModuleType("vaderSentiment.vaderSentiment")
    module.SentimentIntensityAnalyzer = Analyser
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    tone = vader()
    said = [tone(Label(A, "", chat(text, "great!"))) for text in ("fine", "so", "bad")]
    assert said == [H, N, A]


def test_the_real_vader_knows_good_words_from_bad():
    if not importlib.util.find_spec("vaderSentiment"):
        required("vaderSentiment", "pip install 'chatflow[evaluate]'")
    tone = vader()
    assert tone(Label(A, "", chat("I love it, thank you so much!"))) is H
    assert tone(Label(A, "", chat("This is horrible, I hate it."))) is A


def test_without_vader_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UsageError, match=r"pip install 'chatflow\[evaluate\]'"):
        vader()
