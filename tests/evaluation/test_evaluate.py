import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT, chat, mistake

from chatflow.cli import main
from chatflow.evaluation.figures import figures
from chatflow.evaluation.history import fall, read_history
from chatflow.evaluation.labels import Label, read_labels
from chatflow.evaluation.page import page
from chatflow.evaluation.tables import interval
from chatflow.evaluation.variants import Judged, Ran, Variant
from chatflow.options import Options
from chatflow.pipeline import plan
from chatflow.records import Analysis, Sentiment, now

A, N, H = Sentiment.ANGRY, Sentiment.NEUTRAL, Sentiment.HAPPY


def labelled(talk, sentiment, source="x-1"):
    return {**json.loads(talk.to_json()), "sentiment": sentiment, "source": source}


HOSTILE = "<script>alert(1)</script> [bold]three[/] & </details>"


@pytest.fixture
def judged(lines, tmp_path):
    """Four labelled chats and one without a label; the model gets one wrong, one not at all."""

    def script(name, **tones):
        rules = [
            {
                "task": "analysis",
                "chat_id": number,
                "answer": {"sentiment": tone, "summary": "Said to Smith."},
            }
            for number, tone in tones.items()
        ]
        rules = [{**rule, "chat_id": rule["chat_id"].removeprefix("c")} for rule in rules] + [
            {"chat_id": "4", "error": "overloaded"},
            {"task": "apology", "chat_id": "1", "answer": "We are sorry. We will refund you."},
            {"task": "apology", "answer": ""},
            {"answer": {"sentiment": 0, "summary": "It is what it is."}},
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(rule) + "\n" for rule in rules))
        return f"scripted:{path}"

    path = lines(
        labelled(chat("one", chat_id="1"), -1),
        labelled(chat("two " * 21, chat_id="2"), 0, "y-2"),
        labelled(chat(HOSTILE, chat_id="3"), 1),
        labelled(chat("four", chat_id="4"), 1),
        chat("five", chat_id="5"),
    )
    good = script("good.jsonl", c1=-1, c2=0, c3=-1)
    return path, good, script("bad.jsonl", c1=0, c2=0, c3=-1)


