"""The whole pipeline: files in, files out, every chat accounted for."""

import collections
import contextlib
import glob
import gzip
import hashlib
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to
from conftest import ANGRY, APOLOGY, SAMPLES, answer_any, as_line, chat, job_service, mistake, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatflow import __version__
from chatflow.cli import main
from chatflow.models.handlers import LanguageModelHandler
from chatflow.models.scripted import ScriptedModelHandler
from chatflow.models.spec import Model
from chatflow.options import ONE_COPY, Batching, Options
from chatflow.pipeline import build, plan
from chatflow.prompts.templates import default_folder
from chatflow.records import KINDS, Range
from chatflow.running.launch import execute
from chatflow.running.runner import beam_options
from chatflow.stages.analyse import AnalyseChats
from chatflow.stages.draft import DraftApologies


def run(path, output, model, **options):
    summary = execute(Options(input=str(path), output=str(output), model=model, **options), [])
    return summary.to_dict()


@pytest.mark.slow
def test_chats_in_analyses_and_drafts_out(tmp_path, lines, script):
    source = lines(chat("late again!", "sorry", chat_id="1"), chat("thanks", chat_id="2"))
    happy = {"match": "thanks", "answer": {"sentiment": 1, "summary": "The customer says thanks."}}
    counts = run(source, tmp_path / "out", script(happy, ANGRY, APOLOGY))
    analyses = {a["chat_id"]: a for a in read(tmp_path / "out", "analyses")}
    assert {k: (a["sentiment"], a["summary"]) for k, a in analyses.items()} == {
        "1": (-1, "The parcel is late."),
        "2": (1, "The customer says thanks."),
    }
    (draft,) = read(tmp_path / "out", "drafts")
    assert draft["analysis_id"] == analyses["1"]["analysis_id"]
    assert draft["text"] == "We are sorry that your parcel is late."
    assert read(tmp_path / "out", "dead_letters") == []
    assert counts["sentiment"] == {"angry": 1, "neutral": 0, "happy": 1}
    assert (counts["lines_read"], counts["analysed"], counts["drafted"]) == (2, 2, 1)
    assert counts["lost"] == counts["dead_letters"] == 0
    assert counts["prompt_tokens"] > 0
    assert counts["latency_ms"]["max"] >= 0
    assert counts["prompt_tokens_per_answer"]["max"] <= counts["prompt_tokens"]
    spread = counts["answer_tokens_per_answer"]
    assert spread["min"] <= spread["mean"] <= spread["max"]


@pytest.mark.slow
def test_messages_in_files_are_assembled_to_chats(tmp_path, lines, script):
    """In any order, twice, beside whole chats; as in a stream."""
    talk = [
        {"chat_id": c, "user_id": "u", "role": "customer", "text": f"late {n}",
         "message_id": f"{c}{n}", "sent_at": f"2026-03-01T10:00:0{n}Z"}
        for n in (2, 0, 1) for c in "ab"
    ]  # fmt: skip
    ends = [{"chat_id": "a", "event": "closed"}, {"chat_id": "nobody", "event": "closed"}]
    source = lines(*talk, talk[0], chat("late", chat_id="whole"), *ends)
    counts = run(source, tmp_path / "out", script(ANGRY, APOLOGY))
    found = {a["chat_id"]: a["revision"] for a in read(tmp_path / "out", "analyses")}
    at = 1772359202000
    assert found == {"a": at + 3, "b": at + 3, "whole": 0}
    (letter,) = read(tmp_path / "out", "dead_letters")
    assert (letter["stage"], letter["reason"]) == ("assemble", "unknown_chat")
    assert json.loads(letter["payload"]) == ends[1]
    assert (counts["messages_read"], counts["chats_assembled"], counts["lost"]) == (7, 2, 0)
    assert counts["reduced"]["duplicate_messages"] == 1


@pytest.mark.slow
def test_30_000_messages_of_one_chat(tmp_path, lines, script):
    source = lines(
        *(b'{"chat_id":"7","user_id":"u","text":"late %d"}' % n for n in range(30_000)),
        {"chat_id": "8", "user_id": "u", "text": "late"},
    )
    model = script(ANGRY, APOLOGY)
    counts = run(source, tmp_path / "out", model, every_messages=0, max_messages=50)
    found = {a["chat_id"]: a["revision"] for a in read(tmp_path / "out", "analyses")}
    assert found == {"7": 30_000, "8": 1}
    assert counts["reduced"]["forgotten_messages"] == 30_000 - 50
    assert counts["lost"] == 0


@pytest.mark.slow
def test_the_same_chats_twice_give_the_same_ids(tmp_path, lines, script):
    source, model = lines(chat("late!", chat_id="1")), script(ANGRY, APOLOGY)
    ids = []
    for output in ("a", "b"):
        run(source, tmp_path / output, model)
        ids.append(
            (read(tmp_path / output, "analyses")[0]["analysis_id"],
             read(tmp_path / output, "drafts")[0]["draft_id"])
        )  # fmt: skip
    assert ids[0] == ids[1]


