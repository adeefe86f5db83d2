"""Builds the documentation site into out/site; a broken link or anchor is an error.

A page may link to a file of the repository as on GitHub, e.g. `../../bench/README.md`. Such a file
becomes part of the site, in its folder `repository`.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ROOT / "out" / "pages"
SITE = ROOT / "out" / "site"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:)([^)\s#]+)(?=[)#])")
"""The target of a relative link, without its anchor."""


def stage(folder: Path) -> None:
    """Writes the pages of docs/ to a folder, with the files elsewhere that they link to."""
    shutil.rmtree(folder, ignore_errors=True)
    waiting = [path for path in sorted(DOCS.rglob("*")) if path.suffix in PUBLISHED]
    staged = set()
    while waiting:
        path = waiting.pop()
        if path in staged:
            continue
        staged.add(path)
        place = folder / place_of(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copy(path, place)
            continue
        text = path.read_text()
        targets = [Path(os.path.normpath(path.parent / link)) for link in LINK.findall(text)]
        waiting += [target for target in targets if target.is_file()]
        place.write_text(LINK.sub(functools.partial(_moved, path), text))


PUBLISHED = (".css", ".md", ".png", ".txt")


def place_of(path: Path) -> str:
    """Returns where a file of the repository is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{os.path.relpath(path, ROOT)}"


def _moved(page: Path, link: re.Match[str]) -> str:
    target = place_of(Path(os.path.normpath(page.parent / link[0])))
    return os.path.relpath(target, os.path.dirname(place_of(page)) or ".")


def build() -> int:
    """Builds the site from the pages; returns the exit code."""
    stage(PAGES)
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = COLOURS.sub("", done.stdout).partition("Traceback ")[0]
    print("\n".join(line[:160] for line in said.splitlines()))  # a table's line may be long
    if done.returncode:
        print(f"the site has warnings, with lines of {PAGES.relative_to(ROOT)}", file=sys.stderr)
        return done.returncode
    for page in PAGES.rglob("*.md"):  # llms.txt links to them
        shutil.copy(page, SITE / page.relative_to(PAGES))
    return 0


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


if __name__ == "__main__":
    sys.exit(build())
