"""What a person said: the words of a message without what systems add."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatflow.sources.said import said

COUPLE = "Hello \U0001f468\u200d\U0001f469 \u2764\ufe0f"
FLAG = "\U0001f3f4\U000e0067\U000e0062\U000e007f"
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
BASE64 = "iVBORw0KGgoAAAANSUhEUgAA4Bd9" * 40


@pytest.mark.parametrize(
    ("text", "words", "left_out"),
    [
        ("Where is it? 3 < 5 > 2 & more", "Where is it? 3 < 5 > 2 & more", ()),
        (COUPLE, COUPLE, ()),
        (FLAG, FLAG, ()),
        (PERSIAN, PERSIAN, ()),
        ("A" * 500, "A" * 500, ()),
        ("7" * 500, "7" * 500, ()),
        ("Image", "Image", ()),
        ("Thanks,\nbut it is still broken", "Thanks,\nbut it is still broken", ()),
        ("I wait\n> 3 weeks now", "I wait\n> 3 weeks now", ()),
        ("my <div> does not work", "my <div> does not work", ()),
        ("data: none, sorry", "data: none, sorry", ()),
        ("On Monday he wrote: late", "On Monday he wrote: late", ()),
        ("???", "???", ()),
        # Invisible characters.
        ("\u200b\u200e\ufeff\u2060", "", ("invisible_characters",)),
        ("\u200d\u200c ", "", ("invisible_characters",)),
        ("lat\u200be\x00", "late", ("invisible_characters",)),
        ("late\U000e0069\U000e0067", "late", ("invisible_characters",)),
        # HTML.
        ("<p>It is&nbsp;<b>late</b>.</p><p>Very.</p>", "It is late.\n\nVery.", ("html",)),
        ("one<br>two<br/>three", "one\ntwo\nthree", ("html",)),
        ("<ul><li>a</li><li>b</li></ul>", "- a\n\n- b", ("html",)),
        ("<style>p {color: red}</style><script>x()</script><p>late</p>", "late", ("html",)),
        ("<div>late</div><div style='display: none'>hidden</div>", "late", ("html",)),
        ("<p>late</p><div class='gmail_quote'>old words</div>", "late", ("html",)),
        ("<blockquote type='cite'>old</blockquote><p>late</p>", "late", ("html",)),
        ("<blockquote type='cite'>only this</blockquote>", "only this", ("html",)),
        ("<img alt='\U0001f642' src='x'> fine", "\U0001f642 fine", ("html",)),
        ("<![if x]><p>late</p>", "late", ("html",)),
        ("&lt;3 &amp; thanks", "<3 & thanks", ("html",)),
        # Inline data.
        (f"data:image/png;base64,{BASE64} It is late", "[image] It is late", ("inline_data",)),
        (f"![photo](data:image/png;base64,{BASE64}) late", "[image] late", ("inline_data",)),
        (f"<img src='data:image/png;base64,{BASE64}'> late", "[image] late",
         ("inline_data", "html")),
        (f"late {BASE64}", "late [data]", ("inline_data",)),
        (f"late {'0123456789abcdef' * 20}", "late [data]", ("inline_data",)),
        (f"data:image/jpeg;base64,{BASE64}", "", ("inline_data", "placeholders")),
        # Quoted mail.
        ("late!\n\nOn Tue, 3 Mar 2026 at 10:00, Ann <a@b.c>\nwrote:\n\n> hello\n> you", "late!",
         ("quoted_mail",)),
        ("late!\nAm 03.03.2026 um 10:00 schrieb Ann <a@b.c>:\n> hello", "late!", ("quoted_mail",)),
        ("late!\nLe mar. 3 mars 2026, Ann a écrit :\nhello", "late!", ("quoted_mail",)),
        ("late!\n\n-----Original Message-----\nFrom: Ann\nhello", "late!", ("quoted_mail",)),
        ("late!\n\nFrom: Ann <a@b.c>\nSent: Monday\nTo: me\nSubject: hi\n\nhello", "late!",
         ("quoted_mail",)),
        ("> Where is it?\nNo answer", "No answer", ("quoted_mail",)),
        ("> one\n> two\nanswer", "answer", ("quoted_mail",)),
        ("On Monday, Ann wrote:\n> hello\n\nIt is late", "It is late", ("quoted_mail",)),
        ("> only\n> this", "> only\n> this", ()),
        # Signatures.
        ("late\n-- \nAnn\nACME", "late", ("signatures",)),
        ("late\n\nSent from my iPhone", "late", ("signatures",)),
        ("zu spät\nVon meinem iPhone gesendet", "zu spät", ("signatures",)),
        ("late\nKind regards,\nAnn\n+49 170 1234567", "late", ("signatures",)),
        ("late\nKind regards,\nAnn", "late\nKind regards,\nAnn", ()),
        ("Sent from my iPhone", "Sent from my iPhone", ()),
        # Placeholders.
        ("This message was deleted.", "", ("placeholders",)),
        ("<Media omitted>", "", ("placeholders",)),
        ("\u200eimage omitted", "", ("invisible_characters", "placeholders")),
        ("[image]", "", ("placeholders",)),
        ("<Medien ausgeschlossen>", "", ("placeholders",)),
        ("IMG-20260301-WA0001.jpg (file attached)", "", ("placeholders",)),
        ("late <This message was edited>", "late", ("placeholders",)),
    ],
)  # fmt: skip
def test_the_words_stay_and_the_rest_goes(text, words, left_out):
    assert said(text) == (words, left_out)


PIECES = (
    "<p>", "</p>", "<!--", "<![", "<br>", "<blockquote type=cite>", "</blockquote>", "> ", "\n",
    "-- \n", "On Monday, Ann wrote:\n", "From: a\nSent: b\n", "late", "data:image/png;base64,",
    BASE64, "&amp;",
    "Kind regards,\n", "+49 170 1234567", "[image]", "<", ">", "\u200b",
)  # fmt: skip


@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_has_words_or_says_what_was_left_out(text):
    words, left_out = said(text)
    assert words or left_out or not text.strip()
    assert left_out or words == text.strip()


@pytest.mark.parametrize(
    "piece",
    ["<p>", "<!--", "<img ", "On a b\n", ">a\n\n", "--\n", "data:", "![a", "Regards,\n", "aB3"],
)
@pytest.mark.slow
def test_long_texts_take_time_by_their_length(piece):
    words, _ = said(piece * (2_000_000 // len(piece)))
    assert len(words) <= 2_000_000