BAD_INPUT = {
    "not_json": b"hello",
    "not_utf8": b'{"chat_id": "\xff", "messages": []}',
    "not_an_object": b"[1]",
    "no_messages": b'{"chat_id": "x", "messages": []}',
    "no_text": b'{"chat_id": "x", "messages": [{"user_id": "1", "text": ""}]}',
    "wrong_shape": b'{"chat_id": "x", "messages": [{"user_id": "1", "text": ["x"]}]}',
    "no_customer": b'{"chat_id": "x", "messages": [{"user_id": "1", "text": "x", "role": "bot"}]}',
    "line_too_long": as_line(chat("word " * 2_000_000)),
}


@pytest.mark.slow
def test_each_bad_line_is_a_dead_letter_that_holds_it(tmp_path, lines, script):
    source = lines(*BAD_INPUT.values(), b"", b"  ", chat("fine", chat_id="ok"))
    model = script(ANGRY, APOLOGY)
    counts = run(source, tmp_path / "out", model, max_line_bytes=5_000_000)
    letters = {letter["reason"]: letter for letter in read(tmp_path / "out", "dead_letters")}
    assert set(letters) == set(BAD_INPUT)
    assert {letter["stage"] for letter in letters.values()} == {"read"}
    assert letters["not_json"]["payload"] == "hello"
    assert letters["not_utf8"]["payload_encoding"] == "base64"
    assert letters["line_too_long"]["payload_encoding"] == "file"
    part = Range.parse(letters["line_too_long"]["payload"])
    assert (
        Path(part.path).read_bytes()[part.start : part.end].rstrip() == BAD_INPUT["line_too_long"]
    )
    assert letters["no_text"]["chat_id"] == "x"
    assert (counts["lines_read"], counts["analysed"], counts["lost"]) == (len(BAD_INPUT) + 1, 1, 0)


@pytest.mark.slow
def test_a_ten_megabyte_line_and_a_chat_of_5000_messages_are_reduced_not_lost(
    tmp_path, lines, script
):
    many = chat(*[f"message {i} is here" for i in range(5000)], chat_id="many")
    source = lines(chat("late! " * 1_700_000, chat_id="big"), many)
    # Not angry, because a draft would describe each of its 1.7 million sentences.
    calm = {"chat_id": "big", "answer": {"sentiment": 0, "summary": "It is late."}}
    counts = run(source, tmp_path / "out", script(calm, ANGRY, APOLOGY))
    found = {a["chat_id"]: a for a in read(tmp_path / "out", "analyses")}
    assert found["big"]["cut_messages"] == 1
    assert found["many"]["dropped_messages"] > 4000
    assert counts["reduced"]["cut_messages"] == 1
    assert counts["reduced"]["dropped_messages"] == found["many"]["dropped_messages"]
    assert counts["lost"] == 0


@pytest.mark.slow
def test_dead_letters_of_every_stage_are_replayed(tmp_path, lines, script):
    """What fails once works when it is sent in again, and nothing is asked for twice."""
    source = lines(
        chat("fine", chat_id="fine"), chat("x", chat_id="model"), chat("x", chat_id="answer"),
        chat("x", chat_id="draft"), b"still not JSON",
    )  # fmt: skip
    broken = script(
        {"chat_id": "model", "error": "overloaded"},
        {"chat_id": "answer", "task": "analysis", "answer": "rubbish"},
        {"chat_id": "draft", "task": "apology", "answer": ""},
        ANGRY,
        APOLOGY,
    )
    first = run(source, tmp_path / "first", broken)
    assert first["dead_letters_by_reason"] == {
        "answer/not_json": 1, "draft_answer/empty_draft": 1, "model/overloaded": 1,
        "read/not_json": 1,
    }  # fmt: skip
    letters = f"{tmp_path}/first/dead_letters*.jsonl"
    options = Options(input=letters, output=f"{tmp_path}/again", model=script(ANGRY, APOLOGY))
    second = execute(options, [], replay=True).to_dict()
    assert sorted(a["chat_id"] for a in read(tmp_path / "again", "analyses")) == ["answer", "model"]
    drafted = sorted(d["chat_id"] for d in read(tmp_path / "again", "drafts"))
    assert drafted == ["answer", "draft", "model"]
    assert second["dead_letters_by_reason"] == {"read/not_json": 1}
    assert second["lost"] == 0
    whole = read(tmp_path / "first", "drafts") + read(tmp_path / "again", "drafts")
    by_analysis = {d["analysis_id"] for d in whole}
    analyses = read(tmp_path / "first", "analyses") + read(tmp_path / "again", "analyses")
    assert by_analysis == {a["analysis_id"] for a in analyses}


@pytest.mark.slow
def test_a_letter_that_cannot_be_opened_is_a_dead_letter_again(tmp_path, lines, script):
    source = lines(b"no letter", {"stage": "draft_model"}, name="dead_letters-x.jsonl")
    options = Options(input=source, output=f"{tmp_path}/out", model=script(ANGRY, APOLOGY))
    counts = execute(options, [], replay=True).to_dict()
    assert counts["dead_letters_by_reason"] == {"replay/not_json": 1, "replay/wrong_shape": 1}
    payloads = {letter["payload"] for letter in read(tmp_path / "out", "dead_letters")}
    assert payloads == {"no letter", '{"stage": "draft_model"}'}


