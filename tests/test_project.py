"""The project's files: workflows, templates, the citation and the changelog fit the code."""

import re
import subprocess

import pytest
import yaml
from conftest import ROOT

from chatflow import __version__

GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: path for path in (GITHUB / "workflows").glob("*.yml")}
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def jobs_of(name):
    return yaml.safe_load(WORKFLOWS[name].read_text())["jobs"]


def steps_of(name):
    return [step for job in jobs_of(name).values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_a_full_version_and_no_token_is_kept(name):
    for step in steps_of(name):
        action, _, version = step.get("uses", "none@v0.0.0").partition("@")
        assert re.fullmatch(r"v\d+\.\d+\.\d+", version), action
        if action == "actions/checkout":
            assert step["with"]["persist-credentials"] is False
    assert yaml.safe_load(WORKFLOWS[name].read_text())["permissions"] == {}
    assert all("timeout-minutes" in job for job in jobs_of(name).values())


def test_ci_runs_what_developers_run():
    commands = [step.get("run") for step in steps_of("ci")]
    assert ".ci/run" in commands
    assert "make audit" in commands


def test_a_release_builds_images_that_the_dockerfiles_have():
    job = jobs_of("release")["images"]
    builds = [step["with"] for step in job["steps"] if "build-push-action" in step.get("uses", "")]
    for build in builds:
        targets = re.findall(r" AS (\w+)", (ROOT / build["file"]).read_text())
        matrix = job["strategy"]["matrix"]["include"]
        asked = [build["target"]] if "{" not in build["target"] else [m["target"] for m in matrix]
        assert set(asked) <= set(targets)
    locks = {f"requirements-{m['variant'].removesuffix('-gpu')}.lock" for m in matrix}
    assert locks == {path.name for path in (ROOT / "infra" / "docker").glob("*.lock")}


def test_a_release_takes_its_notes_from_the_changelog(tmp_path):
    (script,) = (s["run"] for s in jobs_of("release")["page"]["steps"] if "awk" in s.get("run", ""))
    (tmp_path / "CHANGELOG.md").write_text((ROOT / "CHANGELOG.md").read_text())

    def run(tag):
        environment = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        command = ["bash", "-eu", "-c", script]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert run(f"v{__version__}").returncode == 0
    notes = (tmp_path / "notes.md").read_text()
    assert notes.startswith(f"## {__version__} – ")
    assert len(re.findall("^## ", notes, re.MULTILINE)) == 1
    missing = run("v999.0.0")
    assert missing.returncode == 1
    assert "CHANGELOG.md has no section of v999.0.0" in missing.stdout


def test_a_release_is_refused_if_the_tag_is_not_the_version():
    steps = jobs_of("release")["wheel"]["steps"]
    (script,) = (step["run"] for step in steps if "GITHUB_REF_NAME" in step.get("run", ""))
    for tag, code in ((f"v{__version__}", 0), ("v999.0.0", 1)):
        done = subprocess.run(
            ["bash", "-eu", "-c", script], cwd=ROOT,
            env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stdout


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {__version__} – {citation['date-released']}\n" in changelog


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_whole(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in asked} <= {"input", "textarea", "dropdown", "checkboxes"}
    ids = [field["id"] for field in asked]
    assert len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") for field in asked)
    assert all(field["attributes"]["label"] for field in asked)
