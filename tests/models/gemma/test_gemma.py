"""The real embedded Gemma 3 270M on a few chats."""

import json
import os
import runpy
import shutil
import sys

import contract
import numpy as np
import pytest
from conftest import FEW_SHOT, ROOT, chat

from chatflow.models.gemma.grammar import Text
from chatflow.models.spec import ModelSpec
from chatflow.prompts.questions import AnalysisPrompt, DraftPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import AnalysedChat, Sentiment
from chatflow.stages.analyse import read_of, to_analysis
from chatflow.stages.ask import Answered
from chatflow.stages.draft import ask_for_draft, to_draft
from chatflow.weights import embedded

pytestmark = pytest.mark.gemma

# Here, where it is loaded, and not once more in another process.
globals().update({name: test for name, test in vars(contract).items() if name.startswith("test_")})


@pytest.fixture(params=["auto", "none"])
def case(request, gemma, monkeypatch):
    """What the tests of the contract are about: a chat is read, or tone and summary asked for."""
    return contract.on_worker(gemma, monkeypatch, request.param)


CHATS = [
    chat(
        "Where is my parcel? I have been waiting for three weeks now!",
        "It is on its way.",
        "You said that last week. This is ridiculous, I am really angry with you.",
        chat_id="angry",
    ),
    chat("Hi, which documents do I need to open an account?", "A passport.", chat_id="neutral"),
    chat("The lamp arrived today and it looks wonderful, thank you so much!", chat_id="happy"),
]


@pytest.fixture(scope="module")
def analysed(gemma):
    """Analyses of chats that were read."""
    return analyses(gemma, AnalysisPrompt(load_folder("base")["analysis"], ModelSpec()))


@pytest.fixture(scope="module")
def written(gemma):
    """Analyses whose tone was scored behind examples, and whose summary the model wrote."""
    return analyses(gemma, AnalysisPrompt(load_folder(FEW_SHOT)["analysis"], WRITES))


WRITES = ModelSpec(heads="none")


def analyses(gemma, prompt):
    questions = [prompt.question(one, "c") for one in CHATS]
    answers = gemma.answer([question.request for question in questions])
    made = [Answered(q, a) for q, a in zip(questions, answers, strict=True)]
    return [
        AnalysedChat(answered.question.chat, to_analysis(answered), read_of(answered))
        for answered in made
    ]


@pytest.mark.parametrize("way", ["analysed", "written"])
def test_it_tells_angry_from_neutral_from_happy(way, request):
    found = request.getfixturevalue(way)
    assert [a.sentiment for _, a, _ in found] == [
        Sentiment.ANGRY, Sentiment.NEUTRAL, Sentiment.HAPPY,
    ]  # fmt: skip


def test_its_summaries_quote_the_chat(analysed):
    for one, analysis, _ in analysed:
        assert 1 <= len(analysis.summary) <= 512
        assert analysis.summary_source == "quotations"
        assert analysis.model == ModelSpec().result_name == "gemma3-270m@support-2"
        assert analysis.tone_scores is None
        assert 1 / 3 < analysis.confidence <= 1
        assert analysis.quotations
        for quotation in analysis.quotations:
            assert quotation.text in one.messages[quotation.message].text
            assert quotation.text in analysis.summary


def test_it_says_what_a_chat_is_about(analysed):
    (_, angry, _), (_, neutral, _), (_, happy, _) = analysed
    assert angry.fields["topic"].value == "delivery"
    assert angry.fields["toward"].value == "company"
    assert angry.fields["resolved"].value == "no"
    assert neutral.fields["toward"].value == happy.fields["toward"].value == "nobody"
    assert (angry.language, angry.unproven_language) == ("en", None)


def test_its_own_summaries_are_of_the_chat(written):
    for one, analysis, _ in written:
        assert 1 <= len(analysis.summary) <= 512
        assert analysis.summary_source in ("model", "quotations")
        assert set(analysis.tone_scores) == {"angry", "neutral", "happy"}
        words = set(" ".join(m.text for m in one.messages).lower().replace("!", "").split())
        assert words & set(analysis.summary.lower().split())


def test_a_draft_is_composed_of_what_it_read(analysed):
    prompt = DraftPrompt(load_folder("base")["apology"], ModelSpec())
    (made,) = ask_for_draft(prompt, analysed[0])
    assert made.flag is None
    assert made.evidence
    for quotation in made.evidence:
        assert quotation.text in CHATS[0].messages[quotation.message].text
    assert made.text.startswith("We are sorry")
    assert made.confidence <= analysed[0].analysis.confidence


