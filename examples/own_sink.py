"""A sink of your own: each draft as a mail to the support staff, a file that mail programs open.

    python examples/own_sink.py [FOLDER]

Reads samples/chats.jsonl and writes FOLDER/mails/DRAFT_ID.eml and FOLDER/dead_letters.
"""

import email.message
import functools
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import apache_beam as beam

from chatflow import (
    AnalyseChats,
    AnalysisPrompt,
    DeadLettered,
    Draft,
    DraftApologies,
    DraftPrompt,
    Model,
    ModelSpec,
    Options,
    ParseArrivals,
    ReadArrivals,
    Request,
    ScriptedModelHandler,
    WriteRecords,
    launch,
    load_folder,
    new_pipeline,
)

CHATS = Path(__file__).parent.parent / "samples" / "chats.jsonl"


# The work of a sink must be safe to repeat, because a runner tries again what has failed. The id of
# a draft is always the same, so the same draft is the same file; renaming makes it appear whole.
def write_mail(folder: str, draft: Draft) -> Iterable[Draft]:
    """Writes a draft as a mail, or a request to write one if there is a flag instead of a text."""
    mail = email.message.EmailMessage()
    mail["To"] = "support@example.com"
    mail["Subject"] = f"Chat {draft.chat_id}: " + ("a draft" if draft.text else "please write")
    mail.set_content(draft.text or f"There is no draft: {draft.flag}.")
    os.makedirs(folder, exist_ok=True)
    unfinished = f"{folder}/.{draft.draft_id}-{uuid.uuid4().hex}"
    Path(unfinished).write_bytes(mail.as_bytes())
    os.replace(unfinished, f"{folder}/{draft.draft_id}.eml")
    yield draft


# A script in place of a model, as in tests: it finds everybody angry.
def answer(request: Request) -> str:
    if request.task == "apology":
        return "We are sorry for the trouble, and will come back to you today."
    return '{"sentiment": -1, "summary": "The customer is not content."}'


folder = sys.argv[1] if len(sys.argv) > 1 else "out/own_sink"
options, spec, templates = (
    Options(input=str(CHATS)),
    ModelSpec("scripted:own"),
    load_folder("instruct"),
)
model = Model(ScriptedModelHandler(answer))

pipeline = new_pipeline()
read = pipeline | ReadArrivals([options.input]) | ParseArrivals(options.max_line_bytes)
analysed = read.chats | AnalyseChats(model, AnalysisPrompt(templates["analysis"], spec))
drafted = analysed.analysed | DraftApologies(model, DraftPrompt(templates["apology"], spec))
# A mail that cannot be written is a dead letter of stage "write".
write = functools.partial(write_mail, f"{folder}/mails")
mailed = drafted.drafts | "WriteMails" >> DeadLettered("write", write, Draft)
failed = [part.dead_letters for part in (read, analysed, drafted, mailed)]
failed | beam.Flatten() | "WriteDeadLetters" >> WriteRecords([f"{folder}/dead_letters"])
launch(pipeline)
