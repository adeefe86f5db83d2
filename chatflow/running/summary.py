"""The counts of a run, from Beam's metrics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from apache_beam.io.filesystems import FileSystems

from chatflow import metrics
from chatflow.models.prices import Price
from chatflow.models.spec import inference_of
from chatflow.pipeline import Plan
from chatflow.records import Record, parse_record
from chatflow.sinks.files import result_files
from chatflow.sinks.tables import ending_of
from chatflow.sinks.write import is_file, shown
from chatflow.sources.lines import OF_FILES

TONE_STYLES = {-1: ("angry", "red"), 0: ("neutral", "yellow"), 1: ("happy", "green")}


_REDUCED = (
    "duplicate_chats",
    "forgotten_messages",
    "too_late_events",
    "clock_skewed_messages",
    "dropped_messages",
    "cut_messages",
)


DISTRIBUTIONS = {
    "batch_size": ("requests in a batch", ""),
    "latency_ms": ("time to answer", " ms"),
    "prompt_tokens_per_answer": ("tokens of a prompt", ""),
    "answer_tokens_per_answer": ("tokens of an answer", ""),
}
"""The distributions that a summary shows, with their titles and units."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The counts and distributions of a run.

    `lost` counts elements that left a stage neither as a result nor as a dead letter, or left it
    twice. If it is not 0, chatflow has a bug. `kept_earlier`: the files are those of an earlier
    run, because nothing could be read.
    """

    counts: dict[str, int]
    distributions: dict[str, dict[str, float]]
    seconds: float
    destinations: Mapping[str, Sequence[str]]
    prices: Mapping[str, Price | None] = dataclasses.field(default_factory=dict)
    kept_earlier: bool = False

    @classmethod
    def of(cls, result: Any, seconds: float, planned: Plan) -> Summary:
        """Returns the summary of a Beam `PipelineResult` and its plan."""
        found = result.metrics().query()
        counts = counts_of(found)
        values: dict[str, list[Any]] = {}
        for metric in found["distributions"]:
            if metric.key.metric.namespace == metrics.NAMESPACE and metric.result.count:
                values.setdefault(metric.key.metric.name, []).append(metric.result)
        distributions = {
            name: {
                "min": min(part.min for part in parts),
                "mean": round(sum(part.sum for part in parts) / sum(p.count for p in parts), 1),
                "max": max(part.max for part in parts),
            }
            for name, parts in values.items()
        }
        return cls(counts, distributions, seconds, planned.destinations, planned.prices)

    def get(self, name: str) -> int:
        return self.counts.get(name, 0)

    def under(self, prefix: str) -> dict[str, int]:
        """Returns counters below a prefix: `under("analysed")` is {"angry": …, …}."""
        start = prefix + "/"
        return {
            name.removeprefix(start): value
            for name, value in sorted(self.counts.items())
            if name.startswith(start) and value
        }

    def dead_lettered(self, *stages: str) -> int:
        return sum(sum(self.under(f"dead_letters/{stage}").values()) for stage in stages)

    @property
    def lost(self) -> int:
        kinds = ("chats_read", "messages_read", "closes_read", "empty_events")
        read = self.get("lines_read") - sum(map(self.get, kinds)) - self.dead_lettered("read")
        gone = ("messages_joined", "duplicate_events", "too_late_events", "unassembled_messages")
        assembled = self.get("messages_read") - sum(map(self.get, gone))
        apart = self.get("chats_apart") + self.get("duplicate_chats")
        if apart := apart + self.dead_lettered("identity"):  # in batches
            apart -= self.get("chats_read") + self.get("chats_assembled")
        analysed = self.get("asked") - self.get("skipped") - self.get("analysed")
        flagged = sum(self.under("drafts_flagged").values())
        drafted = self.get("drafts_asked") - self.get("drafted") - flagged
        return (
            abs(read)
            + abs(assembled)
            + abs(apart)
            + abs(analysed - self.dead_lettered("prompt", "model", "answer"))
            + abs(drafted - self.dead_lettered("draft_prompt", "draft_model", "draft_answer"))
        )

    @property
    def nothing_read(self) -> bool:
        """Returns whether there were no lines, or each became a dead letter."""
        return self.get("lines_read") == self.dead_lettered("read")

    @property
    def problem(self) -> str:
        """Returns why the input was not read completely, or ""."""
        letters = self.under("dead_letters/read")
        kept = "; the results of the earlier run stay" if self.kept_earlier else ""
        if self.nothing_read and not letters:
            return f"the input has no lines{kept}" if kept else ""
        if self.nothing_read:
            reasons = ", ".join(f"{name} {count}" for name, count in letters.items())
            return f"nothing could be read: every line became a dead letter ({reasons}){kept}"
        unread = {reason: letters[reason] for reason in OF_FILES if reason in letters}
        if unread:
            reasons = ", ".join(f"{name} {count}" for name, count in unread.items())
            return f"not all files were read to their end ({reasons}); see the dead letters"
        return ""

    @property
    def cost(self) -> float | None:
        """Returns the estimated US dollars; None if the price of a remote model is not known."""
        total = 0.0
        for name, price in self.prices.items():
            read, written, cached = (
                self.get(f"{kind}_tokens_of/{name}") for kind in ("prompt", "answer", "cached")
            )
            if price is not None:
                total += price.of(read, written, cached, self.seconds)
            elif inference_of(name) == "remote" and (read or written):
                return None
        return round(total, 6) if any(self.prices.values()) else None

    def to_dict(self) -> dict[str, Any]:
        letters = self.under("dead_letters")
        tones = self.under("analysed")
        return {
            "lines_read": self.get("lines_read"),
            "chats_read": self.get("chats_read"),
            "messages_read": self.get("messages_read"),
            "chats_assembled": self.get("chats_assembled"),
            "asked": self.get("asked"),
            "skipped": self.get("skipped"),
            "analysed": self.get("analysed"),
            "sentiment": {name: tones.get(name, 0) for name, _ in TONE_STYLES.values()},
            "summaries": self.under("summaries"),
            "drafted": self.get("drafted"),
            "drafts_flagged": self.under("drafts_flagged"),
            "dead_letters": sum(letters.values()),
            "dead_letters_by_reason": letters,
            "lost": self.lost,
            "reduced": {
                "empty_messages": self.get("empty_messages") + self.get("empty_events"),
                "duplicate_messages": self.get("duplicate_messages") + self.get("duplicate_events"),
                **{name: self.get(name) for name in _REDUCED},
            },
            "formats": self.under("formats"),
            "input": self.under("input"),
            "redacted": self.under("redacted"),
            "repaired": self.under("repaired"),
            "escalated": {
                "asked": self.get("escalated"),
                "changed": self.get("escalated_changed"),
                "kept": self.under("escalated_kept"),
            },
            "prompt_tokens": self.get("prompt_tokens"),
            "answer_tokens": self.get("answer_tokens"),
            "cached_tokens": self.get("cached_tokens"),
            "requests": self.get("model/requests"),
            "retries": self.get("model/retries"),
            "asked_again": self.get("model/asked_again"),
            "answers_known": self.get("model/answers_known"),
            "faults": self.under("model/faults"),
            "copies_loaded": self.get("model/copies_loaded"),
            "updates": {
                "taken_up": self.get("model/updates"),
                "refused": self.get("model/updates_refused"),
                "templates_refused": self.get("updates/prompts_refused"),
            },
            "cost_usd": self.cost,
            **{name: self.distributions.get(name, {}) for name in DISTRIBUTIONS},
            "seconds": round(self.seconds, 2),
            "chats_per_second": round(
                (self.get("chats_read") + self.get("chats_assembled")) / max(self.seconds, 1e-9), 3
            ),
            "files": {kind: self.files(kind) for kind in self.destinations},
            "other_destinations": {
                kind: [shown(uri) for uri in uris if not is_file(uri)]
                for kind, uris in self.destinations.items()
            },
        }

    def counts_only(self) -> dict[str, Any]:
        """Returns `to_dict()` without the files, which may still be those of an earlier run."""
        return {name: value for name, value in self.to_dict().items() if name != "files"}

    def files(self, kind: str) -> list[str]:
        prefixes = () if self.kept_earlier else filter(is_file, self.destinations[kind])
        return [path for prefix in prefixes for path in result_files(prefix)]

    def readable(self, kind: str) -> list[str]:
        """Returns the files that `read_records` can read: not tables."""
        return [path for path in self.files(kind) if not ending_of(path)]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


def counts_of(found: Mapping[str, Any]) -> dict[str, int]:
    """Returns chatflow's counters among Beam's metrics, added up by name."""
    counts: dict[str, int] = {}
    for metric in found["counters"]:
        if metric.key.metric.namespace == metrics.NAMESPACE:
            name = metric.key.metric.name
            counts[name] = counts.get(name, 0) + int(metric.result)
    return counts


def read_records(kind: type[Record], files: Iterable[str]) -> Iterator[Any]:
    """Yields the records of files of JSON Lines."""
    for path in files:
        with FileSystems.open(path) as file:
            for line in file.read().splitlines():
                yield parse_record(kind, line)