# Conservation: any mix of good and bad lines and of model failures.

BEHAVIOURS = {
    "good": {"answer": {"sentiment": 0, "summary": "It is fine."}},
    "angry": {"answer": {"sentiment": -1, "summary": "It is late."}},
    "rubbish": {"answer": "rubbish"},
    "out_of_range": {"answer": {"sentiment": 7, "summary": "x"}},
    "empty": {"answer": ""},
    "error": {"error": "overloaded"},
    "crash": {"crash": "out of memory"},
    "no_draft": {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}},
    "draft_crash": {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}},
    "flagged": {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}},
}
SCRIPT = [
    {"match": "behave draft_crash", "task": "apology", "crash": "out of memory"},
    {"match": "behave no_draft", "task": "apology", "answer": ""},
    {"match": "behave flagged", "task": "apology", "answer": "We are sorry for your fault."},
    {"match": "behave angry", "task": "apology", "answer": "We are sorry about the delay."},
    *({"match": f"behave {name}\\b", **rule} for name, rule in BEHAVIOURS.items()),
]


def refusing(phrase, folder):
    """A folder of prompts in which no draft may say a phrase."""
    to = Path(folder, "prompts")
    shutil.copytree(default_folder() / "instruct", to)
    apology = to / "apology.jinja"
    apology.write_text(f"{{% set refused_phrases = ['{phrase}'] %}}\n{apology.read_text()}")
    return str(to)


def behaving(chat_id, behaviour, whole):
    """A line that makes the model behave so: a whole chat, or a message of one."""
    text = f"behave {behaviour}"
    if whole:
        return chat(text, chat_id=chat_id)
    return {"chat_id": chat_id, "user_id": "c", "role": "customer", "text": text}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(sorted(BEHAVIOURS)), st.booleans()),
            st.binary(min_size=1, max_size=20).filter(
                lambda raw: raw.strip() and b"\n" not in raw and b"\r" not in raw
            ),
        ),
        max_size=24,
    ),
    st.integers(min_value=1, max_value=9),
)
@pytest.mark.slow
def test_every_line_is_accounted_for_exactly_once(mix, batch):
    with tempfile.TemporaryDirectory() as folder:
        source = [
            item if isinstance(item, bytes) else as_line(behaving(str(number), *item))
            for number, item in enumerate(mix)
        ]
        # The first line says that the file is text: one that is not is refused before the run.
        source.insert(0, as_line(behaving("first", "happy", whole=True)))
        Path(folder, "in.jsonl").write_bytes(b"".join(line + b"\n" for line in source))
        Path(folder, "script.jsonl").write_text("\n".join(map(json.dumps, SCRIPT)))
        counts = run(
            f"{folder}/in.jsonl",
            f"{folder}/out",
            f"scripted:{folder}/script.jsonl",
            max_batch_size=batch,
            prompts=refusing("your fault", folder),
        )
        analyses, drafts, letters = (
            read(f"{folder}/out", kind) for kind in ("analyses", "drafts", "dead_letters")
        )
    unanalysed = [letter for letter in letters if not letter["stage"].startswith("draft")]
    undrafted = [letter for letter in letters if letter["stage"].startswith("draft")]
    assert counts["lost"] == 0
    assert counts["lines_read"] == len(source) == len(analyses) + len(unanalysed)

    ids = collections.Counter(item["chat_id"] for item in analyses)
    ids.update(letter["chat_id"] for letter in unanalysed if letter.get("chat_id"))
    expected = {str(n): 1 for n, item in enumerate(mix) if not isinstance(item, bytes)}
    expected["first"] = 1
    assert ids == expected

    angry = collections.Counter(a["chat_id"] for a in analyses if a["sentiment"] == -1)
    reviewed = collections.Counter(item["chat_id"] for item in drafts + undrafted)
    assert reviewed == angry
    flagged = sum(d.get("flag") == "refused_phrase" for d in drafts)
    assert flagged == sum(counts["drafts_flagged"].values())
    assert counts["drafted"] == len(drafts) - flagged


# Files that are not read as they should be.


def chatflow_run(source, output, model, *flags):
    """The exit code of `chatflow run`."""
    return main(["run", f"--input={source}", f"--output={output}", f"--model={model}", *flags])


@pytest.mark.slow
def test_what_can_be_read_is_and_the_exit_code_says_the_rest(tmp_path, lines, script, capsys):
    good = lines(chat("late", chat_id="1"), name="in/good.jsonl")
    whole = gzip.compress(b"".join(as_line(chat("late", chat_id=str(n))) + b"\n" for n in range(9)))
    Path(good).with_name("cut.jsonl.gz").write_bytes(whole[:-8])
    Path(good).with_name("page.jsonl").write_text("<html>404</html>")
    code = chatflow_run(Path(good).parent, tmp_path / "out", script(ANGRY, APOLOGY))
    said = capsys.readouterr().err
    assert code == 1
    assert "not all files were read to their end (truncated_file 1, wrong_format 1)" in said
    letters = read(tmp_path / "out", "dead_letters")
    assert {letter["payload_encoding"] for letter in letters} == {"file"}
    assert {letter["payload"].rpartition("/")[2].partition("#")[0] for letter in letters} == {
        "cut.jsonl.gz", "page.jsonl",
    }  # fmt: skip
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    # Chat 1 is in both files, with the same content.
    assert len({a["chat_id"] for a in read(tmp_path / "out", "analyses")}) == counts["analysed"]
    assert counts["reduced"]["duplicate_chats"] == counts["chats_read"] - counts["analysed"]
    assert counts["lost"] == 0


