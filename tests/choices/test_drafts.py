"""Drafts by choice: approved clauses, the customer's own words, and nothing else."""

import numpy as np
import pytest
from conftest import chat

from chatflow.choices.drafts import apology, plainly_quotable, quotable
from chatflow.choices.sentences import CUSTOMER, sentences_of
from chatflow.choices.words import words_of
from chatflow.errors import UsageError
from chatflow.prompts.templates import default_sources

WORDS = words_of(default_sources(), "base")["en"]
LATE = chat(
    "Hi. My order was due on Monday and still has not arrived. I want my money back!",
    "Sorry to hear that. We are looking into it.",
    "It was for my daughter's birthday.",
)


def drafted(some, grievances, words=WORDS, sure=0.9, evidence=None, **more):
    sentences = sentences_of(some, "c")
    evidence = np.full(len(sentences), sure) if evidence is None else evidence
    return apology(sentences, words, grievances, evidence, **more), sentences


def test_a_clause_that_the_customer_bears_out_and_their_words():
    made, sentences = drafted(LATE, {"late_delivery": 0.8, "rude_staff": 0.1})
    assert made.flag is None
    assert made.text.startswith(f"We are sorry that {WORDS.clauses['late_delivery']}. You wrote: “")
    assert "My order was due on Monday and still has not arrived." in made.text
    assert "money back" not in made.text  # a demand is not quoted
    assert made.grievances == ("late_delivery",)
    assert {sentences[at].speaker for at in made.quoted} == {CUSTOMER}


def test_no_clause_where_the_customers_words_do_not_bear_it_out():
    made, _ = drafted(LATE, {"fraud_on_account": 0.95})
    assert made.text.startswith("We are sorry for what you describe here: “")
    assert WORDS.clauses["fraud_on_account"] not in made.text


def test_the_closing_says_what_is_true():
    unread, _ = drafted(chat("You charged me twice for the same ticket."), {"wrong_amount": 0.9})
    assert unread.text.endswith(WORDS.drafts["next_unread"])
    read, _ = drafted(LATE, {"late_delivery": 0.9})
    assert read.text.endswith(WORDS.drafts["next_read"])


def test_what_it_meant_and_how_they_were_answered_are_taken_up():
    impact = np.array([s.message == 2 for s in sentences_of(LATE, "c")], float)
    made, _ = drafted(LATE, {"late_delivery": 0.9}, impact=impact)
    assert WORDS.drafts["impact"] in made.text
    rude, _ = drafted(LATE, {"late_delivery": 0.9, "rude_staff": 0.8})
    assert WORDS.drafts["conduct"] in rude.text


@pytest.mark.parametrize(
    "text",
    [
        "Where is my order?", "I want a refund or I go to my lawyer.", "Thanks a lot, clowns.",
        "> On Monday you wrote that it left", "ok", "Lovely, another week without heating 🙄",
        "You people are thieves and liars.",
    ],
)  # fmt: skip
def test_what_no_apology_quotes(text):
    assert not quotable(text)
    made, _ = drafted(chat(text), {"late_delivery": 0.9})
    assert (made.text, made.flag) == (None, "no_evidence")


def test_a_request_is_quoted_only_where_a_head_says_so():
    text = "Please send me the parcel as soon as you can."
    assert quotable(text)
    assert not plainly_quotable(text)


def test_a_short_quotation_has_the_next_best_beside_it():
    said = chat("Taken on 6 March.", "Sorry.", "Nobody has called me back.", "Sorry.", "I rang.")
    made, sentences = drafted(said, {"no_reply": 0.9}, evidence=np.array([0.8, 0, 0.5, 0, 0.45]))
    assert "“Taken on 6 March … Nobody has called me back.”" in made.text
    assert [sentences[at].message for at in made.quoted] == [0, 2]


def test_a_far_less_likely_grievance_does_not_shrink_the_likeliest():
    said = chat("The shop is leaning. You promised to come on Monday.")
    made, _ = drafted(said, {"unsafe": 0.95, "broken_promise": 0.55}, evidence=np.array([0.9, 0.1]))
    assert made.text.startswith(WORDS.drafts["sorry_for_this"])


def test_a_quotation_is_clean():
    made, _ = drafted(
        chat("Hi there, the “new” boiler broke again on Sunday and nobody came"),
        {"faulty_product": 0.9},
    )
    assert '“the "new" boiler broke again on Sunday and nobody came.”' in made.text


def test_without_heads_only_what_is_said_plainly_gives_a_clause():
    some = chat("I have been charged twice for the same month.")
    made = apology(sentences_of(some, "c"), WORDS, {})
    assert made.text is not None
    assert "I have been charged twice for the same month." in made.text


@pytest.mark.parametrize("language", sorted(words_of(default_sources(), "base")))
def test_every_language_has_all_sentences_and_clauses(language):
    words = words_of(default_sources(), "base")[language]
    assert set(words.clauses) == set(WORDS.clauses)
    assert set(words.cues) == set(WORDS.cues)
    made, _ = drafted(LATE, {"late_delivery": 0.9}, words)
    assert made.text is not None
    assert "{" not in made.text


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("x = ", "words.xx.toml"),
        ("[drafts]\nsorry = 'We are sorry.'", "[speakers]"),
        ("[clauses.late_delivery]\ncues = ['(']", "clauses.late_delivery.cues: '('"),
        (
            "[clauses.late_delivery]\ncues = ['late', '(?i)never']",
            "clauses.late_delivery.cues: 'late|",
        ),
        ("[clauses.late_delivery]\nclause = 3", "clauses.late_delivery must have"),
        ("[clauses.late_delivery]\nclauses = 'x'", "unknown clauses"),
    ],
)
def test_a_mistake_in_a_file_of_words_is_named(entry, said):
    english = default_sources()["words.en.toml"]
    before = english[: english.index("[clauses.")] if entry.startswith("[clauses") else ""
    with pytest.raises(UsageError) as caught:
        words_of({"words.xx.toml": before + entry}, "mine")
    assert said in str(caught.value)
    assert "mine/words.xx.toml" in str(caught.value)
