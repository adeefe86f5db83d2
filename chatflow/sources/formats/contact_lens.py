"""Reads chats and calls of Amazon Connect: Contact Lens's analysis, or the transcript itself.

https://docs.aws.amazon.com/connect/latest/adminguide/contact-lens-example-output-files.html
"""

from __future__ import annotations

from collections.abc import Iterator

from chatflow.sources.formats.common import (
    Ours,
    Value,
    attributes,
    dicts,
    own_id,
    part,
    without_none,
)


def fits(value: Value) -> bool:
    of_connect = "CustomerMetadata" in value or "ContactId" in value or "InitialContactId" in value
    return isinstance(value.get("Transcript"), list) and of_connect


def read(value: Value, name: str) -> Iterator[Ours]:
    about = {**value, **part(value.get("CustomerMetadata"))}
    roles = {
        str(one.get("ParticipantId")): one.get("ParticipantRole")
        for one in dicts(value.get("Participants"))
    }
    sentiment = part(part(value.get("ConversationCharacteristics")).get("Sentiment"))
    yield {
        "chat_id": own_id(about, "ContactId", "InitialContactId", name=name),
        "messages": [_message(item, roles) for item in dicts(value["Transcript"])],
        "attributes": attributes(
            language=str(value.get("LanguageCode") or "").partition("-")[0],
            channel=value.get("Channel"),
            contact_lens_sentiment=part(sentiment.get("OverallSentiment")).get("CUSTOMER"),
        ),
    }


def _message(item: Value, roles: dict[str, str | None]) -> Ours:
    author = str(item.get("ParticipantId") or item.get("ParticipantRole") or "")
    role = item.get("ParticipantRole") or roles.get(author) or author
    text = item.get("Content")
    kind = str(item.get("Type") or "MESSAGE").upper()
    if kind == "EVENT":
        # "application/vnd.amazonaws.connect.event.participant.left"
        role, text = "SYSTEM", text or str(item.get("ContentType")).rpartition(".event.")[2]
    elif kind == "ATTACHMENT":
        text = "[attachment]"
    return without_none(
        message_id=item.get("Id"),
        user_id=author or role,
        role=role,
        text=text,
        sent_at=item.get("AbsoluteTime"),
    )
