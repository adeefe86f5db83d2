import json

import pytest
from conftest import chat
from hypothesis import given
from hypothesis import strategies as st

from chatflow.errors import BadAnswerError
from chatflow.models.requests import Part
from chatflow.prompts.answers import parse_analysis, parse_draft, says_any, shorten
from chatflow.records import Sentiment

GOOD = '{"sentiment": -1, "summary": "221 is annoyed about pizza."}'


@pytest.mark.parametrize(
    ("answer", "repairs"),
    [
        (GOOD, ()),
        (f"```json\n{GOOD}\n```", ()),
        (f"Sure! Here is the JSON: {GOOD} I hope this helps {{or not}}", ()),
        ('{"thoughts": "hm"} ' + GOOD, ()),
        ("{'sentiment': -1, 'summary': '221 is annoyed about pizza.'}", ("json",)),
        ('{"sentiment": -1, "summary": "221 is annoyed about pizza.",}', ("json",)),
        ('{"sentiment": -1, "summary": "221 is annoyed about pizza.', ("json",)),
        ('{"summary": "221 is annoyed about pizza.", "sentiment": "-1"}', ()),
        ('{"Sentiment": -1.0, "SUMMARY": "221 is annoyed about pizza."}', ()),
        ('{"sentiment": "angry", "summary": " 221 is annoyed\\n about pizza. "}', ()),
        ('{"sentiment": "Negative", "summary": "221 is annoyed about pizza."}', ()),
        ('{"sentiment": -1, "summary": "221 is annoyed about pizza.<end_of_turn>"}',
         ("control_tokens",)),
    ],
)  # fmt: skip
def test_answers_that_are_taken(answer, repairs):
    parsed = parse_analysis(answer, 512)
    assert parsed == (Sentiment.ANGRY, "221 is annoyed about pizza.", repairs)


OTHER = '{"sentiment": 0, "summary": "221 asks about pizza."}'


@pytest.mark.parametrize(
    ("answer", "repairs"),
    [
        (f"<think>First: {OTHER} No.</think>\n{GOOD}", ()),
        (f"<think>a</think><thinking>{OTHER}</thinking>{GOOD}", ()),
        (f"not {OTHER}\n</think>\n{GOOD}", ()),
        (f'<THINK>With {{"sentiment": 0}} I would say neutral.</THINK> {GOOD}', ()),
        (f"[THINK]{OTHER}[/THINK]{GOOD}", ()),
        (f"◁think▷{OTHER}◁/think▷{GOOD}", ()),
        (f"<seed:think>{OTHER}</seed:think>{GOOD}", ()),
        (f"<|channel|>analysis<|message|>{OTHER}<|end|><|channel|>final<|message|>{GOOD}", ()),
        (f"{OTHER} No, rather {GOOD}", ("last_of_several",)),
        (f"{GOOD} {GOOD}", ()),
        (f'{{"result": {GOOD}}}', ()),
        (f'{{"answers": [{GOOD}]}}', ()),
        (f"[{GOOD}]", ()),
        (json.dumps({"output": GOOD}), ()),
        ('{"sentiment": -1} {"summary": "221 is annoyed about pizza."}', ("last_of_several",)),
        (f'{GOOD} {{"sentiment": 0}}', ("last_of_several",)),
    ],
)  # fmt: skip
def test_thoughts_are_left_out_and_of_several_answers_the_last_counts(answer, repairs):
    parsed = parse_analysis(answer, 512)
    assert parsed == (Sentiment.ANGRY, "221 is annoyed about pizza.", repairs)


def test_a_thought_that_was_cut_off_is_no_answer():
    with pytest.raises(BadAnswerError) as caught:
        parse_analysis(f"<think>Perhaps {GOOD}, but", 512)
    assert caught.value.reason == "not_json"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty_answer"),
        (" \n", "empty_answer"),
        ("The user is angry.", "not_json"),
        ("[1, 2]", "not_json"),
        ("{}", "not_json"),
        ('{"summary": "x"}', "no_sentiment"),
        ('{"sentiment": -1', "no_summary"),
        ('{"sentiment": -1, "summary": ""}', "empty_summary"),
        ('{"sentiment": -1, "summary": "<eos>"}', "empty_summary"),
        ('{"sentiment": -1, "summary": ["x"]}', "no_summary"),
        ('{"sentiment": 2, "summary": "x"}', "bad_sentiment"),
        ('{"sentiment": -0.5, "summary": "x"}', "bad_sentiment"),
        ('{"sentiment": true, "summary": "x"}', "bad_sentiment"),
        ('{"sentiment": null, "summary": "x"}', "bad_sentiment"),
        ('{"sentiment": "furious", "summary": "x"}', "bad_sentiment"),
        ('{"sentiment": "nan", "summary": "x"}', "bad_sentiment"),
        ('{"sentiment": [-1], "summary": "x"}', "bad_sentiment"),
    ],
)
def test_answers_that_are_refused_keep_the_raw_answer(answer, reason):
    with pytest.raises(BadAnswerError) as caught:
        parse_analysis(answer, 512)
    assert (caught.value.reason, caught.value.answer) == (reason, answer)


