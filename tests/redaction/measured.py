"""How much of the labelled set is found, by kind; `python tests/redaction/measured.py` shows it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from chatflow.redaction.kinds import KINDS, NATIONAL_IDS
from chatflow.redaction.names import Names, said_in
from chatflow.redaction.redactor import Redactor

COUNTRIES = ("US", "GB", "DE")
LABELLED = Path(__file__).parent / "labelled.jsonl"
HELD_OUT = Path(__file__).parent / "held_out.jsonl"
FIXED = ("email", "card", "iban", "ip", "phone", "ssn", "nino", "nhs", "steuer_id", "url")
"""The kinds with a check digit or a fixed form."""


class Figures(NamedTuple):
    """Of a kind: labelled spans, those found wholly, spans found, and those that were right."""

    labelled: int
    whole: int
    found: int
    right: int

    @property
    def recall(self) -> float:
        return self.whole / self.labelled if self.labelled else 1.0

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0


def measured(path: Path = LABELLED, show: bool = False, of: str = "") -> dict[str, Figures]:
    """Measures with the default countries; a span counts as found if nothing of it is left."""
    redactor = Redactor(frozenset(KINDS), COUNTRIES)
    counts: Counter[tuple[str, str]] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        item: dict[str, Any] = json.loads(line)
        text = item["text"]
        found = redactor.find([text], Names([*item.get("names", ()), *said_in(text)]))[0]
        for span in item["spans"]:
            is_whole = any(f.start <= span["start"] and span["end"] <= f.end for f in found)
            counts["labelled", span["kind"]] += 1
            counts["whole", span["kind"]] += is_whole
            if show and not is_whole and of in ("", span["kind"]):
                print("MISSED", span["kind"], repr(span["text"]), "|", text)
        for one in found:
            is_right = any(
                one.start < s["end"] and s["start"] < one.end and s["kind"] == one.kind
                for s in item["spans"]
            )
            counts["found", one.kind] += 1
            counts["right", one.kind] += is_right
            if show and not is_right and of in ("", one.kind):
                print("WRONG ", one.kind, repr(text[one.start : one.end]), "|", text)
    ids = [name for country in COUNTRIES for name in NATIONAL_IDS[country]]
    kinds = [kind for kind in (*KINDS, *ids) if kind != "id"]
    parts = Figures._fields
    return {kind: Figures(*(counts[part, kind] for part in parts)) for kind in kinds}


if __name__ == "__main__":
    for path in (LABELLED, HELD_OUT):
        print(f"{path.stem:12} spans  recall  precision")
        for kind, one in measured(path, len(sys.argv) > 1, "".join(sys.argv[2:])).items():
            print(f"{kind:12} {one.labelled:5} {one.recall:7.3f} {one.precision:10.3f}")
