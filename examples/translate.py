"""Runs a task of T5, such as translation or summary, on each line of files.

    python examples/translate.py --model torch:google/flan-t5-small \\
      --input 'sentences/*.txt' --output out --task 'translate English to German'

For T5-11B, or on Dataflow, give weights as a state dict: --state_dict_path gs://B/t5-11b.pt
"""

import argparse
from pathlib import Path

from chatflow import (
    AskTexts,
    Batching,
    Model,
    ModelSpec,
    ReadLines,
    UsageError,
    WorkerSettings,
    WriteRecords,
    launch,
    load_template,
    new_pipeline,
)

TEMPLATE = Path(__file__).parent / "prompts" / "task.jinja"


def main(flags: argparse.Namespace, beam_flags: list[str]) -> None:
    spec = ModelSpec(
        flags.model,
        state_dict_path=flags.state_dict_path,
        worker=WorkerSettings(dtype=flags.dtype),
        batching=Batching(max_batch_size=flags.max_batch_size, max_batch_duration_secs=0),
    )
    ask = AskTexts(Model(spec.handler()), load_template(TEMPLATE), {"task": flags.task})
    pipeline = new_pipeline(beam_flags)
    asked = pipeline | "ReadLines" >> ReadLines(flags.input) | "AskTexts" >> ask
    asked.ok | "WriteResponses" >> WriteRecords([f"{flags.output}/responses"])
    asked.dead_letters | "WriteDeadLetters" >> WriteRecords([f"{flags.output}/dead_letters"])
    launch(pipeline)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", required=True, help="files, a text per line; local or gs://")
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
