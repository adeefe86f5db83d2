"""`--history`: keeps a line of figures per evaluation, to detect a fall in accuracy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chatflow
from chatflow.errors import UsageError
from chatflow.evaluation.labels import Key, Label
from chatflow.evaluation.variants import Ran
from chatflow.records import now


def read_history(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a history, oldest first; none if there is no file yet.

    Raises:
      UsageError: the file cannot be read, or a line is not an evaluation's; names the line.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--history={path}: cannot be read: {error}") from None
    history = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not {"labelled", "variant", "answers"} <= set(value):
                raise ValueError("not a line of an evaluation")
        except ValueError as error:
            raise UsageError(f"--history={path}:{number}: {error}") from None
        history.append(value)
    return history


def entry(number: int, ran: Ran, figures: Mapping[str, Any], labelled: str) -> dict[str, Any]:
    """Returns a variant's line: how it was made, its main figures, and its answers by chat."""
    summaries, drafts = figures["summaries"] or {}, figures["drafts"] or {}
    return {
        "date": now().isoformat(timespec="seconds"),
        "labelled": Path(labelled).name,
        "variant": number,
        "name": figures["name"],
        "model": figures["model"],
        "prompt_versions": figures["prompt_versions"],
        "chatflow": chatflow.__version__,
        "commit": _commit(),
        "chats": figures["chats"],
        **{
            name: figures[name]["value"]
            for name in ("accuracy", "macro_f1", "angry_recall", "angry_precision")
        },
        "ece": (figures["calibration"] or {}).get("ece"),
        "valid": figures["answers"]["valid"],
        "ungrounded": summaries.get("all", {}).get("ungrounded"),
        "kept_summaries": summaries.get("by_model"),
        "drafts": drafts.get("drafted"),
        "promises": drafts.get("promise"),
        "seconds": figures["run"]["seconds"],
        "answers": {_id(key): judged.answer for key, judged in ran.judged.items()},
    }


def append(path: str, entries: Sequence[Mapping[str, Any]]) -> None:
    with Path(path).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in entries)


def fall(
    history: Sequence[Mapping[str, Any]],
    line: Mapping[str, Any],
    labels: Mapping[Key, Label],
    tolerance: float,
) -> str:
    """Returns a message if accuracy fell by more than `tolerance` since the newest earlier line.

    Compares only chats that both lines have, and both with the current labels, so that new or
    corrected labels do not count as a fall. Returns an empty string if there is no fall.
    """
    # The first variant is compared even if its model has changed; others are matched by name.
    same = ("labelled", "variant", "name") if line["variant"] else ("labelled", "variant")
    earlier = [before for before in history if all(before[k] == line[k] for k in same)]
    if not earlier:
        return ""
    before, after = earlier[-1]["answers"], line["answers"]
    known = {_id(key): label.sentiment for key, label in labels.items() if _id(key) in before}
    if not known:
        return ""
    was, now_is = (
        sum(answers[chat] == label for chat, label in known.items()) / len(known)
        for answers in (before, after)
    )
    # Compared in chats, so that float rounding does not make 3 of 100 more than 0.03.
    if (was - now_is) * len(known) <= tolerance * len(known) + 1e-6:
        return ""
    lost = [chat for chat, label in known.items() if before[chat] == label != after[chat]]
    return (
        f"accuracy on {line['labelled']} fell from {was:.3f} to {now_is:.3f} with {line['name']}, "
        f"by more than --tolerance={tolerance}; no longer right: {', '.join(lost[:5])}"
        + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    )


def _id(key: Key) -> str:
    return "/".join(key)


def _commit() -> str:
    """Returns the commit of the working folder, where prompts are edited; empty without one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
