"""A model of your own: it hears the tone of a chat in a few words.

    python examples/own_model.py [FOLDER]

Reads samples/chats.jsonl and writes FOLDER/analyses and FOLDER/dead_letters.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam

from chatflow import (
    AnalyseChats,
    Analysis,
    AnalysisPrompt,
    Answer,
    Failure,
    LanguageModel,
    LanguageModelHandler,
    Model,
    ModelSpec,
    Options,
    ParseArrivals,
    ReadArrivals,
    Request,
    WriteRecords,
    launch,
    load_folder,
    new_pipeline,
)

CHATS = Path(__file__).parent.parent / "samples" / "chats.jsonl"
TONES = {-1: ("annoyed", "never again", "no excuse", "rude"), 1: ("thank", "great", "lovely")}


# A model answers a batch: one `Answer` or `Failure` per request, in order. Here it gets the whole
# prompt, and listens to what the customer says behind the words "Chat history:".
class WordsModel(LanguageModel):
    """Finds the tone by words, and quotes the customer's last message as the summary."""

    def answer(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        return [self.hear(request) for request in requests]

    def hear(self, request: Request) -> Answer | Failure:
        """Returns the JSON that the prompt asks for."""
        lines = request.parts[0].prompt.rpartition("Chat history:")[2].splitlines()
        mark = f" {request.user_id}: "
        said = [line.partition(mark)[2] for line in lines if mark in line]
        if not said:
            return Failure("no_words", f"user {request.user_id} says nothing in the prompt")
        words = " ".join(said).lower()
        tone = next((tone for tone, marks in TONES.items() if any(m in words for m in marks)), 0)
        return Answer(json.dumps({"sentiment": tone, "summary": said[-1]}), "words")


# A handler travels to the workers, and loads the model there, once for all steps of a process.
class WordsHandler(LanguageModelHandler[WordsModel]):
    """Loads a `WordsModel`; a model with weights would read them here."""

    def load(self, version: object = None) -> WordsModel:
        return WordsModel()


folder = sys.argv[1] if len(sys.argv) > 1 else "out/own_model"
options = Options(input=str(CHATS))
# A kind of model that writes JSON itself, as scripted ones do, is asked in one prompt.
prompt = AnalysisPrompt(load_folder("instruct")["analysis"], ModelSpec("scripted:words"))

pipeline = new_pipeline()
read = pipeline | ReadArrivals([options.input]) | ParseArrivals(options.max_line_bytes)
analysed = read.chats | AnalyseChats(Model(WordsHandler("words")), prompt)
analyses = analysed.analysed | "Take" >> beam.Map(lambda found: found.analysis)
analyses.element_type = Analysis
analyses | "WriteAnalyses" >> WriteRecords([f"{folder}/analyses"])
dead_letters = (read.dead_letters, analysed.dead_letters) | beam.Flatten()
dead_letters | "WriteDeadLetters" >> WriteRecords([f"{folder}/dead_letters"])
launch(pipeline)
