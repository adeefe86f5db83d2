"""Plots how the cost of a chat grows with its length and with the batch.

    python bench/growth.py                # about 10 minutes on two cores; writes bench/growth.svg
    python bench/growth.py --whole        # also chats whose prompts are not cut, alone: longer
    python bench/growth.py --scripted     # the pipeline alone: writes bench/growth-scripted.svg

Analyses a chat of 10 to 1,000 messages (tone and summary) in batches of 1 to 64 with the
embedded model. Prompts have the default budget, so that the oldest messages of a long chat are
left out. Prints a line of JSON.

With `--scripted`, no model is asked: the CPU and the most memory that `chatflow run` takes above
its start, for a message of chats of 10 to 5,000 messages, and for a chat of up to `--most` chats.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from pipeline import ROOT, run, write_chats, write_script

from chatflow.models.spec import ModelSpec
from chatflow.options import Batching
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import Chat, Message
from chatflow.sources.chats import read_chat

HERE = Path(__file__).parent
LENGTHS = (10, 30, 100, 300, 1000)
BATCHES = (1, 4, 16, 64)
SCRIPTED_LENGTHS = (10, 30, 100, 300, 1000, 5000)
MESSAGES = 30_000  # of all chats together, where lengths are compared
COUNTS = (300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
LONGEST_POINT = 25_000  # tokens; larger ones are left out, with a message


def chat_of(messages: int, texts: list[str], number: int) -> Chat:
    said = itertools.islice(itertools.cycle(texts[number:] + texts[:number]), messages)
    return Chat(
        chat_id=str(number),
        messages=tuple(
            Message(user_id="ca"[at % 2], role=("customer", "agent")[at % 2], text=text)
            for at, text in enumerate(said)
        ),
    )


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--whole", action="store_true", help="also prompts that are not cut")
    parser.add_argument("--plot", default=str(HERE / "growth.svg"))
    parser.add_argument("--scripted", action="store_true", help="the pipeline without a model")
    parser.add_argument("--most", type=int, default=100_000, help="chats, with --scripted")
    flags = parser.parse_args()
    if flags.scripted:
        scripted(flags.most)
        return
    lines = (HERE.parent / "samples" / "chats.jsonl").read_text().splitlines()
    texts = [m.text for line in lines for m in read_chat(json.loads(line)).messages]
    spec = ModelSpec(batching=Batching(max_batch_size=64, max_batch_duration_secs=0))
    model = spec.handler().load_model()
    figures: list[dict[str, Any]] = []

    def point(length: int, batch: int, budget: int) -> None:
        prompt = AnalysisPrompt(load_folder("base")["analysis"], spec, budget)
        chats = [chat_of(length, texts, number) for number in range(batch)]
        requests = [prompt.question(chat, "c").request for chat in chats]
        parts = [part for request in requests for part in request.parts]
        tokens = sum(len(model.engine.encode(part.prompt[part.shared :])) for part in parts)
        found = {"messages": length, "batch": batch, "budget": budget, "tokens": tokens / batch}
        if tokens > LONGEST_POINT:
            print(f"{length} messages, batch {batch}: left out, {tokens:,} tokens", file=sys.stderr)
            return
        if batch < BATCHES[-1]:
            model.answer(requests)  # compiles; for the largest it would take long and change little
        started = time.perf_counter()
        model.answer(requests)
        found["seconds_per_chat"] = (time.perf_counter() - started) / batch
        figures.append(found)
        print(found, file=sys.stderr)

    for length, batch in itertools.product(LENGTHS, BATCHES):
        point(length, batch, 1536)
    if flags.whole:
        for length in LENGTHS:
            point(length, 1, 30_000)
    print(json.dumps(figures))
    plot(figures, flags.plot)


def scripted(most: int) -> None:
    """Measures and plots what the pipeline takes for chats of all lengths and numbers."""
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chatflow-bench-") as scratch:
        chats, model = Path(scratch) / "chats.jsonl", write_script(Path(scratch))

        def point(count: int, messages: int) -> dict[str, float]:
            write_chats(chats, count, messages)
            return run(ROOT, chats, model)

        start = point(1, 5)
        for length in SCRIPTED_LENGTHS:
            count = MESSAGES // length
            figures.append({"chats": count, "messages": length, **point(count, length)})
            print(figures[-1], file=sys.stderr)
        for count in itertools.takewhile(lambda count: count <= most, COUNTS):
            figures.append({"chats": count, "messages": 5, **point(count, 5)})
            print(figures[-1], file=sys.stderr)
    print(json.dumps({"start": start, "figures": figures}))
    plot_scripted(start, figures, str(HERE / "growth-scripted.svg"))


def plot_scripted(start: dict[str, float], figures: list[dict[str, Any]], path: str) -> None:
    figure, rows = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    lengths = [f for f in figures if f["messages"] != 5]
    counts = [f for f in figures if f["messages"] == 5]
    for row, (what, unit, times) in zip(
        rows, (("cpu", "ms of CPU", 1000), ("mb", "KB of memory", 1024)), strict=True
    ):
        for axes, some, per, label in (
            (row[0], lengths, lambda f: f["chats"] * f["messages"], "messages in a chat"),
            (row[1], counts, lambda f: f["chats"], "chats of five messages"),
        ):
            x = [f["messages"] if some is lengths else f["chats"] for f in some]
            y = [(f[what] - start[what]) / per(f) * times for f in some]
            one = "message" if some is lengths else "chat"
            axes.plot(x, y, "-o")
            axes.set(xscale="log", ylim=(0, None), xlabel=label, ylabel=f"{unit} a {one}")
            axes.grid(which="both", alpha=0.3)
    figure.suptitle("The pipeline with a scripted model, two cores, above the start")
    figure.savefig(path)


def plot(figures: list[dict[str, Any]], path: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for budget, batch in sorted({(f["budget"], f["batch"]) for f in figures}):
        some = [f for f in figures if (f["budget"], f["batch"]) == (budget, batch)]
        label = f"batch {batch}" if budget == 1536 else "alone, prompt not cut"
        style = "-o" if budget == 1536 else "--s"
        x, y = ([f[name] for f in some] for name in ("messages", "seconds_per_chat"))
        axes.plot(x, y, style, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="messages in a chat", ylabel="seconds a chat",
        title="Gemma 3 270M, tone and summary, two cores",
    )  # fmt: skip
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    bench()
