"""Analyses in, drafts out: a text for each angry customer, a flag, or a dead letter."""

import collections
import dataclasses
import json

import pytest
from conftest import FEW_SHOT, chat, run_stage, scripted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatflow import metrics
from chatflow.choices.heads import Chosen, Read
from chatflow.choices.sentences import sentences_of
from chatflow.errors import BadInputError, ElementError, UsageError
from chatflow.models.spec import ModelSpec
from chatflow.prompts.questions import DraftPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import AnalysedChat, Analysis, Draft, FieldValue, Sentiment, now, parse_record
from chatflow.running.summary import Summary
from chatflow.running.terminal import for_people
from chatflow.stages.draft import DraftApologies

LATE = chat("My parcel is late!", "Sorry.")
SCORES = ModelSpec("torch:google/flan-t5-small", model_kind="instruct")
"""A model that scores the tone, so that its analyses have a confidence; never loaded."""


def prompt(folder="instruct", model=SCORES, **constants):
    template = load_folder(folder)["apology"]
    return DraftPrompt(dataclasses.replace(template, overrides=tuple(constants.items())), model)


def analysed(chat_id="1", sentiment=-1, confidence=None):
    analysis = Analysis(
        analysis_id=f"a{chat_id}", chat_id=chat_id, user_id="c", revision=0, sentiment=sentiment,
        summary="The parcel is late.", confidence=confidence, model="m", prompt_version="v",
        analysed_at=now(),
    )  # fmt: skip
    return AnalysedChat(LATE.model_copy(update={"chat_id": chat_id}), analysis)


def ask(chat_id):
    """What the prompt of a draft is asked with."""
    about = analysed(chat_id)
    return about.chat, "c", about.analysis


def draft(asking, answer, analyses):
    """The drafts and dead letters of a model that answers so."""
    model = scripted(answer if callable(answer) else {"apology": answer})
    return run_stage(DraftApologies(model, asking), analyses, ("drafts", "dead_letters"))


def test_drafts_are_for_angry_users_alone(draft_prompt):
    tones = [analysed(str(tone), tone) for tone in (-1, 0, 1)]
    found = draft(draft_prompt, "We are sorry that your parcel is late.", tones)
    (made,) = found["drafts"]
    assert not found["dead_letters"]
    assert (made.chat_id, made.analysis_id) == ("-1", "a-1")
    assert (made.text, made.flag) == ("We are sorry that your parcel is late.", None)
    assert (made.model, made.prompt_version) == ("scripted", draft_prompt.version)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty_draft"), ("Sorry<end_of_turn>", "control_tokens")]
)
def test_a_bad_draft_is_a_dead_letter_that_holds_chat_and_analysis(draft_prompt, text, reason):
    found = draft(draft_prompt, text, [analysed()])
    (letter,) = found["dead_letters"]
    assert not found["drafts"]
    assert (letter.stage, letter.reason, letter.answer) == ("draft_answer", reason, text)
    held = json.loads(letter.payload)
    assert held["chat"]["chat_id"] == "1"
    assert held["analysis"]["analysis_id"] == "a1"


# Flags: a bad draft is worse than none.


def test_below_the_confidence_that_is_asked_for_nothing_is_asked_of_the_model():
    def answer(request):
        if request.chat_id == "unsure":
            raise ElementError("asked", "the model was asked")
        return "We are sorry."

    asking = prompt(draft_confidence=0.6)
    sure = {"sure": 0.9, "just": 0.6, "unsure": 0.5, "unknown": None}
    found = draft(asking, answer, [analysed(name, confidence=p) for name, p in sure.items()])
    assert not found["dead_letters"]
    by_chat = {made.chat_id: made for made in found["drafts"]}
    assert {name: made.flag for name, made in by_chat.items()} == {
        "sure": None, "just": None, "unsure": "low_confidence", "unknown": None,
    }  # fmt: skip
    unsure = by_chat["unsure"]
    assert (unsure.analysis_id, unsure.text) == ("aunsure", None)
    assert (unsure.model, unsure.prompt_version) == (SCORES.name, asking.version)
    question = asking.question(*ask("unsure"))
    assert unsure.draft_id == question.id_of(SCORES.name)


GROUNDED = {"draft_grounding": 0.5}
REFUSED = {"refused_phrases": ["your fault", "we will"]}


@pytest.mark.parametrize(
    ("constants", "answer", "flag"),
    [
        (GROUNDED, "We are sorry that your parcel is late.", None),
        (GROUNDED, "We apologise for the inconvenience and understand: a late parcel!", None),
        (GROUNDED, "We are sorry about the late elephants.", None),  # half of it
        (GROUNDED, "We are sorry about the late golden elephants.", "ungrounded"),
        (GROUNDED, "We are so sorry and understand how frustrating it is.", "ungrounded"),
        ({}, "We are sorry about the golden elephants.", None),
        (REFUSED, "We are sorry, but it was YOUR fault.", "refused_phrase"),
        (REFUSED, "We are sorry about your faults.", None),
        (GROUNDED | REFUSED, "We will send golden elephants.", "refused_phrase"),
    ],
)
@pytest.mark.slow
def test_what_is_not_fit_to_be_shown_is_flagged(constants, answer, flag):
    asking = prompt(**constants)
    found = draft(asking, answer, [analysed(), analysed()])
    assert not found["dead_letters"]
    for made in found["drafts"]:
        assert (made.flag, made.text) == (flag, None if flag else answer)
        question = asking.question(*ask("1"))
        assert (made.draft_id, made.model) == (question.id_of("scripted"), "scripted")


