"""What a model made up is found; what the chat bears out passes."""

import pytest
from conftest import chat
from hypothesis import given
from hypothesis import strategies as st

from chatflow.prompts.truth import draft_faults, said_of, summary_faults
from chatflow.records import Chat

SOFA = chat(
    "Hello, this is Mia Berg. I paid £1,200.00 for the sofa on 3 March at 10:00, and it came"
    " broken! I sent three photos.",
    "Sorry to hear that, Mia. I cancelled the second delivery, and I asked the courier. You find"
    " everything at https://shop.example/help",
    "You lost my first parcel in Leeds, too. I want a refund, we move tomorrow, we will be away by"
    " Friday. Write to mia@shop.example",
    "I have passed it on. We received the photos, you should have 2 copies of the invoice.",
)

SUMMARY_LIES = {
    "a name": ("Mia Berg spoke with Oliver about it.", "the name Oliver"),
    "a place": ("The first parcel was lost in Bristol.", "the name Bristol"),
    "a number": ("The customer sent 5 photos.", "the number 5"),
    "an amount": ("The sofa cost £1,250.00.", "the number 1,250.00"),
    "an amount, ten times as much": ("The sofa cost £12,000.", "the number 12,000"),
    "a number in a word": ("The customer sent seven photos.", "the number seven"),
    "a large number in a word": ("The sofa came twenty days late.", "the number twenty"),
    "a day": ("The sofa came on 13 March.", "the number 13"),
    "a month": ("The sofa came on 3 April.", "the name April"),
    "a time": ("The sofa came at 10:30.", "the number 10:30"),
    "a quotation":
        ("Mia wrote “I will never buy again”.", "the quotation 'I will never buy again'"),
    "a short quotation": ('Mia wrote "no".', "the quotation 'no'"),
    "a page": ("See https://shop.example/refunds.", "the address https://shop.example/refunds"),
    "a mail address": ("Write to help@shop.example.", "the address help@shop.example"),
    "a domain": ("It is at my-sofa.com.", "the address my-sofa.com"),
    "a placeholder": ("The customer [name] wants a refund.", "the placeholder [name]"),
    "a blank": ("The sofa is number xxxx.", "the placeholder xxxx"),
    "an outcome": ("The sofa was replaced.", "the outcome 'replaced'"),
    "another outcome": ("The customer got a credit for the sofa.", "the outcome 'credit'"),
    "what the customer did, done by the agent": ("The agent paid for it.", "who paid: the agent"),
    "what the agent did, done by the customer":
        ("The customer cancelled the second delivery.", "who cancelled: the customer"),
    "what the agent is told to have done, done by the customer":
        ("The customer lost the first parcel.", "who lost: the customer"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "fault"), SUMMARY_LIES.values(), ids=SUMMARY_LIES)
def test_what_a_summary_makes_up_is_found(text, fault):
    (found,) = summary_faults(text, SOFA, "c")
    assert found == fault


DRAFT_LIES = {
    **{
        kind: SUMMARY_LIES[kind]
        for kind in ("a name", "an amount", "a page", "a placeholder", "an outcome")
    },
    "money": ("We will refund you.", "promises 'We will refund'"),
    "money, as said by nobody in particular":
        ("Your refund will be with you soon.", "promises 'refund'"),
    "money, guaranteed": ("We guarantee a refund.", "promises 'We guarantee a refund'"),
    "money that is said to be paid":
        ("We have already refunded you.", "promises 'We have already refunded'"),
    "goods": ("You will get a discount.", "promises 'You will get a discount'"),
    "a date":
        ("You will have it by the end of March.", "promises 'You will have it by the end of'"),
    "a day": ("We will call you by 3 March.", "promises 'We will call you by 3'"),
    "the next day": ("We will call you tomorrow.", "promises 'We will call you tomorrow'"),
    "hours or days":
        ("A colleague will call within 2 days.", "promises 'A colleague will call within 2 days'"),
    "fault": ("We know that it was our fault.", "admits 'our fault'"),
    "a mistake": ("We are sorry for our mistake.", "admits 'our mistake'"),
    "liability": ("We take full responsibility.", "admits 'We take full responsibility'"),
    "blame": ("Maybe you should have called.", "blames the customer: 'you should have'"),
    "blame for a mistake": ("It was your own mistake.", "blames the customer: 'your own mistake'"),
    "another language":
        ("Es tut uns leid, dass das Sofa kaputt bei Ihnen angekommen ist.", "is in de, not in en"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "fault"), DRAFT_LIES.values(), ids=DRAFT_LIES)
def test_what_a_draft_may_not_say_is_found(text, fault):
    assert fault in draft_faults(text, SOFA, "c")


