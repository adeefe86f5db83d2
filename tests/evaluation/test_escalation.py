"""From which confidence on a second model is asked, by what both said of labelled chats."""

import pytest
from conftest import chat

from chatflow.evaluation.escalation import escalation
from chatflow.evaluation.labels import Label
from chatflow.evaluation.variants import Judged
from chatflow.records import Analysis, FirstOpinion, Sentiment


def judged(label, first, confidence, second=None):
    opinion = None
    if second is not None:
        opinion = FirstOpinion(sentiment=first, confidence=confidence, model="first")
    analysis = Analysis(
        analysis_id="a", chat_id="7", user_id="c", revision=0, summary="Late.",
        sentiment=first if second is None else second,
        confidence=confidence if second is None else None,
        first=opinion, model="m", prompt_version="v", analysed_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    said = Sentiment(label)
    return Judged(Label(said, "", chat("late")), analysis.sentiment, analysis)


ASKED_ALL = [
    judged(-1, 0, 0.55, second=-1),  # put right
    judged(0, 0, 0.75, second=-1),  # put wrong
    judged(1, 1, 0.99, second=1),
    judged(1, 0, 0.65, second=1),  # put right
]


def test_each_confidence_has_what_it_asks_and_what_it_gains():
    found = escalation(ASKED_ALL)
    rows = {row["below"]: row for row in found["rows"]}
    assert found["chats"] == 4
    assert [rows[below]["asked"] for below in (0.0, 0.5, 0.6, 0.7, 0.8, 1.0)] == [0, 0, 1, 2, 3, 4]
    assert [rows[below]["right"] for below in (0.0, 0.6, 0.7, 0.8, 1.0)] == [2, 3, 4, 3, 3]
    assert (rows[0.8]["better"], rows[0.8]["worse"], rows[0.7]["accuracy"]) == (2, 1, 1.0)
    assert found["best"] == 0.7


def test_of_several_the_best_asks_least():
    assert escalation([judged(0, 0, 0.5, second=0), judged(1, 1, 0.9, second=1)])["best"] == 0.0


def test_confidences_above_which_nobody_was_asked_are_left_out():
    found = escalation([judged(-1, 0, 0.55, second=-1), judged(0, 0, 0.72)])
    assert [row["below"] for row in found["rows"]] == [0.0, 0.5, 0.6, 0.7]


@pytest.mark.parametrize("some", [[], [judged(0, 0, 0.9)]])
def test_without_a_second_opinion_there_is_nothing_to_choose(some):
    assert escalation(some) is None
