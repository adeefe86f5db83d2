"""chatflow: event-driven chat analytics on Apache Beam.

`chatflow run` runs the whole pipeline; `chatflow.pipeline` shows how it is put together.
For a pipeline of your own, everything listed here is imported from `chatflow` itself, and
loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    # The records.
    "chatflow.records": (
        "Message",
        "Event",
        "Chat",
        "Analysis",
        "Draft",
        "Response",
        "DeadLetter",
        "Sentiment",
    ),
    # The stages, in the order in which a chat passes them.
    "chatflow.sources.read": ("ReadArrivals",),
    "chatflow.sources.parse": ("ParseArrivals",),
    "chatflow.stages.assemble": ("AssembleChats",),
    "chatflow.stages.analyse": ("AnalyseChats",),
    "chatflow.stages.draft": ("DraftApologies",),
    "chatflow.stages.respond": ("AskTexts",),
    "chatflow.sinks.sink": ("SinkSettings",),
    "chatflow.sinks.write": ("WriteRecords",),
    "chatflow.dead_letters": ("DeadLettered",),
    "chatflow.stages.replay": ("OpenDeadLetters",),
    # What they are given.
    "chatflow.prompts.templates": ("load_folder", "load_template"),
    "chatflow.prompts.questions": ("AnalysisPrompt", "DraftPrompt"),
    "chatflow.stages.revisions": ("Rules",),
    "chatflow.models.spec": ("Model", "ModelSpec"),
    "chatflow.models.handlers": ("LanguageModel", "LanguageModelHandler"),
    "chatflow.models.requests": ("Request", "Answer", "Failure"),
    "chatflow.models.scripted": ("ScriptedModelHandler",),
    "chatflow.errors": ("UsageError", "ElementError"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'chatflow' has no attribute {name!r}")
