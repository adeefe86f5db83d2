"""The commands on the site's pages do what the pages say: each block marked `sh` is run."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES
from generate import DOCS, README

PAGES = sorted(DOCS.rglob("*.md"))


def blocks_of(page):
    """Returns the commands of a page: why they are not run, or "", and what the shell gets."""
    found = re.findall(
        r"^(?:[ ]*<!-- not run: (.+?) -->\n+)?([ ]*)```sh\n(.*?)^\2```$",
        page.read_text(), re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    return [(reason, textwrap.dedent(commands)) for reason, _, commands in found]


def is_run(page):
    return any(not reason for reason, _ in blocks_of(page))


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_all_commands_of_a_page_are_run_or_say_why_not(page):
    text = page.read_text()
    blocks = blocks_of(page)
    assert len(blocks) == len(re.findall(r"^ *```sh$", text, re.MULTILINE))
    assert len([1 for reason, _ in blocks if reason]) == text.count("<!-- not run: ")
    assert not re.findall(r"^ *```(?:bash|shell|console|zsh|sh .*)$", text, re.MULTILINE)


INSTALLED = "your-chats.md"
"""The page whose commands start as users start them; the other pages' come from a warm process."""


@pytest.mark.slow
@pytest.mark.gemma
@pytest.mark.parametrize("page", filter(is_run, PAGES), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, request):
    """Word for word, in one shell, in a folder with nothing but the samples."""
    folder, script = tmp_path / "folder", tmp_path / "commands.sh"
    shutil.copytree(SAMPLES.parent, folder / "samples")
    script.write_text("".join(commands for reason, commands in blocks_of(page) if not reason))
    installed = Path(sys.executable).parent
    warm = page.name != INSTALLED
    first = request.getfixturevalue("warm").folder if warm else installed
    path = os.pathsep.join([str(first), str(installed), os.environ["PATH"]])
    shell = subprocess.Popen(
        ["bash", "-e", "-v", "-o", "pipefail", str(script)],
        cwd=folder, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = shell.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it left in the background
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said[-5000:]
