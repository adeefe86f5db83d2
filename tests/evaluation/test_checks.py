import pytest
from conftest import chat
from hypothesis import given
from hypothesis import strategies as st

from chatflow.evaluation.checks import apologises, check_text, longest_copy, totals
from chatflow.models.requests import Part
from chatflow.prompts.truth import promises

LATE = chat("My order 4711 from Lisbon is late!", "Oh. Let me see.", "Thanks, it was 19.99 euros")


def test_what_stands_in_the_chat_is_grounded():
    found = check_text("c says that the order from Lisbon is late.", LATE)
    assert (found.ungrounded, found.names, found.numbers) == ((), (), ())
    assert found.copied == 4  # from Lisbon is late
    assert not found.only_copied


def test_words_names_and_numbers_that_are_not_in_the_chat_are_found():
    found = check_text("The parcel of Mr Smith was sent to Madrid on the 24th for 19.90.", LATE)
    assert found.names == ("Mr", "Smith", "Madrid")
    assert found.numbers == ("24", "19.90")
    assert {"parce", "smith", "madri"} <= set(found.ungrounded)


def test_a_word_that_begins_a_sentence_is_no_name():
    text = "Someone waits. Nothing came! “Really”, they say: Yes.\nWhen will it? I see."
    assert check_text(text, LATE).names == ()
    assert check_text("There I'm, I'll see, I have", LATE).names == ()


def test_names_are_the_same_with_an_s():
    assert check_text("It is O'Brien's and Élan-Rosé", LATE).names == ("O'Brien", "Élan-Rosé")
    assert check_text("It is Lisbon's", LATE).names == ()
    assert check_text("to Smith", chat("It is Smith's")).names == ()
    assert check_text("to élan", LATE).names == ()


def test_a_code_is_no_name():
    assert check_text("in 3HX 5512", chat("It is 3HX 5512")).names == ()


def test_the_ids_of_users_do_not_count():
    assert check_text("a told c", chat("It is late", "Oh")).words == 1


def test_what_the_template_writes_does_not_count():
    asked = Part(None, "…", lead="We are sorry that", tail=". A colleague will call.")
    found = check_text(
        "We are sorry that your order is late. A colleague will call.", LATE, [asked]
    )
    assert (found.words, found.ungrounded) == (4, ())
    found = check_text("We are sorry that Madrid is late. A colleague will call.", LATE, [asked])
    assert found.names == ("Madrid",)


def test_the_customers_own_words_are_only_copied():
    assert check_text("“My order 4711 from Lisbon is …”", LATE).only_copied
    assert not check_text("…", LATE).only_copied
    assert check_text("it's late", chat("So it's late.")).only_copied


def test_a_sentence_of_the_examples_is_a_copy():
    asked = Part(None, "Chat: the cat ran away again last night\nSummary: The cat ran away again.")
    assert check_text("The cat ran away again.", LATE, [asked]).copies_prompt
    assert not check_text("The order is late.", LATE, [asked]).copies_prompt


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_the_longest_copy_is_the_longest_of_all_runs(words, message):
    runs = [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    whole = [message[i:j] for i in range(len(message)) for j in range(i + 1, len(message) + 1)]
    expected = max((len(run) for run in runs if run in whole), default=0)
    assert longest_copy(words, [" ".join(message)]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "We will refund you the full amount.",
        "We'll send a replacement tomorrow.",
        "You will receive a voucher.",
        "Please accept a 10 % discount on your next order",
        "I am issuing a refund.",
        "We're refunding you.",
        "A colleague will call you within 24 hours.",
        "Our team will contact you within two business days",
        "We would like to offer you a voucher.",
        "We are happy to replace it.",
        "You will be called by tomorrow.",
        "Your refund will be processed.",
        "We can repair it free of charge.",
        "you'll get your money back",
        "We will have it there by Friday.",
        "We will resolve this by the end of the week.",
    ],
)
def test_promises(text):
    assert promises(text)


@pytest.mark.parametrize(
    "text",
    [
        "We are sorry that you still wait for your refund.",
        "We are sorry that the replacement is broken, too.",
        "We will look into your refund.",
        "A colleague will look into it and come back to you.",
        "You were told that it comes within 24 hours.",
        "We will not refund it.",
        "We are investigating why the refund is missing.",
        "We are sorry that the replacement was sent to your old address.",
        "We understand your wish for a discount. We will be in touch.",
        "We have received your complaint about the voucher.",
    ],
)
def test_what_the_customer_wrote_about_is_no_promise(text):
    assert not promises(text)


def test_a_promise_is_quoted():
    text = "Sorry! We will refund you. You will get a voucher, too."
    assert promises(text) == ["We will refund", "You will get a voucher"]


def test_apologies():
    assert apologises("We apologise for it")
    assert apologises("SORRY.")
    assert not apologises("What a pity")


def test_totals_are_shares_of_all_words_not_of_all_texts():
    texts = [
        check_text("order Madrid", LATE),
        check_text("order late Lisbon euros order 4711", LATE),
    ]
    found = totals(texts)
    assert found["ungrounded"] == round(1 / 8, 4)
    assert (found["texts"], found["characters_longest"], found["with_names"]) == (2, 34, 1)
    assert totals([])["ungrounded"] == 0
