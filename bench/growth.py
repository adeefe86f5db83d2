"""Plots how the cost of a chat grows with its length and with the batch.

    python bench/growth.py                # about 10 minutes on two cores; writes bench/growth.svg
    python bench/growth.py --whole        # also chats whose prompts are not cut, alone: longer

Analyses a chat of 10 to 1,000 messages (tone and summary) in batches of 1 to 64 with the
embedded model. Prompts have the default budget, so that the oldest messages of a long chat are
left out. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from chatflow.models.spec import ModelSpec
from chatflow.options import Batching
from chatflow.prompts.questions import AnalysisPrompt
from chatflow.prompts.templates import load_folder
from chatflow.records import Chat, Message
from chatflow.sources.chats import read_chat

HERE = Path(__file__).parent
LENGTHS = (10, 30, 100, 300, 1000)
BATCHES = (1, 4, 16, 64)
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
    flags = parser.parse_args()
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
