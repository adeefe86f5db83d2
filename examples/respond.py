"""Sends messages of a Pub/Sub topic through Flan-T5, and the responses to another topic.

    python examples/respond.py --model torch:google/flan-t5-small \\
      --messages_topic projects/P/topics/messages \\
      --responses_topic projects/P/topics/responses --dead_letters projects/P/topics/dead

Ctrl-C finishes what was read. For Dataflow add --runner=DataflowRunner --project=P …
"""

import argparse
from pathlib import Path

from chatflow import (
    AskTexts,
    Batching,
    Model,
    ModelSpec,
    ReadMessages,
    SinkSettings,
    UsageError,
    WriteRecords,
    launch,
    load_template,
    new_pipeline,
)

TEMPLATE = Path(__file__).parent / "prompts" / "respond.jinja"
STREAM = SinkSettings(streaming=True)


def main(flags: argparse.Namespace, beam_flags: list[str]) -> None:
    spec = ModelSpec(
        flags.model,
        state_dict_path=flags.state_dict_path,
        batching=Batching(max_batch_size=32, max_batch_duration_secs=0.2),
    )
    ask = AskTexts(Model(spec.handler()), load_template(TEMPLATE))
    pipeline = new_pipeline(beam_flags, streaming=True)
    messages = ReadMessages(flags.messages_subscription or flags.messages_topic)
    asked = pipeline | "ReadMessages" >> messages | "AskTexts" >> ask
    asked.ok | "WriteResponses" >> WriteRecords([flags.responses_topic], STREAM)
    asked.dead_letters | "WriteDeadLetters" >> WriteRecords([flags.dead_letters], STREAM)
    launch(pipeline)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--messages_topic", default="", help="reads messages from now on")
    source.add_argument("--messages_subscription", default="", help="loses nothing between runs")
    parser.add_argument("--responses_topic", required=True)
    parser.add_argument("--dead_letters", required=True, help="a topic, or a prefix of files")
    parser.add_argument("--model", default="torch:google/flan-t5-small")
    parser.add_argument("--state_dict_path", default="")
    try:
        main(*parser.parse_known_args())
    except UsageError as error:
        parser.error(str(error))
