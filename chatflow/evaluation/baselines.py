"""VADER: what a list of words and a few rules know of the tone, as a floor to compare with."""

from __future__ import annotations

from collections.abc import Callable

from chatflow.errors import UsageError
from chatflow.evaluation.labels import Label
from chatflow.records import Sentiment

THRESHOLD = 0.05
"""Of the compound score, as its authors advise; between it and its negative is neutral."""


def vader() -> Callable[[Label], Sentiment]:
    """The tone of what a label's user wrote.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text", ICWSM 2014; https://github.com/cjhutto/vaderSentiment.

    Raises:
      UsageError: it is not installed.
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