SUMMARIES = {
    "numbers without marks of thousands": "Mia Berg paid 1200 for the sofa.",
    "numbers with other marks": "Mia Berg paid £1.200,00 for the sofa.",
    "a number in digits": "She sent 3 photos.",
    "a number in a word": "She sent three photos, and has two copies of the invoice.",
    "an hour": "The sofa came on 3 March at 10.",
    "names in other letters": "It is about mia berg, LEEDS and the SOFA.",
    "a name of possession": "It is about Mia’s sofa and Berg's parcel.",
    "sentences begin with capitals": "Nothing works. “Broken!” Yes! Photos: Sent.\nBroken parcel.",
    "roles": "The Customer wants a refund from the Support Team.",
    "a quotation": "Mia wrote: “you lost my first parcel”.",
    "quotations in a row": 'Mia wrote "sofa" and not at all "parcel".',
    "a quotation across a long text": f"Mia wrote “{SOFA.messages[0].text}”",
    "an address that ends a sentence": "All is at https://shop.example/help. Or mia@shop.example.",
    "the site of an address": "All is at shop.example.",
    "a wish": "The customer wants to be refunded.",
    "an apology": "The agent apologised.",
    "who did what": "The customer paid for the sofa, and the agent cancelled the second delivery.",
    "who lost it": "The agent lost the first parcel.",
    "who told of it": "The customer asked for a refund; the customer received a broken sofa.",
}


@pytest.mark.parametrize("text", SUMMARIES.values(), ids=SUMMARIES)
def test_what_the_chat_bears_out_passes(text):
    assert not summary_faults(text, SOFA, "c")


DRAFTS = {
    "an apology": "We are sorry that your sofa came broken, Mia.",
    "with another word": "We apologise that your sofa came broken.",
    "a wish": "We are sorry that you wait for your refund. We will look into it.",
    "a short one": "Sorry.",
    "the customer's words": "We are sorry. You wrote: “You lost my first parcel in Leeds, too.”",
    "the customer's plans": "You wrote: “we move tomorrow, we will be away by Friday”.",
    "the agent's words": "We told you: “you should have 2 copies of the invoice”.",
}


@pytest.mark.parametrize("text", DRAFTS.values(), ids=DRAFTS)
def test_a_draft_that_keeps_to_the_chat_passes(text):
    assert not draft_faults(text, SOFA, "c")


def test_who_apologises_is_told_in_a_summary_alone():
    late = chat("My parcel is late!", "It is on its way.")
    assert summary_faults("The agent apologised.", late, "c") == ["the outcome 'apologised'"]
    assert not draft_faults("We apologise that it is late.", late, "c")


@pytest.mark.parametrize("own", ["late??", "ok", "hi pls help"])
def test_the_language_of_a_few_words_is_not_held_against_a_draft(own):
    text = "We are sorry that you had to write to us again."
    assert not draft_faults(text, chat(own), "c")
    german = chat(own, attributes={"language": "de"})
    assert draft_faults(text, german, "c") == ["is in en, not in de"]


def test_deeds_are_held_against_chats_without_roles_too():
    messages = tuple(message.model_copy(update={"role": None}) for message in SOFA.messages)
    plain = SOFA.model_copy(update={"messages": messages})
    assert summary_faults("The agent paid for it.", plain, "c") == ["who paid: the agent"]
    assert not summary_faults("The agent cancelled the delivery.", plain, "c")


def test_what_was_not_said_bears_nothing_out():
    note = SOFA.messages[1].model_copy(update={"text": "Ask Oliver.", "private": True})
    noted = SOFA.model_copy(update={"messages": (*SOFA.messages, note)})
    assert summary_faults("It went to Oliver.", noted, "c") == ["the name Oliver"]


def test_faults_are_said_in_one_sentence():
    found = summary_faults("It went to Oliver on 13 March.", SOFA, "c")
    assert said_of(found) == "the chat does not bear out: the name Oliver; the number 13"


PIECES = st.sampled_from(
    "Mia Berg’s parcel, the agent lost I told you gave told customer cancelled we user 1,200.00 3 "
    "seven twenty-one 10:30 \" “ ” « » ' [name] {x} <b> XXXX www.a.example a@b.example my-a.com. "
    "refund replaced apologised sorry ! . … O'Brien x".split()
)
TEXTS = st.lists(PIECES, min_size=1, max_size=8).map(" ".join) | st.text(max_size=30)


@given(st.lists(TEXTS, min_size=1, max_size=6), st.data())
def test_whole_messages_of_a_chat_have_no_faults(texts, data):
    talk: Chat = chat(*texts)
    said = [message.text for message in talk.said]
    chosen = data.draw(st.lists(st.sampled_from(said), max_size=6)) if said else []
    assert not summary_faults("\n".join(chosen), talk, "c")
