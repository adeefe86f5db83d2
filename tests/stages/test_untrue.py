"""A scripted model that lies: what it made up reaches neither an analysis nor a draft."""

import pytest
from conftest import chat, run_stage, scripted

from chatflow.prompts.truth import draft_faults
from chatflow.records import AnalysedChat, Analysis, now
from chatflow.stages.analyse import AnalyseChats
from chatflow.stages.draft import DraftApologies

LATE = chat(
    "My parcel 4711 is three weeks late, and nobody answers my mails!",
    "Sorry to hear that, Mia. I asked the courier where your parcel is.",
    "I waited at home twice for your driver, and I want a refund.",
)
TRUE = "Mia waits for parcel 4711, which is 3 weeks late; the agent asked the courier."


def analyse(prompt, summary):
    """The analysis of a model that writes this summary."""
    model = scripted({"analysis": {"sentiment": -1, "summary": summary}})
    found = run_stage(AnalyseChats(model, prompt), [LATE], ("analysed", "dead_letters"))
    assert not found["dead_letters"]
    ((_, analysis, _),) = found["analysed"]
    return analysis


def test_a_true_summary_is_the_models_own(analysis_prompt):
    made = analyse(analysis_prompt, TRUE)
    assert (made.summary, made.summary_source, made.repairs) == (TRUE, "model", ())


@pytest.mark.parametrize(
    "lie",
    [
        "The parcel of Oliver is three weeks late.",
        "The customer waits for parcel 4712.",
        "The customer was sent a voucher of 50 pounds for the late parcel.",
        "The agent waited at home twice.",
    ],
)
def test_a_summary_that_lies_is_composed_of_the_chats_own_sentences(analysis_prompt, lie):
    made = analyse(analysis_prompt, lie)
    assert made.summary != lie
    assert (made.summary_source, made.sentiment) == ("quotations", -1)
    assert "composed" in made.repairs
    assert made.quotations
    for quotation in made.quotations:
        assert quotation.text in LATE.messages[quotation.message].text


def draft(prompt, text, language, unproven=None):
    """The draft of a model that writes this text, about an analysis in this language."""
    analysis = Analysis(
        analysis_id="a7", chat_id="7", user_id="c", revision=0, sentiment=-1, summary=TRUE,
        language=language, unproven_language=unproven, model="m", prompt_version="v",
        analysed_at=now(),
    )  # fmt: skip
    stage = DraftApologies(scripted({"apology": text}), prompt)
    found = run_stage(stage, [AnalysedChat(LATE, analysis)], ("drafts", "dead_letters"))
    assert not found["dead_letters"]
    (made,) = found["drafts"]
    return made


def test_a_draft_that_keeps_to_the_chat_is_the_models_own(draft_prompt):
    text = "We are sorry, Mia, that you waited at home twice and that your parcel is late."
    made = draft(draft_prompt, text, "en")
    assert (made.text, made.flag, made.repairs) == (text, None, ())


UNFIT = [
    "We are sorry that your parcel is late. We will refund you.",
    "We are sorry. It was our fault that your parcel is late.",
    "We are sorry, Oliver, that your parcel is late.",
]


@pytest.mark.parametrize("text", UNFIT)
def test_a_draft_that_is_unfit_is_composed_or_flagged(draft_prompt, text):
    made = draft(draft_prompt, text, "en")
    assert "composed" in made.repairs
    if made.flag is None:
        assert made.text != text
        assert not draft_faults(made.text, LATE, "c")
        assert made.evidence


@pytest.mark.parametrize(("language", "unproven"), [("pl", None), ("de", True)])
@pytest.mark.parametrize("text", UNFIT)
def test_a_draft_that_is_unfit_is_flagged_where_none_can_be_composed(
    draft_prompt, text, language, unproven
):
    made = draft(draft_prompt, text, language, unproven)
    assert (made.text, made.flag) == (None, "unproven_language")
    assert "composed" not in made.repairs


def test_where_the_language_is_not_known_a_draft_is_composed_in_english(draft_prompt):
    made = draft(draft_prompt, UNFIT[0], None)
    assert made.text == draft(draft_prompt, UNFIT[0], "en").text
    assert made.text.startswith("We are sorry")