def test_the_templates_own_tone_words_are_taken():
    answer = '{"sentiment": "Wütend", "summary": "x"}'
    assert parse_analysis(answer, 512, {"Wütend": Sentiment.ANGRY}).sentiment is Sentiment.ANGRY


def test_a_long_summary_is_cut_at_a_word_and_says_so():
    parsed = parse_analysis(json.dumps({"sentiment": 0, "summary": "word " * 200}), 512)
    assert len(parsed.summary) <= 512
    assert parsed.summary.endswith("word…")
    assert parsed.repairs == ("summary_cut",)


@pytest.mark.slow
@given(st.text())
def test_any_answer_is_parsed_or_refused(answer):
    try:
        found = parse_analysis(answer, 512).summary
    except BadAnswerError as error:
        found = error.reason
    assert 1 <= len(found) <= 512


wordy = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=600)


@given(
    st.sampled_from(list(Sentiment)),
    wordy.filter(lambda text: "<" not in text and "[" not in text and text.split()),
    st.sampled_from(["{}", "```json\n{}\n```", "Answer: {} Done.", "\n\n{}"]),
)
def test_a_valid_answer_is_read_as_it_was_meant(sentiment, summary, around):
    answer = around.replace("{}", json.dumps({"sentiment": sentiment, "summary": summary}))
    parsed = parse_analysis(answer, 512)
    assert parsed.sentiment is sentiment
    assert parsed.summary == shorten(" ".join(summary.split()), 512)


@given(st.text(), st.integers(min_value=2, max_value=50))
def test_shorten_keeps_its_limit(text, limit):
    assert len(shorten(text, limit)) <= limit


CHAT = chat("My parcel is late and it was left out in the rain, I am really cross now.")
ASKED = Part(
    field=None,
    prompt="Write an apology to the user of the chat below in two sentences.\n"
    "Complaint: You charged me twice.\nApology: We are sorry that you were charged twice by us.\n"
    f"Complaint: {CHAT.messages[0].text}\nApology: We are sorry that",
    lead="We are sorry that",
    tail=". A colleague will call.",
)
DRAFT = "We are sorry about the late parcel. Our team is looking into it now."


@pytest.mark.parametrize(
    "answer",
    [
        DRAFT,
        "We are sorry that it was left out in the rain. A colleague will call.",
        f"{DRAFT} A colleague will call.",
    ],
)
def test_good_drafts_are_taken_as_they_are(answer):
    assert parse_draft(f" {answer}\n", ASKED, CHAT, 600) == (answer, ())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty_draft"),
        (" …!", "empty_draft"),
        ("We are sorry that. A colleague will call.", "empty_draft"),
        (DRAFT + "<end_of_turn>", "control_tokens"),
        ("[INST] sorry", "control_tokens"),
        ("Write an apology to the user of the chat below in two sentences.", "repeats_prompt"),
        (
            "We are sorry that you were charged twice by us. A colleague will call.",
            "repeats_prompt",
        ),
        (CHAT.messages[0].text, "repeats_prompt"),
        ("We are sorry for the delay of it. " * 8, "repeats_itself"),
    ],
)
def test_drafts_that_are_refused(answer, reason):
    with pytest.raises(BadAnswerError) as caught:
        parse_draft(answer, ASKED, CHAT, 600)
    assert (caught.value.reason, caught.value.answer) == (reason, answer)


def test_a_draft_holds_no_thoughts():
    asked = Part(field=None, prompt="Write.", max_tokens=10)
    thought = "<think>The customer is rude.</think>\nWe are sorry that your pizza is late."
    parsed = parse_draft(thought, asked, chat("late"), 600)
    assert parsed.text == "We are sorry that your pizza is late."
    with pytest.raises(BadAnswerError, match="no words"):
        parse_draft("<think>The customer is rude", asked, chat("late"), 600)


@pytest.mark.parametrize(
    ("phrase", "said"), [("your fault", True), ("THE PARCEL", True), ("late parce", False)]
)
def test_phrases_are_whole_words_in_a_row_in_any_case(phrase, said):
    text = "We are sorry about the parcel, it was your fault, a late parcel."
    assert says_any(text, ["elsewhere", phrase]) is said


def test_a_long_draft_ends_at_a_sentence_and_says_so():
    parsed = parse_draft(DRAFT, ASKED, CHAT, 40)
    assert parsed == ("We are sorry about the late parcel.", ("draft_cut",))


def test_an_answer_that_json_repair_stumbles_over_is_refused_like_others():
    with pytest.raises(BadAnswerError) as caught:
        parse_analysis('{"```json9```', 512)
    assert caught.value.reason == "not_json"