@pytest.fixture
def tiny_vader(monkeypatch):
    """A stand-in for VADER, to which everything is good."""
    module = types.ModuleType("vaderSentiment.vaderSentiment")
    module.SentimentIntensityAnalyzer = lambda: types.SimpleNamespace(
        polarity_scores=lambda _: {"compound": 1.0}
    )
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_vader")
def test_evaluate_compares_variants_with_the_labels(judged, tmp_path, capsys):
    path, good, bad = judged
    flags = ["--compare", f"model={bad}", "--compare=vader", f"--report={tmp_path}/page.html"]
    flags += [f"--history={tmp_path}/history.jsonl"]
    assert main(["evaluate", path, "--model", good, "--summary=json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    first, second, vader = report["variants"]

    assert (report["chats"], first["chats"]) == (4, 4)
    assert first["accuracy"]["value"] == 0.5
    assert first["accuracy"]["low"] < 0.5 < first["accuracy"]["high"]
    assert first["confusion"]["happy"] == {"angry": 1, "neutral": 0, "happy": 0, "none": 1}
    assert first["classes"]["angry"] == {"chats": 1, "precision": 0.5, "recall": 1, "f1": 0.6667}
    assert (first["angry_recall"]["value"], first["angry_precision"]["value"]) == (1, 0.5)
    assert first["calibration"] is None  # a script is never unsure
    assert first["answers"] == {
        "asked": 4, "at_once": 0, "repaired": 3, "none": 1, "valid": 0.75,
        "reasons": {"model/overloaded": 1},
    }  # fmt: skip
    assert first["wrong"] == [
        {"chat_id": "3", "user_id": "c", "label": "happy", "answer": "angry", "confidence": None},
        {"chat_id": "4", "user_id": "c", "label": "happy", "answer": "none", "confidence": None},
    ]
    assert {name: of["chats"] for name, of in first["sources"].items()} == {"x": 3, "y": 1}
    assert {name: of["chats"] for name, of in first["lengths"].items()} == {
        "up to 20 words": 3,
        "21 to 60 words": 1,
    }
    assert (first["run"]["dead_letters"], first["run"]["lost"]) == (2, 0)

    assert first["summaries"]["all"]["texts"] == 3
    assert first["summaries"]["all"]["copies_of_prompt"] == 0
    # Nobody spoke of Smith, so the summaries are composed; nor may a draft promise a refund.
    assert (first["summaries"]["by_model"], first["summaries"]["composed"]) == (0, 3)
    assert first["summaries"]["offenders"] == []
    drafts = first["drafts"]
    assert (drafts["asked"], drafts["drafted"], drafts["apologise"]) == (2, 0, 0)
    assert drafts["not_drafted"] == {"draft_answer/empty_draft": 1, "no_evidence": 1}
    assert drafts["promise"] == 0

    assert second["against_first"]["accuracy"]["value"] == -0.25
    assert second["against_first"]["verdict"] == "no more than chance (p = 1.00)"
    assert vader["confusion"]["angry"]["happy"] == 1
    assert vader["summaries"] is None
    written = (tmp_path / "page.html").read_text()
    assert_one_page(written)
    # Who else is wrong: VADER is right. Each shows the chat, and its summary quotes it.
    assert written.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert "We will refund" not in written

    assert report["history"]["falls"] == []
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(line["variant"], line["accuracy"]) for line in lines] == [
        (0, 0.5),
        (1, 0.25),
        (2, 0.5),
    ]
    assert lines[0]["answers"] == {"1/c": -1, "2/c": 0, "3/c": -1, "4/c": None}
    assert (lines[0]["labelled"], lines[0]["chats"]) == ("chats.jsonl", 4)
    assert (lines[0]["drafts"], lines[0]["promises"], lines[0]["kept_summaries"]) == (0, 0, 0)
    assert lines[0]["prompt_versions"]["analysis"]


def assert_one_page(text):
    """No script, nothing from elsewhere, and all that is opened is closed."""
    open_tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "img", "iframe"), tag
            assert not [name for name, _ in attributes if name.startswith("on")]
            assert not {"src", "href"} & dict(attributes).keys()
            if tag not in ("meta", "br") and not self.get_starttag_text().endswith("/>"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if open_tags[-1:] == [tag]:
                open_tags.pop()
            elif tag not in ("rect", "line", "path"):
                raise AssertionError(f"</{tag}> closes {open_tags}")

    Reader(convert_charrefs=True).feed(text)
    assert open_tags == []
    assert "url(" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.slow
def test_a_fall_since_the_last_time_is_said_below_the_tables(judged, lines, capsys):
    path, good, _ = judged
    before = {"1/c": -1, "2/c": 0, "3/c": 1, "4/c": None}
    earlier = {"labelled": "chats.jsonl", "variant": 0, "answers": before, "accuracy": 0.75}
    history = lines(earlier, name="history.jsonl")
    assert main(["evaluate", path, "--model", good, "--history", history]) == 1
    said = capsys.readouterr()
    for text in (
        "angry", "neutral", "happy", "none", "precision", "macro-F1", "recall of angry",
        "model/overloaded: 1", "0 of 2", "up to 20 words", "wrong answers: 2", "History", "0.750",
    ):  # fmt: skip
        assert text in said.out
    assert max(map(len, said.out.splitlines())) <= 120
    assert "chatflow: accuracy on chats.jsonl fell from 0.750 to 0.500 with scripted:" in said.err
    assert said.err.endswith("by more than --tolerance=0.03; no longer right: 3/c\n")
    assert len(Path(history).read_text().splitlines()) == 2  # what fell is written down, too


def history_line(*answers, **fields):
    named = {f"{i}/c": answer for i, answer in enumerate(answers)}
    return {"labelled": "x.jsonl", "variant": 0, "name": "m", "answers": named, **fields}


def test_only_a_fall_beyond_the_tolerance_counts():
    labels = {(str(i), "c"): Label(A, "", chat("x", chat_id=str(i))) for i in range(100)}
    before, after = history_line(*[A] * 100), history_line(*[A] * 97, *[N] * 3)
    assert fall([before], after, labels, 0.03) == ""
    assert "0.970 with m, by more than --tolerance=0.02" in fall([before], after, labels, 0.02)
    assert fall([after], before, labels, 0) == ""  # it rose


def test_a_line_is_compared_with_the_newest_of_its_kind():
    labels = {("0", "c"): Label(A, "", chat("x"))}
    good, bad = history_line(A), history_line(N)
    assert fall([], bad, labels, 0) == ""
    assert fall([good, bad], bad, labels, 0) == ""
    assert fall([good, history_line(N, variant=1)], bad, labels, 0)
    assert fall([history_line(A, labelled="y.jsonl")], bad, labels, 0) == ""
    other = history_line(N, variant=1, name="vader")
    assert fall([history_line(A, variant=1, name="model=big")], other, labels, 0) == ""


def test_new_chats_and_new_labels_are_no_fall():
    labels = {(str(i), "c"): Label(A, "", chat("x", chat_id=str(i))) for i in range(2)}
    assert fall([history_line(A)], history_line(A, N), labels, 0) == ""
    assert fall([history_line(N)], history_line(N), {("0", "c"): labels["0", "c"]}, 0) == ""


WRONG = {
    "--compare=colour=red": "unknown flag colour",
    "--compare=adapted": "give flags without dashes as FLAG=VALUE",
    "--compare=": "give flags without dashes as FLAG=VALUE",
    "--compare=model_kind=clever": "invalid choice: 'clever'",
    "--compare=max_prompt_tokens=many": "max_prompt_tokens",
    "--compare=prompts=/nowhere": "no folder",
    "--compare=model='x": "No closing quotation",
    "--report=/nowhere/page.html": "no such folder",
    "--history=SCRIPT": "not a line of an evaluation",
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_is_said_before_anything_runs(judged, flag, capsys):
    path, good, _ = judged
    flag = flag.replace("SCRIPT", good.removeprefix("scripted:"))
    error = mistake(["evaluate", path, "--model", good, flag], {}, capsys)
    assert flag.split("=")[0] in error
    assert WRONG.get(flag, "not a line") in error


def test_a_bias_cannot_be_fitted_without_scores(judged, capsys):
    path, model, _ = judged
    assert main(["evaluate", path, "--model", model, "--fit_bias"]) == 2
    assert "does not score tone words" in capsys.readouterr().err


def test_a_bias_is_not_fitted_to_a_remote_model(judged, capsys):
    path, *_ = judged
    flags = ["--inference=remote", "--model=gemini-2.5-flash", "--fit_bias"]
    assert main(["evaluate", path, *flags]) == 2
    assert "remote models return no scores" in capsys.readouterr().err


def test_a_wrong_label_is_said_with_its_line(lines, capsys):
    path = lines(labelled(chat("x"), 1), labelled(chat("y"), 5))
    assert main(["evaluate", path]) == 2
    assert f"{path}:2: " in capsys.readouterr().err


def test_an_interval_is_written_without_zeros():
    assert interval({"value": 0.5, "low": 0, "high": 1}) == ".500 (.000 to 1.000)"
    assert interval({"value": -0.5, "low": -1, "high": 0.02}, "+") == "-.500 (-1.000 to +.020)"


def judgement(chat_id, label, answer, confidence, text="Hello"):
    talk = chat(text, "Hi", chat_id=chat_id)
    analysis = Analysis(
        analysis_id=chat_id, chat_id=chat_id, user_id="c", revision=0, sentiment=answer,
        summary=text, summary_source="quotations", confidence=confidence, model="m",
        prompt_version="1", analysed_at=now(),
    )  # fmt: skip
    return Judged(Label(label, "", talk), answer, analysis)


def test_the_page_shows_how_sure_the_model_was():
    judged = {
        ("1", "c"): judgement("1", A, A, 0.95),
        ("2", "c"): judgement("2", A, N, 0.55),
        ("<b>", "c"): judgement("<b>", A, H, 0.75, '"><img src=x onerror=alert(1)>'),
    }
    run = {"seconds": 1.0, "chats_per_second": 3.0}
    ran = Ran(Variant("<i>model</i>"), judged, run)
    found = figures(ran)
    assert found["calibration"]["count"] == 3
    assert [wrong["confidence"] for wrong in found["wrong"]] == [0.55, 0.75]
    written = page({"labelled": "a<b>.jsonl", "chats": 3, "variants": [found]}, [ran])
    assert_one_page(written)
    assert "confidence 0.95: 1 answers, 1.00 of them right" in written
    order = [written.index("confidence 0.75</summary>"), written.index("confidence 0.55</summary>")]
    assert order == sorted(order)  # the surest first


def test_the_page_never_turns_escaping_off():
    source = ROOT / "chatflow" / "evaluation" / "page.html.jinja"
    assert "autoescape" not in source.read_text()
    assert "|safe" not in source.read_text().replace(" ", "")


def test_the_history_was_measured_with_the_prompts_and_the_heads_of_today():
    root = ROOT / "tuning"
    newest = read_history(str(root / "history.jsonl"))[-1]
    planned = plan(Options(input="chats.jsonl", output="results"))
    prompts = planned.first
    today = {"analysis": prompts.analysis.version, "draft": prompts.draft.version}
    assert (newest["prompt_versions"], newest["model"]) == (
        today,
        prompts.analysis.result_name,
    ), "run make eval, and commit tuning/history.jsonl"
    labels = read_labels(str(root / "eval.jsonl"))
    assert set(newest["answers"]) == {"/".join(key) for key in labels}
