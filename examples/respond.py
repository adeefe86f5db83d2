"""Messages of a Pub/Sub topic through Flan-T5, each response to another topic, as they come.

    python examples/respond.py --model torch:google/flan-t5-small \\
      --messages_topic projects/P/topics/messages \\
      --responses_topic projects/P/topics/responses --dead_letters projects/P/topics/dead

Ctrl-C finishes what was read. For Dataflow add --runner=DataflowRunner --project=P …
"""

import argparse
from pathlib import Path

import apache_beam as beam
from rich.console import Console

from chatflow.errors import UsageError
from chatflow.models.settings import Batching
from chatflow.models.spec import Model, ModelSpec
from chatflow.prompts.templates import load_template
from chatflow.running.launch import beam_options, finish, is_local, quieten
from chatflow.sinks.pubsub import check_topics
from chatflow.sinks.sink import SinkSettings
from chatflow.sinks.write import WriteRecords
from chatflow.sources.read import ReadMessages, check_messages
from chatflow.stages.respond import AskTexts


def main(flags: argparse.Namespace, beam_flags: list[str]) -> None:
    options = beam_options(beam_flags, streaming=True)
    quieten(is_local(options))
    spec = ModelSpec(
        flags.model,
        state_dict_path=flags.state_dict_path,
        batching=Batching(size=32, seconds=0.2),  # for which others of the stream are waited for
    )
    template = load_template(Path(__file__).parent / "prompts" / "respond.jinja")
    ask = AskTexts(Model(spec.handler()), template)
    check_messages(messages := flags.messages_subscription or flags.messages_topic)
    check_topics([flags.responses_topic, flags.dead_letters], is_local(options))
    settings = SinkSettings(streaming=True)
    pipeline = beam.Pipeline(options=options)
    asked = pipeline | "ReadMessages" >> ReadMessages(messages) | "AskTexts" >> ask
    asked.ok | "WriteResponses" >> WriteRecords([flags.responses_topic], settings)
    asked.dead_letters | "WriteDeadLetters" >> WriteRecords([flags.dead_letters], settings)
    finish(pipeline.run(), Console(stderr=True))
    ask.model.forget()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--messages_topic", default="", help="read from now on")
    source.add_argument("--messages_subscription", default="", help="loses nothing between runs")
    parser.add_argument("--responses_topic", required=True)
    parser.add_argument("--dead_letters", required=True, help="a topic, or a prefix of files")
    parser.add_argument("--model", default="torch:google/flan-t5-small")
    parser.add_argument("--state_dict_path", default="")
    try:
        main(*parser.parse_known_args())
    except UsageError as error:
        parser.error(str(error))