@pytest.mark.slow
def test_a_run_that_reads_nothing_leaves_the_results_of_the_one_before(
    tmp_path, lines, script, capsys
):
    model, output = script(ANGRY, APOLOGY), tmp_path / "out"
    assert chatflow_run(lines(chat("late")), output, model) == 0
    before = {path.name: path.read_bytes() for path in output.glob("*.json*")}
    assert chatflow_run(lines(b"no json", b"at all"), output, model, "--summary=json") == 1
    said = capsys.readouterr().err
    assert "every line became a dead letter (not_json 2); the results of the earlier" in said
    assert {path.name: path.read_bytes() for path in output.glob("*.json*")} == before
    assert chatflow_run(lines(), output, model) == 1
    assert "the input has no lines; the results of the earlier run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.glob("*.json*")} == before
    assert chatflow_run(lines(), tmp_path / "empty", model) == 0
    assert chatflow_run(lines(b"no json"), tmp_path / "new", model) == 1
    assert "the first: the line is not JSON" in capsys.readouterr().err
    assert len(read(tmp_path / "new", "dead_letters")) == 1


@pytest.mark.slow
def test_a_line_that_was_too_long_is_replayed_from_its_file(tmp_path, lines, script):
    source = lines(chat("late", chat_id="short"), chat("late " * 100, chat_id="long"))
    counts = run(source, tmp_path / "out", script(ANGRY, APOLOGY), max_line_bytes=300)
    assert counts["dead_letters_by_reason"] == {"read/line_too_long": 1}
    letters = tmp_path / "out" / "dead_letters*.jsonl"
    again = execute(
        Options(input=str(letters), output=str(tmp_path / "again"), model=script(ANGRY, APOLOGY)),
        [], replay=True,
    )  # fmt: skip
    assert again.lost == 0
    assert [a["chat_id"] for a in read(tmp_path / "again", "analyses")] == ["long"]


@pytest.mark.slow
def test_chats_of_one_id_are_told_apart_or_refused(tmp_path, lines, script):
    """Never a draft for an angry customer beside an analysis of another chat."""
    same = {"chat_id": "77", "messages": [{"user_id": "c", "text": "late"}]}
    grown = {**same, "messages": same["messages"] * 2}
    other = {**grown, "messages": [*same["messages"], {"user_id": "c", "text": "fine"}]}
    source = lines(same, same, grown, other)
    counts = run(
        source, tmp_path / "out", script(ANGRY, APOLOGY), database=f"sqlite:///{tmp_path}/c.db"
    )
    analyses, letters = (read(tmp_path / "out", kind) for kind in ("analyses", "dead_letters"))
    assert [a["revision"] for a in analyses] == [1]
    assert [letter["reason"] for letter in letters] == ["shared_id"] * 2
    assert (counts["chats_read"], counts["reduced"]["duplicate_chats"], counts["lost"]) == (4, 1, 0)


# The graph.


def step_names(**options):
    """The full names of all steps of the pipeline, in order."""
    pipeline = beam.Pipeline(options=beam_options([]))
    build(pipeline, plan(Options(**options)))
    names: list[str] = []

    class Visitor(beam.pipeline.PipelineVisitor):
        def enter_composite_transform(self, node):
            names.append(node.full_label)

        def visit_transform(self, node):
            names.append(node.full_label)

    pipeline.visit(Visitor())
    return list(dict.fromkeys(filter(None, names)))


@pytest.fixture
def steps(tmp_path, lines, script):
    return step_names(
        input=lines(chat("x")), output=str(tmp_path / "out"), model=script(ANGRY, APOLOGY)
    )


APART = "TellApart TellApart/ById TellApart/Together TellApart/Compare TellApart/Check"
STEPS = """
    ReadArrivals {read} ReadArrivals/Flatten
    ParseArrivals ParseArrivals/Parse ParseArrivals/ByKind
    AssembleChats AssembleChats/ByChat AssembleChats/Assemble AssembleChats/CheckChat
    AllChats {apart}
    AnalyseChats AnalyseChats/EachUser AnalyseChats/RenderPrompt AnalyseChats/AskModel
    AnalyseChats/ParseAnswer AnalyseChats/Flatten
    TakeAnalysis WriteAnalyses WriteAnalyses/Write
    DraftApologies DraftApologies/OnlyAngry DraftApologies/RenderPrompt DraftApologies/ByKind
    DraftApologies/AskModel DraftApologies/ParseAnswer
    DraftApologies/AllDrafts DraftApologies/Flatten
    WriteDrafts WriteDrafts/Write
    AllDeadLetters WriteDeadLetters WriteDeadLetters/Write
"""