@pytest.mark.parametrize(
    ("written", "flag"),
    [
        ("your parcel is late", None),
        ("you could not see your parcel", None),  # one word that says something is enough
        ("you were charged for elephants", "ungrounded"),
        ("you feel that it is so", "ungrounded"),
        ("you did not order a parcel", "refused_phrase"),
    ],
)
@pytest.mark.slow
def test_the_words_around_the_models_own_say_nothing_of_it(written, flag):
    """`A colleague will look into it` is in no chat, and in every draft of a base model."""
    asking = prompt(FEW_SHOT, ModelSpec(heads="none"))
    part = asking.question(*ask("1")).request.parts[0]
    answer = f"{part.lead} {written}{part.tail}"
    (made,) = draft(asking, answer, [analysed()])["drafts"]
    assert (made.flag, made.text) == (flag, None if flag else answer)


@pytest.mark.parametrize(
    ("answer", "flag"),
    [
        ("We are sorry that you lost your passport.", "accuses_customer"),
        ("We are sorry that you have lost it.", "accuses_customer"),
        ("We are sorry that you’ve lost it.", "accuses_customer"),
        ("We are sorry that we lost your passport.", None),
        ("We are sorry that you missed your flight.", None),
    ],
)
@pytest.mark.slow
def test_what_the_customer_says_of_us_is_not_turned_round(answer, flag):
    about = analysed()._replace(chat=chat("You lost my passport and I missed my flight!"))
    for on in (True, False):
        (made,) = draft(prompt(flag_accusations=on), answer, [about])["drafts"]
        assert made.flag == (flag if on else None)


# Composed drafts: of approved clauses and the customer's words, where no block asks for one.

LONG = chat(
    "Hi. My order was due on Monday and still has not arrived. I want my money back!",
    "Sorry to hear that. We are looking into it.",
)


def read(talk, company=0.9, evidence=(0.0, 0.9, 0.1, 0.0, 0.0), **grievances):
    """What heads chose of a chat: by default of `LONG`, with the second sentence to be quoted."""
    toward = {"company": company, "third_party": 1 - company, "nobody": 0.0}
    columns = {"evidence": ("yes", "no")}
    parts = {"evidence": tuple((sure, 1 - sure) for sure in evidence)}
    chosen = Chosen({"toward": toward, "grievances": grievances}, parts, columns)
    return Read(tuple(sentences_of(talk, "c")), chosen)


def angry(talk=LONG, choice=None, confidence=0.95, **fields):
    """An analysis of a chat, with what was chosen of it, if it was read."""
    _, analysis, _ = analysed(confidence=confidence)
    fields = {"language": "en", "fields": {}, **fields}
    if choice is not None:
        toward = max(choice.chosen.chat["toward"].items(), key=lambda pair: pair[1])
        fields["fields"]["toward"] = FieldValue(value=toward[0], confidence=toward[1])
    return AnalysedChat(talk, analysis.model_copy(update=fields), choice)


def composed(*analyses, **constants):
    """Drafts by the shipped prompts, in whose folder no block asks a model for any."""

    def answer(request):
        raise ElementError("asked", "the model was asked")

    asking = prompt("base", ModelSpec(heads="none"), **constants)
    found = draft(asking, answer, analyses)
    assert not found["dead_letters"]
    assert {made.prompt_version for made in found["drafts"]} == {asking.version}
    assert {made.model for made in found["drafts"]} == {"gemma3-270m"}
    return found["drafts"]


def test_a_draft_is_composed_of_a_clause_and_the_customers_words():
    choice = read(LONG, late_delivery=0.9, rude_staff=0.1)
    (made,) = composed(angry(choice=choice))
    assert made.flag is None
    assert "“My order was due on Monday and still has not arrived.”" in made.text
    assert made.grievances == ("late_delivery",)
    assert [(q.message, q.text) for q in made.evidence] == [
        (0, "My order was due on Monday and still has not arrived."),
    ]  # fmt: skip
    assert made.confidence == pytest.approx(0.95 * 0.9)  # of anger, and at the company
    assert made.repairs == ()


def test_a_draft_is_composed_of_a_chat_that_no_model_read():
    (made,) = composed(angry(confidence=0.8))
    assert "“My order was due on Monday and still has not arrived.”" in made.text
    assert (made.confidence, len(made.evidence)) == (0.8, 1)


