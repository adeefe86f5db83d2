"""What the README, the site and the package promise, and what docs/generate.py makes, is there."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, required
from generate import DOCS, README, TABLES, generated
from make_site import PAGES, SITE

import chatflow
from chatflow.options import Options
from chatflow.running.runner import LOCAL_RUNNER
from chatflow.running.summary import Summary

MADE = generated()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_generated_files_are_those_of_the_code(path):
    assert path.read_text() == MADE[path], "run `make docs`"


def test_each_generated_table_is_on_a_page():
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert not [name for name in TABLES if f"<!-- {name}: " not in text]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [link for link in links if not (ROOT / link).exists()]


SITE_PAGES = sorted(DOCS.rglob("*.md"))


def test_all_pages_are_in_the_navigation_and_in_llms_txt():
    pages = {path.relative_to(DOCS).as_posix() for path in SITE_PAGES}
    nav = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(pages)
    assert {*re.findall(r"\]\((.*?)\): \S", (DOCS / "llms.txt").read_text())} == pages


@pytest.mark.slow
def test_the_site_has_no_broken_link_and_loads_nothing_from_elsewhere():
    done = subprocess.run(
        [sys.executable, str(DOCS / "make_site.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in SITE_PAGES:
        built = SITE / page.relative_to(DOCS).with_suffix(".html")
        loaded = re.findall(
            r"<(?:link|script|img)\b[^>]*?(?:href|src)=\"?(https?:[^\" >]*)", built.read_text()
        )
        assert not loaded, page
    for page in PAGES.rglob("*.md"):
        assert (SITE / page.relative_to(PAGES)).read_text() == page.read_text()


def test_the_reference_names_all_counters_reasons_and_keys_of_the_summary():
    text = (DOCS / "reference" / "metrics.md").read_text()
    named = {*re.findall(r"[a-z_]+(?:/[a-z_]+)*", text)}
    code = "".join(path.read_text() for path in (ROOT / "chatflow").rglob("*.py"))
    counters = re.findall(r"metrics\.(?:count|observe)\(\s*f?\"([a-z_/]+)", code)
    counters += re.findall(r"counts\[\"(input/[a-z_]+)", code)
    reasons = re.findall(r"(?:Input|Answer|Model|Element)Error\(\s*\"([a-z_]+)\"", code)
    reasons += re.findall(r"\bFault\(\s*(?:Kind\.\w+, )?\"([a-z_]+)\"", code)
    keys = Summary({}, {}, 1.0, {}).to_dict()
    assert len(counters) > 30
    assert len(reasons) > 30
    wanted = {name.rstrip("/") for name in (*counters, *reasons, *keys)}
    assert sorted(wanted - named) == []


@pytest.mark.slow
def test_the_example_of_the_python_page_runs(tmp_path):
    page = DOCS / "reference" / "python.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    code = code.replace("beam.Pipeline()", f"beam.Pipeline(runner={LOCAL_RUNNER!r})")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "example.py")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["summary"] == "All is well."


FACES = sorted(path.parent for path in (ROOT / "chatflow").rglob("__init__.pyi"))


@pytest.mark.parametrize("folder", FACES, ids=lambda folder: folder.name)
def test_the_names_of_each_face_are_there(folder):
    face = importlib.import_module(".".join(folder.relative_to(ROOT).parts))
    assert face.__all__
    for name in face.__all__:
        assert getattr(face, name) is not None
    assert len((folder / "__init__.py").read_text().splitlines()) <= 25


def test_a_name_that_is_not_public_is_not_there():
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = chatflow.nothing


def test_every_option_has_help_and_every_help_is_a_sentence():
    for name, flag in Options.defaults().items():
        assert flag["help"].endswith("."), name


def test_help_answers_at_once():
    """Nothing heavy is imported to print the help."""
    code = (
        "import sys; from chatflow.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'apache_beam', 'jax', 'keras', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in Options.defaults():
        assert f"--{flag}" in done.stdout


def test_python_m_chatflow_works():
    done = subprocess.run(
        [sys.executable, "-m", "chatflow", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("chatflow ")


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_environment_from_another_folder(tmp_path):
    """With the packages of the image for remote models, and nothing of this folder."""
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(built).namelist()
    assert not [name for name in names if name.startswith(("tests", "samples", "infra"))]
    assert {
        "chatflow/py.typed",
        "chatflow/__init__.pyi",
        "chatflow/prompts/base/analysis.jinja",
    } < {*names}

    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(uv).exists():
        required("uv", "pip install uv")
    python = tmp_path / "empty" / "bin" / "python"
    lock = str(ROOT / "infra" / "docker" / "requirements-remote.lock")
    install = [uv, "pip", "install", "-q", "--no-deps", "--python", str(python)]

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(uv, "venv", "-q", "--python", sys.executable, "empty")
    run(*install, "--require-hashes", "-r", lock)
    run(*install, built)
    rules = [
        {"task": "analysis", "answer": {"sentiment": -1, "summary": "It is late."}},
        {"task": "apology", "answer": "We are sorry that it is late."},
    ]
    (tmp_path / "script.jsonl").write_text("".join(json.dumps(rule) + "\n" for rule in rules))
    said = run(
        str(python.with_name("chatflow")), "run", "--input", str(SAMPLES), "--output", "out",
        "--model", "scripted:script.jsonl", "--summary", "json",
    )  # fmt: skip
    summary = json.loads(said)
    assert (summary["analysed"], summary["drafted"], summary["lost"]) == (53, 53, 0)
    run(str(python.with_name("chatflow")), "size", "--model", "gemma3_1b")


def test_the_samples_are_what_their_readme_says():
    from chatflow.records import load_object
    from chatflow.sources.chats import read_chat

    lines = (ROOT / "samples" / "chats.jsonl").read_bytes().splitlines()
    chats = [read_chat(load_object(line)) for line in lines]
    by_id = {chat.chat_id: chat for chat in chats}
    assert len(by_id) == len(chats) == 52
    assert len({chat.attributes["business"] for chat in chats}) == 13
    assert len(by_id["sixty-messages"].messages) == 60
    assert by_id["es-factura"].attributes["language"] == "es"
    assert by_id["emoji-only"].messages[0].text == "😡😡😡"
    assert "<start_of_turn>" in by_id["injection"].messages[2].text
    assert len(by_id["two-customers"].users()) == 2