@pytest.mark.slow
def test_it_drafts_an_apology_that_ends_with_the_fixed_sentences(gemma, written):
    prompt = DraftPrompt(load_folder(FEW_SHOT)["apology"], WRITES)
    question = prompt.question(written[0].chat, "c", written[0].analysis)
    (answer,) = gemma.answer([question.request])
    draft = to_draft(Answered(question, answer), prompt)
    assert draft.text.startswith("We are sorry that ")
    assert draft.text.endswith("A colleague will look into it and come back to you.")
    assert ".." not in draft.text


@pytest.mark.slow
def test_the_models_json_is_built_by_code(gemma):
    prompt = AnalysisPrompt(load_folder(FEW_SHOT)["analysis"], WRITES)
    (answer,) = gemma.answer([prompt.question(CHATS[0], "c").request])
    assert set(json.loads(answer.text)) == {"sentiment", "summary"}
    assert answer.prompt_tokens > 100
    assert 0 < answer.answer_tokens <= 40


@pytest.mark.slow
def test_it_writes_the_json_itself_where_the_template_asks_so(gemma, tmp_path):
    """An answer ends with its object, however many tokens there would still be."""
    shots = "".join(
        f'Chat: {text}\nJSON: {{"sentiment": {tone}, "summary": "{summary}"}}\n\n'
        for text, tone, summary in (
            ("My bag is lost!", -1, "The bag is lost."),
            ("What time do you open?", 0, "Asks for the hours."),
            ("I love it, thank you!", 1, "Loves it."),
        )
    )
    for name, text in load_folder("base")["apology"].sources:
        (tmp_path / name).write_text(text)
    (tmp_path / "analysis.jinja").write_text(
        '{% set tones = {"angry": -1, "neutral": 0, "happy": 1} %}\n'
        "{% set summary_characters = 512 %}{% set summary_grounding = 0 %}\n"
        "{% set answer_tokens = 64 %}\n{% block json %}"
        + shots
        + "Chat: {{ messages[0].text }}\nJSON:{% endblock %}\n"
    )
    prompt = AnalysisPrompt(load_folder(str(tmp_path))["analysis"], WRITES)
    question = prompt.question(CHATS[2], "c")
    (answer,) = gemma.answer([question.request])
    assert set(json.loads(answer.text)) == {"sentiment", "summary"}
    assert answer.answer_tokens < 64


@pytest.mark.slow
def test_greedy_text_is_that_of_a_plain_forward_pass(gemma):
    """Of the whole text, without the cache: after each token, the next is the likeliest."""
    from chatflow.models.gemma.engine import Row

    engine, ids = gemma.engine, [2, *gemma.engine.encode("The capital of France is")]
    row = Row("The capital", " of France is", text=Text(), max_tokens=6)
    (found,) = engine.run([row])
    assert len(found.tokens) == 6
    tokens = np.array([[*ids, *found.tokens]], np.int32)
    logits = engine.forward.model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    likeliest = np.asarray(logits)[0, len(ids) - 1 : -1].argmax(-1)
    assert list(found.tokens) == likeliest.tolist()
    assert found.text == engine.tokenizer.detokenize(likeliest.tolist())


@pytest.mark.slow
def test_the_gpu_bench_runs_anywhere(monkeypatch, capsys):
    """With a tiny shape; on a GPU it measures those of Gemma 3 1B and 4B."""
    script = ROOT / "bench" / "gpu.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--shapes=tiny", "--batches=1,4"])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    (shape,) = json.loads(out.splitlines()[-1])["shapes"]
    assert [row["rows"] for row in shape["batches"]] == [1, 4]
    assert all(row["chatflow_chats_per_second"] > 0 for row in shape["batches"])


@pytest.mark.slow
def test_the_conversion_is_done_once_and_a_broken_copy_is_made_again(gemma, tmp_path, monkeypatch):
    """A cut file is noticed by its hash."""
    folder = embedded.ensure()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = embedded.cache_root() / folder.name
    shutil.copytree(folder, copy, copy_function=os.symlink)
    said: list[str] = []
    assert embedded.ensure(said.append) == copy
    assert not said
    (copy / "tokenizer.model").unlink()
    (copy / "tokenizer.model").write_bytes(b"cut")
    assert embedded.ensure(said.append) == copy
    assert said
    assert (copy / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_the_tokenizer_is_gemmas(gemma):
    engine = gemma.engine
    text = "Hello world\n\nHow are you?  ok 🤬 123"
    ids = engine.encode(text)
    assert engine.tokenizer.detokenize(ids) == text
    assert [engine.tokenizer.id_to_token(i) for i in ids[:3]] == ["Hello", "▁world", "\n\n"]
    bos = engine.tokenizer.start_token_id
    assert bos not in engine.encode("<bos>")
