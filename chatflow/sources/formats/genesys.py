"""Reads transcripts of Genesys Cloud: of a call or a chat, one communication per file.

https://developer.genesys.cloud/analyticsdatamanagement/speechtextanalytics/transcript-url
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chatflow.sources.formats.common import (
    Ours,
    Value,
    attributes,
    dicts,
    own_id,
    part,
    since_1970,
    without_none,
)

# "internal" is somebody of the company, not a note.
_ROLES = {
    "internal": "agent", "user": "agent", "external": "customer", "acd": "system",
    "ivr": "bot", "workflow": "bot", "botflow": "bot", "voicemail": "system",
}  # fmt: skip


def fits(value: Value) -> bool:
    first: Any = next(dicts(value.get("transcripts")), None)
    return first is not None and "phrases" in first and "conversationId" in value


def read(value: Value, name: str) -> Iterator[Ours]:
    transcripts = [*dicts(value["transcripts"])]
    phrases = [phrase for one in transcripts for phrase in dicts(one.get("phrases"))]
    phrases.sort(key=_start)
    language = next((one.get("language") for one in transcripts if one.get("language")), "")
    ids = (value.get("conversationId"), value.get("communicationId"))  # a call can have several
    yield {
        "chat_id": "-".join(str(one) for one in ids if one) or own_id(value, name=name),
        "messages": [_message(phrase) for phrase in phrases],
        "attributes": attributes(
            channel=value.get("mediaType"),
            conversation=value.get("conversationId"),
            language=str(language).replace("_", "-").partition("-")[0],
        ),
    }


def _message(phrase: Value) -> Ours:
    purpose = str(phrase.get("participantPurpose") or "external").lower()
    return without_none(
        user_id=purpose,
        role=_ROLES.get(purpose, purpose),
        text=phrase.get("decoratedText") or phrase.get("text"),
        sent_at=since_1970(phrase.get("startTimeMs"), 1e3),
    )


def _start(phrase: Value) -> float:
    """Returns when a phrase begins, in milliseconds since 1970 or since the start of the call."""
    found = phrase.get("startTimeMs")
    if found is None:
        offset = part(phrase.get("offset") or phrase.get("offsetMs"))
        found = offset.get("milliseconds", phrase.get("offsetMs"))
    is_number = isinstance(found, (int, float)) and abs(found) < 2**63
    return float(found) if is_number else 0.0