def test_step_names_are_stable(steps):
    """A streaming job is updated in place only where its step names stay as they are."""
    expected = STEPS.format(read="ReadArrivals/ReadLines", apart=APART)
    assert [name for name in steps if name.count("/") <= 1] == expected.split()
    assert "WriteAnalyses/Write/WriteFiles" in steps


def test_resource_hints_are_those_of_the_inference_steps_alone(tmp_path, lines, script):
    """A machine with an accelerator is for the model, not for reading and writing."""
    pipeline, hinted = beam.Pipeline(options=beam_options([])), {}
    options = Options(
        input=lines(chat("x")), output=str(tmp_path / "out"), model=script(ANGRY, APOLOGY),
        accelerator="type:nvidia-l4;count:1;install-nvidia-driver", min_ram="16GB",
    )  # fmt: skip
    build(pipeline, plan(options))

    class Visitor(beam.pipeline.PipelineVisitor):
        def enter_composite_transform(self, node):
            if node.transform and node.transform.get_resource_hints():
                hinted[node.full_label] = node.transform.get_resource_hints()

        visit_transform = enter_composite_transform

    pipeline.visit(Visitor())
    assert set(hinted) == {
        "AnalyseChats/AskModel/RunInference", "DraftApologies/AskModel/RunInference",
    }  # fmt: skip
    hints = set(hinted["AnalyseChats/AskModel/RunInference"].values())
    assert hints == {b"type:nvidia-l4;count:1;install-nvidia-driver", b"16000000000"}


def test_copies_and_sharing_are_those_of_the_flags(tmp_path, lines):
    def handler(**flags):
        options = Options(input=lines(chat("x")), output=str(tmp_path / "out"), **flags)
        return plan(options).model.handler

    assert handler().share_model_across_processes()
    assert handler(model_copies=3).model_copies() == 3
    assert not handler(large_model=False).share_model_across_processes()
    settings = handler(quantization="int8", dtype="bfloat16").settings
    assert (settings.dtype, settings.quantization) == ("bfloat16", "int8")


def test_step_names_of_a_stream_are_stable(script):
    """Batch and stream differ in source and sinks; steps with state have these names."""
    steps = step_names(
        input="projects/my-project/subscriptions/events",
        analyses="projects/my-project/topics/analyses,/tmp/analyses",
        drafts="projects/my-project/topics/drafts",
        dead_letters="projects/my-project/topics/dead",
        model=script(ANGRY, APOLOGY),
    )
    expected = STEPS.format(read="ReadArrivals/ReadMessages", apart="")
    for kind, writes in (
        ("Analyses", "Write Write1"),
        ("Drafts", "Write"),
        ("DeadLetters", "Write"),
    ):
        names = [f"Write{kind}/{name}" for name in (*writes.split(), "Refused")]
        expected = expected.replace(f"Write{kind}/Write", " ".join(names))
    assert [name for name in steps if name.count("/") <= 1] == expected.split()
    for name in (
        "AssembleChats/Assemble",
        "WriteAnalyses/Write/Publish",
        "WriteAnalyses/Write1/Append",
        "AnalyseChats/AskModel/RunInference/BatchElements",
    ):
        assert name in steps


@pytest.mark.parametrize("stage", ["AnalyseChats", "DraftApologies"])
def test_a_reshuffle_stands_before_and_after_each_inference(steps, stage):
    start = f"{stage}/AskModel/"
    inner = [name.removeprefix(start) for name in steps if name.startswith(start)]
    assert [name for name in inner if "/" not in name] == [
        "BeforeModel", "WithKey", "RunInference", "AfterModel", "TakeAnswers",
    ]  # fmt: skip
    assert {"BeforeModel/ReshufflePerKey", "AfterModel/ReshufflePerKey"} <= set(inner)


@pytest.mark.slow
def test_the_models_answers_are_asked_for_once(tmp_path, lines, script):
    """Two sinks and a second stage read the analyses; the model is asked once for each."""
    source = lines(*(chat("late!", chat_id=str(i)) for i in range(20)))
    run(source, tmp_path / "out", script({**ANGRY, "times": 20}, APOLOGY))
    assert len(read(tmp_path / "out", "analyses")) == 20


@pytest.mark.slow
def test_another_runner_gives_the_same_records(tmp_path, lines, script):
    """No stage knows the runner."""
    source = lines(*(chat("late!", chat_id=str(i)) for i in range(5)), b"rubbish")
    model, ids = script(ANGRY, APOLOGY), []
    for number, runner in enumerate(
        (
            "DirectRunner",
            "apache_beam.runners.direct.direct_runner.BundleBasedDirectRunner",
        )
    ):
        output = tmp_path / str(number)
        options = Options(input=source, output=str(output), model=model)
        assert execute(options, [f"--runner={runner}"]).lost == 0
        ids.append(
            (
                {a["analysis_id"] for a in read(output, "analyses")},
                {d["draft_id"] for d in read(output, "drafts")},
                {letter["payload"] for letter in read(output, "dead_letters")},
            )
        )
    assert ids[0] == ids[1]
    assert [len(kind) for kind in ids[0]] == [5, 5, 1]


