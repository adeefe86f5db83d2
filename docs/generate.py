"""Writes what is made from code: the pages' tables, the template's metadata, the table schemas.

`make docs` runs it; a test compares the files with what `generated` returns.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from chatflow.commands.model import info
from chatflow.commands.size import read_machines, size_of
from chatflow.errors import UsageError
from chatflow.options import Options, as_text
from chatflow.records import KINDS
from chatflow.sinks.bigquery import columns

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
README = ROOT / "README.md"
SYSTEMS = ROOT / "docs" / "explanation" / "origins.md"
PLACE = r"(<!-- {0}: .*? -->\n).*?(<!-- end of {0} -->)"


def generated() -> dict[Path, str]:
    """Returns by file what it should hold."""
    tables = (
        (README, "options", options_table()),
        (README, "sizes", sizes_table()),
        (SYSTEMS, "models", models_tables()),
    )
    pages = {path: path.read_text() for path, _, _ in tables}
    for path, name, table in tables:
        place = re.compile(PLACE.format(name), re.DOTALL)
        before, after = place.search(pages[path]).groups()
        pages[path] = place.sub(lambda _: f"{before}{table}\n{after}", pages[path])  # noqa: B023
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


def options_table() -> str:
    """Returns the README's table of flags."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for name, flag in Options.defaults().items():
        default = f"`{as_text(flag['default'])}`" if flag["default"] != "" else ""
        choices = f" One of `{'`, `'.join(flag['choices'])}`." if flag["choices"] else ""
        rows.append(f"| `--{name}` | {default} | {flag['help']}{choices} |")
    return "\n".join(rows)


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


SIZES = (
    "gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3n_e2b", "gemma4_2b", "gemma4_4b",
    "llama3.2_1b", "llama3_8b", "qwen3_0.6b", "qwen3_4b", "qwen3_8b", "smollm3_3b",
)  # fmt: skip
"""The models of the README's table; `chatflow size` knows more."""


def sizes_table() -> str:
    """Returns the README's table of sizes and machines."""
    table = read_machines()
    rows = [
        "| | parameters | weights, KV cache of a chat | on processors (float32) | chats/s "
        "| on a GPU (bfloat16) | chats/s |",
        "|---|---:|---:|---|---:|---|---:|",
    ]
    for model in SIZES:
        cells, plain = [], size_of(model, table)
        for accelerator in ("", "any"):
            try:
                found = size_of(model, table, accelerator)
            except UsageError:
                cells += ["a smaller batch fits", ""]
                continue
            on = f", {found.accelerator}" if found.accelerator else ""
            cells += [
                f"{found.memory_gb:.1f} GB: {found.machine_type}{on}",
                f"{found.chats_per_second:.2g}" + (" *" if found.measured == "measured" else ""),
            ]
        rows.append(
            f"| `{model}` | {plain.parameters / 1e6:,.0f} M | {plain.weights_gb:.1f} GB, "
            f"{plain.kv_mb:,.0f} MB | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def models_tables() -> str:
    """Returns the tables of what models need, of docs/explanation/origins.md."""
    lines: list[str] = []
    for title, rows in info.tables([info.needs_of(name) for name in info.MODELS]):
        head = list(rows[0])
        marks = ["---" if name in ("model", "machine") else "---:" for name in head]
        cells = [[f"`{row['model']}`", *list(row.values())[1:]] for row in rows]
        lines += [f"{title[0].upper()}{title[1:]}:", ""]
        lines += [f"| {' | '.join(row)} |" for row in (head, marks, *cells)] + [""]
    return "\n".join(lines[:-1])


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
