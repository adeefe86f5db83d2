"""Writes what is made from code: tables of pages, llms.txt, the template's metadata, table schemas.

A page says where a table goes: between `<!-- NAME: made from … -->` and `<!-- end of NAME -->`,
with a NAME of `TABLES`. `make docs` runs this file; a test compares the files with what `generated`
returns.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import chatflow
from chatflow import cli
from chatflow.choices.declared import choices_of
from chatflow.commands.model import info
from chatflow.commands.size import read_machines, size_of
from chatflow.errors import UsageError
from chatflow.options import GROUPS, Options, Parser, as_text
from chatflow.prompts.routes import FIELDS as ROUTE_FIELDS
from chatflow.prompts.templates import load_folder
from chatflow.records import (
    KINDS,
    Analysis,
    Chat,
    DeadLetter,
    Draft,
    FieldValue,
    FirstOpinion,
    Message,
    Quotation,
    RawChat,
    Record,
    Redaction,
    Reply,
    Response,
)
from chatflow.sinks.bigquery import columns
from chatflow.sinks.write import SCHEMES
from chatflow.sources.chats import ROLES
from chatflow.sources.formats import ALL
from chatflow.sources.formats import tables as tables_of_messages

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PLACE = re.compile(r"(<!-- ([a-z]+): .*? -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def generated() -> dict[Path, str]:
    """Returns by file what it should hold."""
    made = {name: table() for name, table in TABLES.items()}
    pages = {
        path: PLACE.sub(lambda place: f"{place[1]}{made[place[2]]}\n{place[3]}", text)
        for path in sorted(DOCS.rglob("*.md"))
        if PLACE.search(text := path.read_text())
    }
    pages[DOCS / "llms.txt"] = llms()
    metadata = {
        "name": "chatflow",
        "description": "Sentiment, summaries and apology drafts of support chats, by an LLM",
        "parameters": template_parameters(),
    }
    files = {INFRA / "terraform" / "schemas" / f"{k}.json": columns(v) for k, v in KINDS.items()}
    files[INFRA / "template" / "metadata.json"] = metadata
    texts = {
        path: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for path, value in files.items()
    }
    return {**pages, **texts}


# Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Returns a table; columns in `numbers` are flush right."""
    marks = ["---:" if column in {*numbers} else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def plain(text: str) -> str:
    """Returns a text in which only what stands between backticks is Markdown."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for at, part in enumerate(parts):
        part = part if at % 2 else re.sub(r"[*<]|\b_|_\b", r"\\\g<0>", part)
        parts[at] = part.replace("|", r"\|")
    return "".join(parts)


def code(text: Any) -> str:
    return f"`{text}`".replace("|", r"\|") if text != "" else ""


def codes(texts: Iterable[Any]) -> str:
    return ", ".join(map(code, texts))


# Flags and commands


def flags_tables() -> str:
    """Returns the flags of a pipeline, a table a group; each flag has its name as an anchor."""
    lines: list[str] = []
    for group in GROUPS:
        rows = [
            (f'<a id="{name}"></a>`--{name}`', code(as_text(flag["default"])), _meaning(flag))
            for name, flag in Options.defaults().items()
            if flag["group"] == group
        ]
        lines += [f"## {group.capitalize()}", "", table(("flag", "default", ""), rows), ""]
    return "\n".join(lines[:-1])


def _meaning(flag: Mapping[str, Any]) -> str:
    choices = f" One of {codes(flag['choices'])}." if flag["choices"] else ""
    return plain(flag["help"]) + choices


def commands_pages() -> str:
    """Returns a section a command: what it does, and its own flags."""
    return "\n\n".join(
        _command(f"chatflow {name}", module) for name, module in _modules("chatflow", cli.COMMANDS)
    )


def _modules(package: str, names: Iterable[str]) -> Iterator[tuple[str, types.ModuleType]]:
    """Yields the commands with the modules behind them, in order, subcommands after theirs."""
    base = "chatflow.commands" if package == "chatflow" else f"chatflow.commands.{package}"
    for name in names:
        module = importlib.import_module(f"{base}.{name.replace('-', '_')}")
        yield name if package == "chatflow" else f"{package} {name}", module
        yield from _modules(name, getattr(module, "COMMANDS", ()))


def _command(name: str, module: types.ModuleType) -> str:
    lines = [f"## {name}", "", _described(module.DESCRIPTION)]
    if hasattr(module, "COMMANDS"):
        return "\n".join([*lines, "", table(("command", ""), module.COMMANDS.items())])
    parser = Parser(prog=name, add_help=False)
    module.add_arguments(parser)
    groups = [group for group in parser._action_groups if group.title in GROUPS]
    of_all = [action.dest for group in groups for action in group._group_actions]
    own = [action for action in parser._actions if action.container not in groups]
    if own := [action for action in own if action.help != argparse.SUPPRESS]:
        lines += ["", table(("argument", "default", ""), map(_argument, own))]
    left_out = [name for name in Options.defaults() if name not in of_all]
    if len(of_all) > len(left_out):
        but = f" but {codes(f'--{name}' for name in left_out)}" if left_out else ""
        lines += ["", f"It also takes all [flags of a pipeline](flags.md){but}."]
    elif of_all:
        links = ", ".join(f"[`--{name}`](flags.md#{name})" for name in of_all)
        lines += ["", f"It also takes {links}, as a pipeline does."]
    if module.PASSES_FLAGS_ON:
        lines += ["", "All other flags are Beam's and go to the runner."]
    return "\n".join(lines)


def _described(description: str) -> str:
    """Returns a command's description: its paragraphs, and its examples as blocks."""
    found = []
    for part in re.split(r"\n\s*\n", textwrap.dedent(description).strip("\n")):
        if part.startswith("  ") or "{" in part:  # commands, or JSON
            found.append(f"```text\n{textwrap.dedent(part)}\n```")
        else:
            found.append(plain(part))
    return "\n\n".join(found)


def _argument(action: argparse.Action) -> tuple[str, str, str]:
    name = action.option_strings[0] if action.option_strings else str(action.metavar)
    has_default = action.option_strings and action.default not in (None, "", [])
    default = as_text(action.default) if has_default else ""
    help = re.sub(r"\s*\(default: (%\(default\)s|true|[\d.]+)\)", "", action.help or "")
    help = help.replace("%%", "%").rstrip(".")
    choices = f"One of {codes(action.choices)}." if action.choices else ""
    if not re.match(r"\w+:", help):  # a value and what it means
        help = help[:1].upper() + help[1:]
    meaning = f"{plain(help)}." if help else ""
    return code(name), code(default), f"{meaning} {choices}".strip()


# Records


RECORDS = (
    Message, Chat, Analysis, Draft, DeadLetter, Reply, Response,
    FieldValue, Quotation, FirstOpinion, Redaction, RawChat,
)  # fmt: skip

COMMON = {
    "chat_id": "The chat's id.",
    "user_id": "The user who wrote the message, whose tone is asked for, or whom a result is of.",
    "message_id": "The message's id; a second message of the same id is left out.",
    "sent_at": "When it was sent.",
    "attributes": "What else is known of it, e.g. `language` or `tenant`.",
    "messages": "What was said, in the order of time.",
    "revision": "Which state of the chat it is; the greater is the newer.",
    "analysis_id": "The id of the analysis, a hash of what it was made of.",
    "draft_id": "The id of the draft, a hash of what it was made of.",
    "reply_id": "The id of the reply; that of its draft.",
    "response_id": "The id of the response, a hash of what it was made of.",
    "sentiment": "-1 angry, 0 neutral, 1 happy.",
    "summary": "What the chat is about.",
    "text": "The text.",
    "repairs": "What was repaired in the model's answer.",
    "model": "The model that answered.",
    "prompt_version": "A hash of the template that asked, and its settings.",
    "analysed_at": "When it was analysed.",
    "drafted_at": "When it was drafted.",
    "responded_at": "When the model responded.",
    "approved_by": "Who approved it.",
    "approved_at": "When it was approved.",
    "edited": "Whether the text is not the model's.",
    "response": "What the model said.",
    "finish_reason": "`stop`, or `length` if the response was cut at its limit.",
    "error": "What went wrong, in words.",
    "payload_encoding": "How the payload is written; see `payload`.",
    "failed_at": "When it failed.",
    "parts": "How many parts the letter has.",
    "redacted": "Where placeholders stand, if personal data was looked for.",
    "value": "One value, or all that apply.",
    "confidence": "How probable that is, from 0 to 1.",
    "message": "The place of the message in the chat, from 0.",
    "start": "Where it begins in the text, in characters.",
    "end": "Where it ends in the text, in characters.",
    "kind": "What stood there, e.g. `email`.",
    "chat": "The chat as it came.",
    "placeholders": "What each placeholder stands for.",
}
"""What fields mean of which the records' docstrings say nothing, because the name says it."""


def records_pages() -> str:
    """Returns a section a record: what it is, and its fields with types and meanings."""
    return "\n\n".join(map(_record, RECORDS))


def _record(kind: type[Record]) -> str:
    about, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    meanings = {**COMMON, **_meanings(attributes)}
    schema = kind.model_json_schema()
    rows = [
        (
            code(name),
            _type(field, schema.get("$defs", {})),
            "yes" if kind.model_fields[name].is_required() else "",
            plain(meanings[name][:1].upper() + meanings[name][1:]),
        )
        for name, field in schema["properties"].items()
    ]
    paragraphs = [plain(text) for text in about.strip().split("\n\n")]
    head = ("field", "type", "always", "meaning")
    return "\n\n".join([f"## {kind.__name__}", *paragraphs, table(head, rows)])


def _meanings(attributes: str) -> dict[str, str]:
    """Returns the meaning of each field from a docstring's section."""
    found = re.findall(r"^  (\w[\w, ]*): ((?:.|\n   )*)", attributes, re.MULTILINE)
    return {name: text for names, text in found for name in names.split(", ")}


def _type(schema: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """Returns the type of a field of JSON, from its JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        enum = kinds[name].get("enum")
        return _one_of(enum) if enum else f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return _one_of(schema["enum"])
    if "anyOf" in schema:
        options = [_type(option, kinds) for option in schema["anyOf"]]
        return " or ".join(option for option in options if option != "null")
    if schema["type"] == "array":
        return f"array of {_type(schema['items'], kinds)}"
    if schema["type"] == "object":
        return f"object of {_type(schema['additionalProperties'], kinds)}"
    return "time" if schema.get("format") == "date-time" else str(schema["type"])


def _one_of(values: Iterable[Any]) -> str:
    return " or ".join(map(code, values))


# Input and output


def sinks_table() -> str:
    """Returns the kinds of destinations, by the forms of their URIs."""
    rows = []
    for sink in (SCHEMES[-1], *SCHEMES[:-1]):
        module = importlib.import_module(type(sink).__module__)
        rows.append((code(type(sink).__name__), plain(sink.example), plain(module.__doc__ or "")))
    return table(("", "written as", ""), rows)


OWN = {
    "auto": "Found by what the input begins with.",
    "chatflow": "chatflow's own JSON: a chat, a message or the end of a chat a line.",
    "csv": "A table: a row a message, in any order; with any delimiter of `,` `;` `|` and tabs.",
    "parquet": "The same as Parquet.",
}
"""The formats that no module of their own describes."""


def formats_table() -> str:
    """Returns what `--input_format` may be."""
    rows = []
    for name in ALL:
        if not (text := OWN.get(name, "")):
            doc = importlib.import_module(f"chatflow.sources.formats.{name}").__doc__ or ""
            about, *links = doc.strip().split("\n\n")
            text = plain(about)
            for number, link in enumerate("".join(links).split(), 1):
                text += f" [{'Its documentation' if number == 1 else 'more'}]({link})"
        rows.append((code(name), text))
    return table(("`--input_format`", ""), rows)


def columns_table() -> str:
    """Returns the names that a table's column may have."""
    rows = [(code(n), codes(names.split())) for n, names in tables_of_messages.FIELDS.items()]
    return table(("field of `--columns`", "found by these names, the surest first"), rows)


def roles_table() -> str:
    """Returns the words of other systems for each role."""
    by_role: dict[str, list[str]] = {}
    for theirs, ours in ROLES.items():
        by_role.setdefault(ours, []).append(theirs)
    return table(("role", "words"), [(code(r), codes(words)) for r, words in by_role.items()])


# Prompts and models


def constants_table() -> str:
    """Returns the constants that chatflow's own templates set, with their values."""
    rows = []
    for folder in ("base", "instruct"):
        templates = load_folder(folder)
        for name in ("analysis", "apology"):
            for constant, value in sorted(templates[name].settings.items()):
                where = code(f"{folder}/{name}.jinja")
                rows.append((where, code(constant), code(json.dumps(value))))
    return table(("template", "constant", "value"), rows)


def choices_table() -> str:
    """Returns what a small model chooses, by `choices.toml`."""
    folder = load_folder("base")["analysis"]
    rows = [
        (code(each.name), each.over, each.kind, codes(each.values))
        for each in choices_of(dict(folder.sources), folder.folder)
    ]
    return table(("choice", "of a", "how many", "values"), rows)


def routes_list() -> str:
    """Returns the flags that an entry of `--models` may set."""
    return ", ".join(f"[`{name}`](flags.md#{name})" for name in ROUTE_FIELDS) + "."


SIZES = (
    "gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3n_e2b", "gemma4_2b", "gemma4_4b",
    "llama3.2_1b", "llama3_8b", "qwen3_0.6b", "qwen3_4b", "qwen3_8b", "smollm3_3b",
)  # fmt: skip
"""The models of the table of sizes; `chatflow size` knows more."""


def sizes_table() -> str:
    """Returns the table of sizes and machines."""
    machines = read_machines()
    head = (
        "", "parameters", "weights, KV cache of a chat",
        "on processors (float32)", "chats/s", "on a GPU (bfloat16)", "chats/s",
    )  # fmt: skip
    rows = []
    for model in SIZES:
        cells, size = [], size_of(model, machines)
        for accelerator in ("", "any"):
            try:
                found = size_of(model, machines, accelerator)
            except UsageError:
                cells += ["a smaller batch fits", ""]
                continue
            on = f", {found.accelerator}" if found.accelerator else ""
            cells += [
                f"{found.memory_gb:.1f} GB: {found.machine_type}{on}",
                f"{found.chats_per_second:.2g}" + (" *" if found.measured == "measured" else ""),
            ]
        parameters = f"{size.parameters / 1e6:,.0f} M"
        weights = f"{size.weights_gb:.1f} GB, {size.kv_mb:,.0f} MB"
        rows.append((code(model), parameters, weights, *cells))
    return table(head, rows, numbers=(1, 2, 4, 6))


def models_tables() -> str:
    """Returns the tables of what models need to be saved, loaded and run."""
    lines: list[str] = []
    for title, rows in info.tables([info.needs_of(name) for name in info.MODELS]):
        head = list(rows[0])
        numbers = [at for at, name in enumerate(head) if name not in ("model", "machine")]
        cells = [[code(row["model"]), *list(row.values())[1:]] for row in rows]
        lines += [f"{title[0].upper()}{title[1:]}:", "", table(head, cells, numbers), ""]
    return "\n".join(lines[:-1])


# Python


AREAS = {
    "records": "Records",
    "sources": "Reading",
    "stages": "Stages",
    "redaction": "Stages",
    "prompts": "Prompts",
    "models": "Models",
    "sinks": "Writing",
    "running": "A run",
    "options": "Settings",
    "errors": "Errors and dead letters",
    "dead_letters": "Errors and dead letters",
}
"""The headings of the Python page, by the module that a name comes from."""


def python_names() -> str:
    """Returns the public names by area; mkdocstrings puts their documentation in their place."""
    found: dict[str, list[str]] = {title: [] for title in AREAS.values()}
    for name in chatflow.__all__:
        if not name.startswith("_"):
            module = getattr(chatflow, name).__module__
            found[AREAS[module.split(".")[1]]].append(f"{module}.{name}")
    return "\n\n".join(
        line
        for title, names in found.items()
        for line in (f"## {title}", *(f"::: {n}" for n in names))
    )


# The Flex Template, and llms.txt


def template_parameters() -> list[dict[str, Any]]:
    """Returns the flags as parameters of a Flex Template: its metadata.

    https://cloud.google.com/dataflow/docs/guides/templates/configuring-flex-templates#metadata
    """
    made = []
    for name, flag in Options.defaults().items():
        default = flag["default"]
        parameter: dict[str, Any] = {
            "name": name,
            "label": name.replace("_", " ").capitalize(),
            "helpText": flag["help"],
            "isOptional": name != "input",
            "paramType": "TEXT",
        }
        if choices := flag["choices"]:
            parameter["paramType"] = "ENUM"
            parameter["enumOptions"] = [{"value": choice} for choice in choices]
        elif isinstance(default, (int, float)):
            parameter["paramType"] = "NUMBER"
        if default != "":
            parameter["defaultValue"] = as_text(default)
        made.append(parameter)
    return made


def llms() -> str:
    """Returns llms.txt (https://llmstxt.org): the site's pages, with the first sentence of each."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    lines = [f"# {site['site_name']}", "", f"> {site['site_description']}.", ""]
    for section, pages in _sections(site["nav"]):
        lines += [f"## {section}", ""]
        for title, page in pages:
            if (path := DOCS / page).exists():  # else the build of the site complains
                lines.append(f"- [{title}]({page}): {_first_sentence(path.read_text())}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _sections(nav: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields the sections of a nav with the titles and pages of each; single pages come first."""
    single = [(t, p) for each in nav for t, p in each.items() if isinstance(p, str)]
    yield "Begin", single
    for each in nav:
        for section, pages in each.items():
            if not isinstance(pages, str):
                yield section, [(t, p) for page in pages for t, p in page.items()]


def _first_sentence(page: str) -> str:
    """Returns the first sentence of a page's text, without links."""
    text = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    paragraphs = [p.strip() for p in text.split("\n\n")]
    first = next(p for p in paragraphs if p and not p.startswith(("#", "!", "|", "```")))
    first = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(first.split()))
    return re.split(r"(?<=[.:!?])(?<!e\.g\.)(?:$| )", first, maxsplit=1)[0].rstrip(":.") + "."


TABLES: Mapping[str, Callable[[], str]] = {
    "flags": flags_tables,
    "commands": commands_pages,
    "records": records_pages,
    "sinks": sinks_table,
    "formats": formats_table,
    "columns": columns_table,
    "roles": roles_table,
    "constants": constants_table,
    "choices": choices_table,
    "routes": routes_list,
    "sizes": sizes_table,
    "models": models_tables,
    "python": python_names,
}
"""What pages may have made, by name."""


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
