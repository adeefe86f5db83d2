"""VADER: finds the tone with a list of words and a few rules, as a floor to compare with."""

from __future__ import annotations

from collections.abc import Callable

from chatflow.errors import UsageError
from chatflow.evaluation.labels import Label
from chatflow.records import Sentiment

THRESHOLD = 0.05
"""For the compound score, as its authors advise; scores between ± this are neutral."""


def vader() -> Callable[[Label], Sentiment]:
    """Returns VADER as a function of a label; raises `UsageError` if it is not installed.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text", ICWSM 2014; https://github.com/cjhutto/vaderSentiment.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UsageError(
            "--compare=vader: vaderSentiment is not installed; pip install 'chatflow[evaluate]'"
        ) from None
    analyser = SentimentIntensityAnalyzer()

    def tone(label: Label) -> Sentiment:
        compound = analyser.polarity_scores(label.own_text)["compound"]
        if compound >= THRESHOLD:
            return Sentiment.HAPPY
        return Sentiment.ANGRY if compound <= -THRESHOLD else Sentiment.NEUTRAL

    return tone
