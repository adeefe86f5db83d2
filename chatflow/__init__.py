"""chatflow: event-driven chat analytics on Apache Beam.

Build your own pipeline from the stages:

    from chatflow.analysis import AnalyseChats      # chats -> analyses
    from chatflow.drafts import DraftApologies      # angry analyses -> apology drafts
    from chatflow.sources import ReadLines, ParseChats
    from chatflow.sinks import WriteRecords
    from chatflow.dead_letters import DeadLettered  # a function as a step that loses nothing

or run the whole with `chatflow run`; `chatflow.pipeline` shows how it is put together.
"""

__version__ = "0.1.0"
