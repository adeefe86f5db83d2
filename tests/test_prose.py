"""docs/prose.py: what it finds in docstrings, comments and pages, and what it leaves alone."""

import json

import prose
import pytest
from prose import check_file, files, judge, main


def found(text, path="x.md"):
    return [(finding.line, finding.words) for finding in check_file(path, text)]


def documented(docstring, kind="def run():"):
    return f'{kind}\n    """{docstring}"""\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It waits, for it may be late.", ", for it"),
        ("They wait, for the service is away.", ", for the service is"),
        ("A webhook is no chat.", "is no c"),
        ("It is kept so long.", "so long"),
        ("This gives a list.", "gives"),
        ("It reads what is there.", "what is there"),
        ("Nothing is known as yet.", "as yet"),
        ("Each has a room of its own.", "of its own"),
        ("The key by which it is signed.", "by which"),
        ("It keeps that which came.", "that which"),
        ("Several are divided by commas.", "divided by commas"),
        ("You are signed in no more, and see nothing.", "no more"),
    ],
)
def test_a_forbidden_construction_is_found_everywhere(text, words):
    assert found(f"# Title\n\n{text}\n") == [(3, words)]
    assert found(f"| a | {text} |\n") == [(1, words)]
    assert found(f"x = 1  # {text}\n", "x.py") == [(1, words)]
    assert found(documented(f"Returns one.\n\n    {text}\n    "), "x.py") == [(4, words)]


@pytest.mark.parametrize(
    "text",
    [
        "It waits for it, for two minutes, for models that are large, and for the first time.",
        "There is no such file; it is no longer read, so long as it is no more than 3 MB.",
        "It gives up after three tries.",
        "Write 'because', not \"for it is\"; `so long` is code.",
        "```\nso long, for it is no file\n```",
        "<!-- so long -->",
        "    so long = 1",
    ],
)
def test_usual_english_quotations_and_code_are_left_alone(text):
    assert found(f"# Title\n\n{text}\n") == []


def test_a_part_of_a_page_that_is_made_from_code_is_left_alone():
    made = "<!-- flags: made from x -->\nIt is no chat.\n<!-- end of flags -->"
    assert found(f"{made}\n\nIt is no chat.\n") == [(5, "is no c")]


def test_words_are_found_across_lines_and_their_line_is_named():
    assert found("One line.\nIt is kept so\nlong.\n") == [(2, "so long")]
    assert found("x = 1\n# It is kept so\n# long.\ny = 2\n", "x.py") == [(2, "so long")]


def test_a_long_sentence_is_found_where_it_begins():
    long = " ".join(["word"] * 41) + "."
    assert found(f"Short.\nShort, too. L{long}\n") == [(2, "Lword word word word …")]
    assert found(" ".join(["word"] * 40) + ".\n") == []
    assert found("- one\n" * 50 + "\n" + "| two " * 50 + "|\n") == []


@pytest.mark.parametrize(
    ("docstring", "kind", "is_fine"),
    [
        ("Returns a list.", "def run():", True),
        ("Whether it runs.", "def run():", False),
        ("Return a list.", "def run():", False),
        ("This returns a list.", "async def run():", False),
        ("The name of the model.", "@property\ndef name():", True),
        ("A list of chats.", "class Chats:", True),
    ],
)
def test_a_function_begins_with_a_verb_in_the_third_person(docstring, kind, is_fine):
    text = documented(docstring, kind)
    assert bool(found(text, "chatflow/x.py")) is not is_fine
    assert found(text, "tests/x.py") == []


def test_a_file_may_have_as_many_findings_as_the_baseline_says_and_not_more():
    findings = check_file("a.md", "It is so long.\n\nIt is so many.\n")
    assert judge(findings, {"a.md": 2}) == []
    assert judge(findings, {"a.md": 1}) == [str(finding) for finding in findings]
    assert judge(findings, {"b.md": 2, "a.md": 2}) == [
        "b.md: 2 findings are allowed, 0 are left; run python docs/prose.py --shrink"
    ]


@pytest.fixture
def house(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    monkeypatch.setattr(prose, "BASELINE", tmp_path / "prose-baseline.json")
    monkeypatch.setattr(prose, "files", lambda: sorted(p.name for p in tmp_path.glob("*.md")))
    return tmp_path


def test_the_baseline_can_only_shrink(house, capsys):
    (house / "a.md").write_text("It is so long.\n")
    (house / "new.md").write_text("A chat is no file.\n")
    baseline = house / "prose-baseline.json"
    baseline.write_text(json.dumps({"a.md": 3, "gone.md": 1}))
    assert main(["--shrink"]) == 1
    assert json.loads(baseline.read_text()) == {"a.md": 1}
    assert capsys.readouterr().out == ("new.md:1: 'is no f': write 'is not a …' or 'has no …'\n")
    (house / "new.md").write_text("A chat is not a file.\n")
    assert main([]) == 0
    assert main(["a.md"]) == 1  # a file that is named is checked in full


def test_every_page_and_source_file_is_checked():
    assert {"README.md", "docs/prose.py", "chatflow/cli.py", "tests/test_prose.py"} <= {*files()}