@pytest.mark.slow
def test_workers_in_other_processes_give_the_same_records(tmp_path, lines, script):
    """Through Beam's job service, where all is pickled and sent; nothing is shared."""
    talk = ({"chat_id": str(n), "user_id": "u", "text": "late!"} for n in range(5))
    source = lines(*talk, *SAMPLES.read_bytes().splitlines(), b"rubbish")
    happy = {"task": "analysis", "match": "(?i)thank", "answer": {"sentiment": 1, "summary": "x"}}
    model = script({"chat_id": "flight-lost-bag", "error": "overloaded"}, happy, ANGRY, APOLOGY)
    made = []
    for number, flags in enumerate(([], job_service(sys.executable))):
        output = tmp_path / str(number)
        options = Options(input=source, output=str(output), model=model)
        assert execute(options, flags).lost == 0
        made.append({kind: sorted(map(timeless, read(output, kind))) for kind in KINDS})
    assert made[0] == made[1]
    assert [len(made[0][kind]) for kind in KINDS] == [57, 40, 2]


def timeless(record):
    """A record without the time at which it was made."""
    kept = {k: v for k, v in record.items() if k not in ("analysed_at", "drafted_at", "failed_at")}
    return json.dumps(kept, sort_keys=True)


class CountedHandler(ScriptedModelHandler):
    """Notes each load of the model in a file."""

    def __init__(self, path: str):
        LanguageModelHandler.__init__(
            self, "counted", Batching(max_batch_size=2, max_batch_duration_secs=0), ONE_COPY
        )
        self.function, self.path = answer_any, path

    def load_model(self):
        with open(self.path, "a") as file:
            file.write("loaded\n")
        return super().load_model()


@pytest.mark.slow
def test_one_copy_of_the_weights_serves_both_steps(tmp_path, analysis_prompt, draft_prompt):
    model = Model(CountedHandler(str(tmp_path / "loads")))
    flags = beam_options(["--direct_num_workers=3", "--direct_running_mode=multi_threading"])
    with beam.Pipeline(options=flags) as pipeline:
        chats = pipeline | beam.Create([chat("late!", chat_id=str(i)) for i in range(20)])
        analysed = chats | AnalyseChats(model, analysis_prompt)
        drafted = analysed.analysed | DraftApologies(model, draft_prompt)
        assert_that(drafted.drafts | beam.combiners.Count.Globally(), equal_to([20]))
    assert (tmp_path / "loads").read_text() == "loaded\n"
    model.forget()
    assert not list(Path(tempfile.gettempdir()).glob(f"{model.identifier}*"))


# The command line.


@pytest.mark.slow
def test_run_prints_the_counts_as_the_last_line(tmp_path, lines, script, capsys):
    flags = ["--output", f"{tmp_path}/out", "--model", script(ANGRY, APOLOGY), "--summary=json"]
    assert main(["run", "--input", lines(chat("late!"), "rubbish"), *flags]) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["analysed"], counts["drafted"], counts["dead_letters"]) == (1, 1, 1)
    assert counts["files"]["analyses"] == glob.glob(f"{tmp_path}/out/analyses*.jsonl")


@pytest.mark.slow
def test_run_prints_a_table_of_chats_and_counts(tmp_path, lines, script, capsys):
    escape = chat("late! \x1b[31m[bold]red[/bold]", chat_id="x\x1b[1m")
    flags = ["--output", f"{tmp_path}/out", "--model", script(ANGRY, APOLOGY)]
    assert main(["run", "--input", lines(escape), *flags]) == 0
    printed = capsys.readouterr().out
    for text in (
        "-1 angry",
        "The parcel is late.",
        "We are sorry that",
        "1 chats",
        "analyses-00000",
    ):
        assert text in printed
    assert "\x1b" not in printed


