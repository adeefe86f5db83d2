"""Checks that docstrings, comments and Markdown pages are plain English: part of `make lint`.

Text in backticks, double quotes and code blocks is not checked. CONTRIBUTING.md explains the rules.
`python docs/prose.py FILE…` checks some files. Old text has a number of findings that each file may
still have (`prose-baseline.json`); `--shrink` lowers these numbers to what a file has now.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BASELINE = Path(__file__).parent / "prose-baseline.json"

MOST_WORDS = 40
"""The most words of a sentence."""

_VERBS = "is|are|was|were|has|have|does|did|can|cannot|could|may|must|will|would"
_RULES = {
    r"(, for|\bFor) (it|they|there|he|she|we|nobody|nothing)\b(?! (who|that)\b)"
    rf"|, for ((?!(?:that|which|who|whose|where|what)\b)[\w'’-]+ ){{1,3}}({_VERBS})\b": (
        "write 'because'"
    ),
    r"(?<![Tt]here )\b(is|are|was|were) no (?!longer\b|more than\b|less than\b)\w": (
        "write 'is not a …' or 'has no …'"
    ),
    r"\bso (long|many)\b(?! as\b)": "say how long or how many",
    r"\b[Gg]ives\b(?! up\b)": "write 'returns', 'passes' or 'shows'",
    r"\bwhat is there\b": "name the thing",
    r"\bas yet\b": "write 'yet' or 'so far'",
    r"\bof its own\b": "write 'its own …', 'a separate …' or leave it out",
    r"\bby which\b": "write 'with which', 'that …' or two sentences",
    r"\bthat which\b": "write 'what', or name the thing",
    r"\bdivided by (commas|spaces|blanks)\b": "write 'separate … with'",
    r"\b(no|not any|never any) more(?=[.,;:)]|$)": "write 'no longer', before the verb",
    r"\b(whatsoever|thereof|therein|whereby|hereby|herein|thereby)\b": "use the usual word",
    r"\b(utilize|utilise|leverage|in order to)s?\b": "use the shorter word",
}
RULES = tuple((re.compile(pattern), remedy) for pattern, remedy in _RULES.items())
"""What is not written, and the remedy."""

_NOT_VERBS = frozenset("This Its His As Always Perhaps Sometimes Thus Plus Yes Unless Less".split())
_NOT_PROSE = re.compile(r"#\s*(noqa|type:|fmt:|pragma|!|checkov|shellcheck|syntax=)")
_UNREAD = re.compile(r"``.*?``|`[^`]*`|\"[^\"]*\"|“[^”]*”|https?://[^\s)>]*[^\s)>.,;:]", re.DOTALL)
_NAMES = re.compile(r"X(?:, X){3,}")  # a list of names is not read as a sentence is
_SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)[\"')*]*\s+")
_ITEM = re.compile(r"\s*([-*+]|\d+\.)\s|\s*[\w`,. *]+: |\s*>>> |\s*\|")


class Finding(NamedTuple):
    """Where a text breaks a rule, the words, and what to do."""

    path: str
    line: int
    words: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: '{self.words}': {self.remedy}"


class Block(NamedTuple):
    """A paragraph, and the line on which it begins."""

    line: int
    text: str


def check_file(path: str, text: str) -> list[Finding]:
    """Returns what breaks a rule in a Python file or a Markdown page, in the order of lines."""
    if path.endswith(".md"):
        found = list(_check_blocks(path, markdown_blocks(text)))
    else:
        found = [
            *_check_blocks(path, comment_blocks(text)),
            *_check_docstrings(path, text, verbs=not path.startswith("tests/")),
        ]
    return sorted(found, key=lambda finding: finding.line)


def _check_blocks(path: str, blocks: Iterator[Block]) -> Iterator[Finding]:
    for line, text in blocks:
        plain = _UNREAD.sub(lambda found: "X" + "\n" * found[0].count("\n"), text)
        plain = _NAMES.sub("X", plain)
        for pattern, remedy in RULES:
            for found in pattern.finditer(plain.replace("\n", " ")):
                at = line + plain[: found.start()].count("\n")
                yield Finding(path, at, found[0].strip(), remedy)
        start = 0
        for sentence in _SENTENCE.split(plain):
            start = plain.index(sentence, start)
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > MOST_WORDS:
                remedy = f"a sentence of {len(words)} words; write at most {MOST_WORDS}"
                at = line + plain[:start].count("\n")
                yield Finding(path, at, " ".join(words[:4]) + " …", remedy)


def _check_docstrings(path: str, text: str, verbs: bool) -> Iterator[Finding]:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(said := node.value.value, str):
                head, _, rest = said.partition("\n")
                said = f"{head}\n{textwrap.dedent(rest)}"
                yield from _check_blocks(path, _paragraphs(said, node.lineno))
        elif verbs and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            said = ast.get_docstring(node) or ""
            first = re.match(r"[A-Za-z]*", said)[0]  # type: ignore[index]
            if said and not _is_property(node) and not _is_third_person(first):
                remedy = "begin with a verb in the third person, such as 'Returns'"
                yield Finding(path, node.body[0].lineno, said.split("\n")[0][:40], remedy)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_third_person(word: str) -> bool:
    return word.endswith("s") and word[:1].isupper() and word not in _NOT_VERBS


def comment_blocks(text: str) -> Iterator[Block]:
    """Yields the comments of a Python file; lines of comments that follow each other are one."""
    kept: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__):
        if token.type != tokenize.COMMENT or _NOT_PROSE.match(token.string):
            continue
        line = token.start[0]
        alone = not token.line[: token.start[1]].strip()
        if kept and not (alone and line == last + 1):
            yield Block(first, "\n".join(kept))
            kept = []
        if not kept:
            first = line
        kept.append(token.string.lstrip("# "))
        last = line if alone else 0
    if kept:
        yield Block(first, "\n".join(kept))


def markdown_blocks(text: str) -> Iterator[Block]:
    """Yields the paragraphs, list items and table cells of a page, without code blocks."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = re.sub(r"^ *(```|~~~).*?^ *\1[^\n]*$", blank, text, flags=re.DOTALL | re.MULTILINE)
    made = r"<!-- ([a-z]+): (?:made|written) .*?<!-- end of \1 -->"  # of the code's own words
    text = re.sub(rf"{made}|<!--.*?-->", blank, text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", text)
    return _paragraphs(text, 1)


def _paragraphs(text: str, line: int) -> Iterator[Block]:
    """Yields the paragraphs and list items, without what is indented by four as code."""
    kept: list[str] = []
    first, code, blank = line, False, False
    for number, row in enumerate([*text.split("\n"), ""], line):
        code = row.startswith("    ") and (code or blank)
        blank = not row.strip()
        if code:
            row = ""
        if not row.strip() or row.startswith("#") or _ITEM.match(row):
            if kept:
                yield Block(first, "\n".join(kept))
            kept = []
        if row.lstrip().startswith("|"):
            for cell in re.split(r"(?<!\\)\|", row):
                yield Block(number, cell.strip())
        elif row.lstrip().startswith(">>>"):
            continue
        elif row.strip():
            if not kept:
                first = number
            kept.append(row.strip())


def files() -> list[str]:
    """Returns the Python files and pages that git knows, or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", "*.py", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(path for path in set(done.stdout.splitlines()) if (ROOT / path).is_file())


def judge(found: Sequence[Finding], allowed: dict[str, int]) -> list[str]:
    """Returns what to complain of: too many findings in a file, or fewer than its number says."""
    counts = Counter(finding.path for finding in found)
    said = [
        str(finding) for finding in found if counts[finding.path] > allowed.get(finding.path, 0)
    ]
    for path, most in allowed.items():
        if counts[path] < most:
            said.append(f"{path}: {most} findings are allowed, {counts[path]} are left; "
                        "run python docs/prose.py --shrink")  # fmt: skip
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is to be mended, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="files to check; default: all, with the baseline")
    parser.add_argument("--shrink", action="store_true", help="lower the baseline's numbers")
    flags = parser.parse_args(arguments)
    paths = flags.files or files()
    found = [f for path in paths for f in check_file(path, (ROOT / path).read_text("utf-8"))]
    allowed = json.loads(BASELINE.read_text()) if BASELINE.exists() and not flags.files else {}
    if flags.shrink:
        counts = Counter(finding.path for finding in found)
        allowed = {p: min(most, counts[p]) for p, most in allowed.items() if counts[p]}
        BASELINE.write_text(json.dumps(allowed, indent=1, sort_keys=True) + "\n")
    said = judge(found, allowed)
    print("\n".join(said) or f"prose: {len(paths)} files checked")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