@pytest.mark.parametrize(
    ("about", "flag"),
    [
        (angry(choice=read(LONG, company=0.1)), "third_party"),
        (angry(choice=read(LONG, company=0.55)), "low_confidence"),
        (angry(choice=read(LONG), confidence=0.55), "low_confidence"),
        (angry(confidence=0.55), "low_confidence"),
        (angry(language="pl"), "unproven_language"),
        (angry(language="de", unproven_language=True), "unproven_language"),
        (angry(choice=read(LONG, evidence=[0.0] * 5)), "no_evidence"),
        (angry(chat("???", "Hello.")), "no_evidence"),
    ],
)
def test_where_no_draft_is_composed_a_flag_says_why(about, flag):
    (made,) = composed(about, draft_confidence=0.6)
    assert (made.flag, made.text, made.evidence) == (flag, None, ())


def test_composed_drafts_are_for_angry_users_alone():
    others = [angry(sentiment=tone, analysis_id=str(tone)) for tone in (Sentiment(0), Sentiment(1))]
    (made,) = composed(angry(), *others)
    assert made.analysis_id == "a1"


def test_a_draft_is_composed_in_the_language_of_the_customer():
    talk = chat("Meine Bestellung sollte am Montag kommen und ist immer noch nicht da.")
    (made,) = composed(angry(talk, language="de"))
    assert made.flag is None
    assert "Meine Bestellung sollte am Montag kommen" in made.text
    assert "sorry" not in made.text.lower()


OUTCOMES = {
    "text": "We are sorry that your parcel is late.",
    "refused_phrase": "It was your fault that the parcel is late.",
    "ungrounded": "We are sorry about the golden elephants.",
    "empty_draft": "",
    "overloaded": None,
}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-1, 0, 1]),
            st.sampled_from([None, 0.4, 0.9]),
            st.sampled_from(sorted(OUTCOMES)),
        ),
        max_size=24,
    )
)
@pytest.mark.slow
def test_every_angry_user_has_a_draft_a_flag_or_a_dead_letter(mix):
    def answer(request):
        text = OUTCOMES[mix[int(request.chat_id)][2]]
        if text is None:
            raise ElementError("overloaded", "try later")
        return text

    metrics.reset_local_counts()
    asking = prompt(draft_confidence=0.5, **GROUNDED, **REFUSED)
    analyses = [analysed(str(number), tone, sure) for number, (tone, sure, _) in enumerate(mix)]
    found = draft(asking, answer, analyses)
    outcomes = {made.chat_id: made.flag or "text" for made in found["drafts"]}
    outcomes |= {letter.chat_id: letter.reason for letter in found["dead_letters"]}
    assert len(outcomes) == len(found["drafts"]) + len(found["dead_letters"])
    assert outcomes == {
        str(number): "low_confidence" if sure == 0.4 else outcome
        for number, (tone, sure, outcome) in enumerate(mix)
        if tone == -1
    }
    summary = Summary(metrics.local_counts(), {}, 1.0, {})
    flags = collections.Counter(made.flag for made in found["drafts"] if made.flag)
    assert summary.lost == 0
    assert summary.to_dict()["drafts_flagged"] == flags


# The record.

FIELDS = {
    "draft_id": "d", "analysis_id": "a", "chat_id": "7", "user_id": "c", "revision": 0,
    "model": "m", "prompt_version": "v", "drafted_at": "2026-03-01T10:00:00Z",
}  # fmt: skip


LISTS = {"repairs": [], "grievances": [], "evidence": []}


@pytest.mark.parametrize("said", [{"text": "Sorry."}, {"flag": "ungrounded"}])
def test_a_draft_has_a_text_or_a_flag(said):
    made = parse_record(Draft, json.dumps(FIELDS | said).encode())
    assert json.loads(made.to_json()) == FIELDS | said | LISTS


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({}, "either a text or a flag"),
        ({"text": "Sorry.", "flag": "ungrounded"}, "either a text or a flag"),
        ({"text": ""}, "text: String should have at least 1 character"),
        ({"flag": "bad"}, "flag: Input should be"),
    ],
)
def test_a_draft_that_has_neither_or_both_is_none(said, error):
    with pytest.raises(BadInputError, match=error):
        parse_record(Draft, json.dumps(FIELDS | said).encode())


def test_a_flag_is_said_to_people():
    flagged = Draft(**FIELDS, flag="low_confidence")
    assert for_people(flagged).endswith("7 c: ⚑ low confidence: no draft, please look")


# Constants of the template.


@pytest.mark.parametrize("name", ["draft_confidence", "draft_grounding"])
@pytest.mark.parametrize("value", [1.5, -0.1, "high"])
def test_thresholds_are_shares(name, value):
    with pytest.raises(UsageError, match=f"{name} must be 0 to 1; found"):
        prompt(**{name: value})


def test_a_confidence_is_not_asked_for_where_there_is_none():
    with pytest.raises(UsageError, match="does not score the tone"):
        prompt(model=ModelSpec("scripted:nowhere"), draft_confidence=0.6)
