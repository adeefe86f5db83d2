"""Estimates what a run costs, from a table of prices that users can edit."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from apache_beam.io.filesystems import FileSystems

from chatflow.errors import UsageError, one_line

DEFAULT = Path(__file__).parent / "prices.toml"


class Price(NamedTuple):
    """US dollars per million tokens, and per `hour` of an endpoint in a run.

    `cached` is the price of tokens that are read from a service's cache; None: that of `input`.
    """

    input: float = 0.0
    output: float = 0.0
    hour: float = 0.0
    cached: float | None = None

    def at(self, share: float) -> Price:
        """Returns the price with a share of what tokens cost."""
        cached = None if self.cached is None else self.cached * share
        return self._replace(input=self.input * share, output=self.output * share, cached=cached)

    def of(
        self, prompt_tokens: int, answer_tokens: int, cached_tokens: int = 0, seconds: float = 0.0
    ) -> float:
        """Returns US dollars; `cached_tokens` are among the `prompt_tokens`."""
        cached = self.input if self.cached is None else self.cached
        tokens = (
            (prompt_tokens - cached_tokens) * self.input
            + cached_tokens * cached
            + answer_tokens * self.output
        )
        return tokens / 1e6 + seconds / 3600 * self.hour


FLEX = 0.5
"""The price of tokens at `--service_tier=flex`, as a share of the usual price."""


def price_of(model: str, path: str = "", tier: str = "standard") -> Price | None:
    """Returns the price of a model, or None if the table lacks it.

    `path` is a table like `prices.toml`, local or `gs://`; empty: that one. Raises `UsageError` if
    it cannot be read or is not such a table.
    """
    where = path or str(DEFAULT)
    try:
        with FileSystems.open(where) as file:
            table = tomllib.loads(file.read().decode())
        prices = {pattern: _price(entry) for pattern, entry in table.items()}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--prices={where}: {one_line(error)}") from None
    fitting = [pattern for pattern in prices if fnmatch.fnmatchcase(model, pattern)]
    if not fitting:
        return None
    price = prices[max(fitting, key=len)]
    return price.at(FLEX) if tier == "flex" else price


def _price(entry: Any) -> Price:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is not a table of input, output, cached and hour")
    if unknown := set(entry) - set(Price._fields):
        raise ValueError(f"unknown fields {sorted(unknown)}; known are {list(Price._fields)}")
    for name, value in entry.items():
        if not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{name} is {value!r}, but must be a number of dollars")
    return Price(**entry)
