"""Texts of files, line by line, through T5: translations, summaries, any of its tasks.

    python examples/translate.py --model torch:google/flan-t5-small \\
      --input 'sentences/*.txt' --output out --task 'translate English to German'

For T5-11B, or on Dataflow, give weights as a state dict: --state_dict_path gs://B/t5-11b.pt
"""

import argparse
from pathlib import Path

import apache_beam as beam

from chatflow.errors import UsageError
from chatflow.models.spec import Model, ModelSpec
from chatflow.options import Batching, WorkerSettings
from chatflow.prompts.templates import load_template
from chatflow.running.launch import beam_options, is_local, quieten
from chatflow.sinks.files import prepare_output
from chatflow.sinks.write import WriteRecords
from chatflow.sources.read import ReadLines, files_of
from chatflow.stages.respond import AskTexts

TEMPLATE = Path(__file__).parent / "prompts" / "task.jinja"


def main(flags: argparse.Namespace, beam_flags: list[str]) -> None:
    options = beam_options(beam_flags)
    quieten(is_local(options))
    spec = ModelSpec(
        flags.model,
        state_dict_path=flags.state_dict_path,
        worker=WorkerSettings(dtype=flags.dtype),
        batching=Batching(max_batch_size=flags.max_batch_size, max_batch_duration_secs=0),
    )
    ask = AskTexts(Model(spec.handler()), load_template(TEMPLATE), {"task": flags.task})
    responses, dead_letters = f"{flags.output}/responses", f"{flags.output}/dead_letters"
    inputs = files_of(flags.input, "--input")
    prepare_output([responses, dead_letters], inputs, streaming=False, local=is_local(options))
    with beam.Pipeline(options=options) as pipeline:
        asked = pipeline | "ReadLines" >> ReadLines(flags.input) | "AskTexts" >> ask
        asked.ok | "WriteResponses" >> WriteRecords([responses])
        asked.dead_letters | "WriteDeadLetters" >> WriteRecords([dead_letters])
    ask.model.forget()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", required=True, help="files with a text a line, local or gs://")
    parser.add_argument("--output", required=True, help="folder for responses and dead letters")
    parser.add_argument("--task", default="summarize", help="what to do (default: %(default)s)")
    parser.add_argument("--model", default="torch:google/flan-t5-small")
    parser.add_argument("--state_dict_path", default="")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max_batch_size", type=int, default=32)
    try:
        main(*parser.parse_known_args())
    except UsageError as error:
        parser.error(str(error))
