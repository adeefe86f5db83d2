"""Estimates the cost and time of all chats of an input, from a sample of them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from rich import box
from rich.console import Console
from rich.table import Table

from chatflow.database.answers import Kept, keep_answer
from chatflow.database.connections import opened, password_at
from chatflow.database.tables import answers
from chatflow.errors import BadInputError, UsageError
from chatflow.models.prices import Price
from chatflow.models.spec import inference_of, name_of
from chatflow.options import Options
from chatflow.records import load_object
from chatflow.sources.chats import USUAL, Customs
from chatflow.sources.formats.objects import as_ours
from chatflow.sources.lines import numbered
from chatflow.sources.read import files_of, is_stream, split_inputs

RESAMPLES = 2000


def drawn(inputs: str, most: int, seed: int, customs: Customs = USUAL) -> tuple[list[bytes], int]:
    """Returns some lines of files, drawn at random, and how many there are.

    Raises `UsageError` for Pub/Sub, single messages, or files that cannot be read.
    """
    if is_stream(inputs):
        raise UsageError("--input: a stream has no end; give files")
    rng, count = random.Random(seed), 0
    kept: list[bytes] = []
    for pattern in split_inputs(inputs):
        for path in files_of(pattern, "--input"):
            for number, line in numbered(path, "--input", customs):
                if not count and not _is_chat(line, customs):
                    raise UsageError(
                        f"--input: {path}:{number} is not a chat with messages; only whole chats "
                        "can be sampled"
                    )
                count += 1
                if len(kept) < most:
                    kept.append(line)
                elif (place := rng.randrange(count)) < most:  # each stays with the same chance
                    kept[place] = line
    return kept, count


def _is_chat(line: bytes, customs: Customs) -> bool:
    try:
        value = load_object(line)
        found = as_ours(value, format=customs.format)
    except BadInputError:
        return False
    values = found.values if found else [value]
    return bool(values) and all("messages" in one for one in values)


class Asked(NamedTuple):
    """What was answered about one chat.

    Attributes:
      at: when, each time.
      tokens: read and written.
      usd: None if some model's price is not known.
    """

    at: list[datetime]
    tokens: tuple[int, int]
    usd: float | None


def asked_of(database: Any, prices: Mapping[str, Price | None]) -> dict[str, Asked]:
    """Returns what was answered about each chat."""
    query = sa.select(answers.c.chat_id, answers.c.model, answers.c.answer, answers.c.answered_at)
    found: dict[str, Asked] = {}
    with database.read() as connection:
        for row in connection.execute(query):
            before = found.get(row.chat_id, Asked([], (0, 0), 0.0))
            answer = json.loads(row.answer)
            tokens = (answer["prompt_tokens"], answer["answer_tokens"])
            name = name_of(row.model)
            price = prices.get(name) or (Price() if inference_of(name) == "on_worker" else None)
            if price is not None and price.hour:
                price = None  # it costs by the hour, not by the token
            usd = None
            if price is not None and before.usd is not None:
                usd = before.usd + price.of(*tokens, answer["cached_tokens"])
            read, written = before.tokens
            found[row.chat_id] = Asked(
                [*before.at, row.answered_at], (read + tokens[0], written + tokens[1]), usd
            )
    return found


def estimate(
    options: Options, prices: Mapping[str, Price | None], seconds: float, sample: int, chats: int
) -> dict[str, Any]:
    """Returns the figures of a sample, and of all chats.

    Args:
      options: those of the sample's run, with its `answers`.
      seconds: how long that took.
      sample, chats: how many were asked about, and how many there are.
    """
    database = opened(options.answers, password_at(options.database_password))
    asked = list(asked_of(database, prices).values())
    free = [0] * (sample - len(asked))  # they became dead letters
    times = sorted(at for one in asked for at in one.at)
    between = [(b - a) / timedelta(seconds=1) for a, b in itertools.pairwise(times)]
    answering = sum(between)
    per_chat = len(times) / max(sample, 1)
    usd = [one.usd for one in asked]
    return {
        "chats": chats,
        "sample": sample,
        "answered": len(asked),
        "tokens_read": _of_all([*(one.tokens[0] for one in asked), *free], chats),
        "tokens_written": _of_all([*(one.tokens[1] for one in asked), *free], chats),
        "cost_usd": None if None in usd else _of_all([*usd, *free], chats),
        "sample_usd": None if None in usd else round(float(sum(map(float, usd))), 6),  # type: ignore[arg-type]
        "seconds": _of_all(between or [0.0], chats * per_chat, seconds - answering),
    }


def _of_all(values: Sequence[Any], times: float, beside: float = 0.0) -> dict[str, float]:
    """Returns the mean of a sample times a number, with a bootstrap 95 % interval."""
    found = np.array(values, float)
    rng = np.random.default_rng(0)
    means = found[rng.integers(0, len(found), (RESAMPLES, len(found)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        name: round(float(value) * times + beside, 6)
        for name, value in (("value", found.mean()), ("low", low), ("high", high))
    }


def keep(options: Options, uri: str) -> None:
    """Copies the answers of a sample's run to the database that the whole run uses."""
    password = password_at(options.database_password)
    there = opened(uri, password)
    with opened(options.answers, password).read() as connection:
        for row in connection.execute(sa.select(*(answers.c[name] for name in Kept._fields))):
            keep_answer(there, Kept(*row))


def show(found: Mapping[str, Any]) -> None:
    """Prints an estimate as a table."""
    table = Table(
        title=f"{found['chats']:,} chats, estimated from {found['sample']:,} of them",
        box=box.SIMPLE,
        title_justify="left",
    )
    for name in ("", "all", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, key: str, form: str) -> None:
        shown = {at: f"{max(0.0, figure):{form}}" for at, figure in found[key].items()}
        table.add_row(name, shown["value"], f"{shown['low']} to {shown['high']}")

    row("tokens read", "tokens_read", ",.0f")
    row("tokens written", "tokens_written", ",.0f")
    if found["cost_usd"] is not None:
        row("US dollars", "cost_usd", ",.4f")
    row("seconds, at this pace", "seconds", ",.0f")
    console = Console()
    console.print(table)
    if found["cost_usd"] is None:
        console.print("the price is not known: add it to a table for --prices", style="dim")
    else:
        console.print(f"the sample cost {found['sample_usd']:,.4f} US dollars", style="dim")