@pytest.mark.slow
def test_a_flag_stands_in_the_table_and_the_counts(tmp_path, lines, script, capsys):
    source = lines(chat("late!", chat_id="1"), chat("worse!", chat_id="2"))
    fault = {"chat_id": "2", "task": "apology", "answer": "It is your fault."}
    flags = ["--output", f"{tmp_path}/out", "--model", script(fault, ANGRY, APOLOGY)]
    refused = refusing("your fault", tmp_path)
    assert main(["run", "--input", source, "--prompts", refused, *flags]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "⚑ refused phrase: no draft," in printed
    assert "1 of 2 angry users; flagged: refused phrase 1" in printed
    assert "your fault" not in printed
    assert "lost 0" in printed


@pytest.mark.slow
def test_an_empty_file_gives_empty_results(tmp_path, lines, script, capsys):
    flags = ["--output", f"{tmp_path}/out", "--model", script(ANGRY), "--summary=json"]
    assert main(["run", "--input", lines(), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["lines_read"] == 0
    assert glob.glob(f"{tmp_path}/out/analyses*.jsonl")


@pytest.mark.slow
def test_results_of_an_earlier_run_are_replaced_and_other_files_stay(tmp_path, lines, script):
    out = tmp_path / "out"
    out.mkdir()
    (out / "analyses-00003-of-00007.jsonl").write_text('{"old": 1}\n')
    (out / "analyses.jsonl").write_text("mine\n")
    run(lines(chat("late!")), out, script(ANGRY, APOLOGY))
    assert len(read(out, "analyses")) == 1
    assert (out / "analyses.jsonl").read_text() == "mine\n"


@pytest.mark.slow
def test_beam_options_are_passed_through(tmp_path, lines, script):
    flags = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    source = lines(*(chat("late!", chat_id=str(i)) for i in range(9)))
    options = Options(input=source, output=f"{tmp_path}/out", model=script(ANGRY, APOLOGY))
    assert execute(options, flags).to_dict()["analysed"] == 9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["walk"], "walk"),
        (["run"], "--input is missing"),
        (["run", "--input=IN", "--model=SCRIPT"], "--output is missing"),
        (["run", "--input=/none/*.jsonl", "--output=OUT"], "no file matches '/none/*.jsonl'"),
        (["run", "--input=EMPTY", "--output=OUT"], "looked for .jsonl, .json, "),
        (["run", "--input=IN", "--output=/proc/none"], "--output: '/proc/none' cannot be written"),
        (["run", "--input=IN", "--output=OUT", "--model=nope"], "unknown model 'nope'"),
        (["run", "--input=IN", "--output=OUT", "--model=EMPTY"], "has no config.json"),
        (["run", "--input=IN", "--output=OUT", "--model=scripted:/none"], "cannot be read"),
        (["run", "--input=IN", "--output=OUT", "--inference=cloud"], "--inference"),
        (["run", "--input=IN", "--output=OUT", "--max_prompt_tokens=3"], "at least 64"),
        (["run", "--input=IN", "--output=OUT", "--max_batch_size=many"], "--max_batch_size"),
        (["run", "--input=IN", "--output=OUT", "--prompts=EMPTY"], "has no analysis.jinja"),
        (["run", "--input=IN", "--output=OUT", "--promts=x"], "did you mean --prompts?"),
        (["run", "--input=IN", "--output=OUT", "--model=SCRIPT", "--runner=DataflowRunner"],
         "Missing required option: project"),
        (["run", "--input=IN", "--output=OUT", "--model=SCRIPT", "--runner=NoRunner"], "NoRunner"),
        (["run", "--input=IN", "--output=OUT", "more"], "unexpected argument 'more'"),
        (["run", "--input=IN", "--output=OUT", "--min_ram=lots"], "--min_ram=lots"),
        (["run", "--input=IN", "--output=OUT", "--model_copies=2", "--large_model=false"],
         "--model_copies: only with --large_model=true"),
        (["run", "--input=IN", "--output=OUT", "--quantization=int3"], "--quantization"),
        (["evaluate", "/none.jsonl"], "cannot be read"),
        (["evaluate", "IN"], "has no chat with a label"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    tmp_path, lines, script, capsys, arguments, says
):
    (tmp_path / "empty").mkdir()
    model = script(ANGRY, APOLOGY)
    places = {
        "IN": lines(chat("x")),
        "SCRIPT": model,
        "EMPTY": f"{tmp_path}/empty",
        "OUT": f"{tmp_path}/out",
    }
    assert says in mistake(arguments, places, capsys)


def test_an_output_that_holds_the_input_is_refused(tmp_path, lines, script, capsys):
    source = lines(chat("x"), name="dead_letters-00000-of-00001.jsonl")
    flags = ["--output", str(tmp_path), "--model", script(ANGRY)]
    assert main(["replay", "--input", source, *flags]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert Path(source).exists()


@pytest.mark.slow
def test_a_pipeline_that_fails_says_why_and_exits_with_1(tmp_path, lines, script, capsys):
    model = tmp_path / "preset"
    model.mkdir()
    (model / "config.json").write_text("{}")
    flags = ["--output", f"{tmp_path}/out", "--model", str(model)]
    with earlier_results_stay(tmp_path / "out"), pytest.raises(SystemExit) as caught:
        main(["run", "--input", lines(chat("x")), *flags])
    assert caught.value.code == 1
    assert "the pipeline failed" in capsys.readouterr().err


@contextlib.contextmanager
def earlier_results_stay(out):
    """Puts results of an earlier run into a folder; nothing else is there afterwards."""
    out.mkdir()
    old = {
        "analyses-00000-of-00002.jsonl": '{"old": 1}\n',
        "analyses-00001-of-00002.jsonl": "",
        "drafts-00000-of-00001.jsonl": '{"old": 2}\n',
        "manifest.json": '{"versions": {"chatflow": "0"}}',
    }
    for name, text in old.items():
        (out / name).write_text(text)
    yield
    assert texts_in(out) == old


def texts_in(out):
    texts = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
    assert texts.pop(".chatflow-lock")
    assert not [path for path in out.iterdir() if path.is_dir()]
    return texts


@contextlib.contextmanager
def stalled(warm, source, model, out):
    """A run in another process, while its model is answering."""
    flags = ["--output", str(out), "--model", model, "--max_batch_size=1"]
    with warm.start("-m", "chatflow", "run", "--input", source, *flags) as process:
        for line in process.stderr:
            if "analyses 0 of 1" in line:
                break
        yield process


STALLS = {"stall_seconds": 60, "answer": "x"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_an_interrupt_ends_a_run_with_130_and_earlier_results_stay(
    tmp_path, lines, script, number, warm
):
    out = tmp_path / "out"
    with earlier_results_stay(out):
        with stalled(warm, lines(chat("x")), script(STALLS), out) as process:
            process.send_signal(number)
            assert process.stderr.read() == "chatflow: interrupted\n"
        assert process.returncode == 130


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_a_killed_run_is_cleared_up(
    tmp_path, lines, script, capsys, warm
):
    source, out = lines(chat("late!")), tmp_path / "out"
    with earlier_results_stay(out):
        with stalled(warm, source, script(STALLS), out) as process:
            again = ["run", "--input", source, "--output", str(out), "--summary=json", "--model"]
            assert main([*again, script(ANGRY, APOLOGY)]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert f"is in use by another run (process {process.pid} on " in error
            process.kill()
            process.wait()
        (staged,) = out.glob(".chatflow-new-*")
        assert main([*again, "scripted:/none"]) == 2  # found before the folder is looked at
        assert staged.exists()
        with pytest.raises(SystemExit):
            main([*again, failing(tmp_path)])
    assert main([*again, script(ANGRY, APOLOGY)]) == 0
    assert set(texts_in(out)) == {
        "analyses-00000-of-00001.jsonl", "drafts-00000-of-00001.jsonl",
        "dead_letters-00000-of-00001.jsonl", "manifest.json",
    }  # fmt: skip


def failing(folder):
    """A model that is found and then cannot be loaded."""
    (folder / "preset").mkdir()
    (folder / "preset" / "config.json").write_text("{}")
    return str(folder / "preset")


KILLED_WHILE_MOVING = """
import os, signal, sys
from chatflow.cli import main
from chatflow.sinks import staging
move, left = staging.move, [int(sys.argv.pop(1))]
def killed(source, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    move(source, target)
staging.move = killed
main()
"""


@pytest.mark.parametrize("moved", [0, 1, 3])
@pytest.mark.slow
def test_a_run_killed_while_its_files_are_moved_is_finished_by_the_next(
    tmp_path, lines, script, moved, capsys, warm
):
    """The next one fails, and so leaves the results of the killed one."""
    source, out = lines(chat("late!", chat_id="new")), tmp_path / "out"
    out.mkdir()
    (out / "analyses-00000-of-00001.jsonl").write_text('{"chat_id": "old"}\n')
    (out / "drafts-00001-of-00002.jsonl").write_text('{"chat_id": "old"}\n')
    flags = ["run", "--input", source, "--output", str(out), "--model"]
    killed = warm.run("-c", KILLED_WHILE_MOVING, str(moved), *flags, script(ANGRY, APOLOGY))
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(SystemExit):
        main([*flags, failing(tmp_path)])
    assert "put 4 files of a run" in capsys.readouterr().err
    assert [found["chat_id"] for found in read(out, "analyses")] == ["new"]
    assert [found["chat_id"] for found in read(out, "drafts")] == ["new"]
    assert len(texts_in(out)) == 4


@pytest.mark.slow
def test_a_manifest_says_what_a_run_read_and_wrote(tmp_path, lines, script):
    source, out = lines(chat("late!"), "rubbish"), tmp_path / "out"
    drafts = f"{tmp_path}/elsewhere/d"
    counts = run(source, out, script(ANGRY, APOLOGY), drafts=drafts)
    manifest = json.loads((out / "manifest.json").read_text())
    other = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())
    assert [(r["path"], r["records"]) for r in manifest["results"]] == [
        ("analyses-00000-of-00001.jsonl", 1), ("dead_letters-00000-of-00001.jsonl", 1),
    ]  # fmt: skip
    assert [(r["path"], r["records"]) for r in other["results"]] == [("d-00000-of-00001.jsonl", 1)]
    for folder, found in ((out, manifest), (tmp_path / "elsewhere", other)):
        for result in found.pop("results"):
            content = (folder / result["path"]).read_bytes()
            assert result["bytes"] == len(content)
            assert result["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest == other
    assert manifest["started"] < manifest["finished"]
    assert counts.pop("files")["drafts"] == [f"{drafts}-00000-of-00001.jsonl"]
    assert manifest["counts"] == counts
    assert manifest["versions"] == {"chatflow": __version__, "apache_beam": beam.__version__}
    (model,) = manifest["models"]
    (analysis,) = read(out, "analyses")
    assert model["analysis_prompt"] == analysis["prompt_version"]
    assert f"--drafts={drafts}" in manifest["flags"]
    (read_file,) = manifest["inputs"]
    assert read_file["sha256"] == hashlib.sha256(Path(source).read_bytes()).hexdigest()


@pytest.mark.parametrize("where", ["/proc/none", "a file"])
def test_an_output_that_cannot_be_written_is_found_before_the_model_is_fetched(
    tmp_path, lines, script, monkeypatch, capsys, where
):
    monkeypatch.setattr("chatflow.models.spec.Kind.prepare", lambda *_: pytest.fail("was fetched"))
    (tmp_path / "a file").write_text("x")
    monkeypatch.chdir(tmp_path)
    flags = ["--output", where, "--model", script(ANGRY)]
    assert main(["run", "--input", lines(chat("x")), *flags]) == 2
    assert f"--output: '{Path(where).absolute()}' cannot be written" in capsys.readouterr().err
