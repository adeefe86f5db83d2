"""Runs one side of `bench/model.py`: loads a model, does a file's work, prints figures as JSON.

Each side runs in a separate process; those of other libraries in a separate environment, so
nothing of chatflow is imported here at the top.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

STARTED = time.perf_counter()
END = 1  # Gemma's end token

Ids = list[int]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def cut(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


class Side:
    """A model in some library. A method that the library cannot support is not defined."""

    compilations = 0

    def __init__(self, work: dict[str, Any]):
        self.work = work

    def generate(self, prompts: list[Ids], tokens: int) -> list[Ids]:
        """Returns `tokens` greedy tokens after each prompt, in one batch."""
        raise NotImplementedError

    def read(self, prompts: list[Ids]) -> None:
        """Reads prompts in one batch, and writes nothing."""
        raise NotImplementedError

    def task(self, numbers: list[int]) -> list[str]:
        """Returns the answers to some of the chats, in one batch."""
        raise NotImplementedError


class Jax(Side):
    def __init__(self, work: dict[str, Any]):
        super().__init__(work)
        os.environ["KERAS_BACKEND"] = "jax"
        import jax

        def count(name: str, *_: Any, **__: Any) -> None:
            self.compilations += name == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(count)


def keras_generate(
    model: Any, prompts: Sequence[Ids], length: int, stop: Ids | None = None
) -> list[Ids]:
    """Returns what keras_hub's Gemma 3 writes after each prompt, up to a total length."""
    import numpy as np

    ids = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    mask = np.arange(length)[None] < np.array([len(p) for p in prompts])[:, None]
    images = np.zeros((len(prompts), 0, 1, 1, 3))  # it needs this input, even without images
    given = {"token_ids": ids, "padding_mask": mask, "images": images}
    out = np.asarray(model.generate(given, stop_token_ids=stop)["token_ids"])
    return [row[len(p) :].tolist() for row, p in zip(out, prompts, strict=True)]


class Keras(Jax):
    """keras_hub's `generate`, greedy, padded to the longest prompt of a batch."""

    def __init__(self, work: dict[str, Any]):
        super().__init__(work)
        import keras_hub

        backbone = keras_hub.models.Backbone.from_preset(work["preset"], dtype=work["dtype"])
        self.model = keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=None)
        self.model.compile(sampler="greedy")
        self.tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(work["preset"])

    def generate(
        self, prompts: list[Ids], tokens: int, length: int = 0, stop: Ids | None = None
    ) -> list[Ids]:
        length = length or max(map(len, prompts)) + tokens
        return [ids[:tokens] for ids in keras_generate(self.model, prompts, length, stop)]

    def task(self, numbers: list[int]) -> list[str]:
        prompts = [self.work["json_prompts"][n] for n in numbers]
        answers = self.generate(prompts, self.work["json_tokens"], stop=[END])
        return [str(self.tokenizer.detokenize(ids)) for ids in answers]


class Talks(Keras):
    """The handler of the talks: one prompt at a time, `max_length=1024`."""

    def task(self, numbers: list[int]) -> list[str]:
        prompts = [self.work["talks_prompts"][n] for n in numbers]
        answers = [self.generate([p], 1024 - len(p), length=1024, stop=[END])[0] for p in prompts]
        return [str(self.tokenizer.detokenize(ids)) for ids in answers]


class Llama(Side):
    """llama.cpp's server, in this process: its grammar, its cache of the longest known prefix, and
    as many slots as the largest batch."""

    gguf, slots, context = "gguf_4", 32, 1024

    def __init__(self, work: dict[str, Any]):
        super().__init__(work)
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.port = work[self.gguf], 0
        settings.n_parallel, settings.n_ctx = self.slots, self.slots * self.context
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count() or 1
        self.model = xllamacpp.Server(settings)
        self.pool = concurrent.futures.ThreadPoolExecutor(self.slots)
        pairs = itertools.takewhile(
            lambda ids: len(set(ids)) == 1, zip(*work["json_prompts"], strict=False)
        )
        self.shared = len(list(pairs))
        self.runs = 0

    def ask(self, prompts: Sequence[Ids], tokens: int, **more: Any) -> list[dict[str, Any]]:
        """Returns the answers to prompts, which are sent at once."""
        given = {"n_predict": tokens, "temperature": 0, **more}
        asked = [{"prompt": prompt, **given} for prompt in prompts]
        return list(self.pool.map(self.model.handle_completions, asked))

    def generate(self, prompts: list[Ids], tokens: int) -> list[Ids]:
        answers = self.ask(prompts, tokens, cache_prompt=False, ignore_eos=True)
        assert all(answer["usage"]["completion_tokens"] == tokens for answer in answers)
        return []  # it does not say which

    def read(self, prompts: list[Ids]) -> None:
        self.ask(prompts, 0, cache_prompt=False)

    def task(self, numbers: list[int]) -> list[str]:
        # A token after the examples, so that chats of an earlier run are not in the cache.
        self.runs += 1
        asked = [self.work["json_prompts"][n] for n in numbers]
        prompts = [[*p[: self.shared], 1000 + self.runs, *p[self.shared :]] for p in asked]
        answers = self.ask(prompts, self.work["json_tokens"], json_schema=self.work["schema"])
        return [answer["choices"][0]["text"] for answer in answers]


class Llama8(Llama):
    """The same weights in 8 bits (Q8_0)."""

    gguf = "gguf_8"


class Transformers(Side):
    """transformers' `generate` on PyTorch, greedy, padded on the left."""

    def __init__(self, work: dict[str, Any]):
        super().__init__(work)
        import torch
        import transformers

        self.torch = torch
        torch.set_num_threads(os.cpu_count() or 1)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            work["preset"], dtype=getattr(torch, work["dtype"])
        )

    def generate(self, prompts: list[Ids], tokens: int, stop: int | None = None) -> list[Ids]:
        longest = max(map(len, prompts))
        ids = self.torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = self.torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=stop,
            )
        return [row[longest:].tolist() for row in out]

    def task(self, numbers: list[int]) -> list[str]:
        prompts = [self.work["json_prompts"][n] for n in numbers]
        answers = self.generate(prompts, self.work["json_tokens"], END)
        return ["".join(self.work["pieces"].get(str(i), "?") for i in ids) for ids in answers]


class FewShot(Jax):
    """chatflow's engine with its earlier prompts: tone and summary after examples."""

    heads, questions_name = "", "few_shot"

    def __init__(self, work: dict[str, Any]):
        super().__init__(work)
        import pickle

        from chatflow.models.gemma.handler import GemmaModelHandler
        from chatflow.options import Batching, WorkerSettings

        settings = WorkerSettings(dtype=work["dtype"], quantization=work["quantization"])
        handler = GemmaModelHandler(
            work["model"], False, settings, Batching(max_batch_size=64, max_batch_duration_secs=0),
            heads=self.heads,
        )  # fmt: skip
        self.model = handler.load_model()
        self.questions = pickle.loads(bytes.fromhex(work[self.questions_name]))

    def rows(self, prompts: list[Ids], tokens: int) -> list[Any]:
        from chatflow.models.gemma.engine import Row
        from chatflow.models.gemma.grammar import Text

        texts = [self.work["texts"][self.work["prompts"].index(prompt)] for prompt in prompts]
        return [Row("", text, text=Text(), max_tokens=tokens) for text in texts]

    def generate(self, prompts: list[Ids], tokens: int) -> list[Ids]:
        return [list(r.tokens) for r in self.model.engine.run(self.rows(prompts, tokens))]

    def task(self, numbers: list[int]) -> list[str]:
        requests = [self.questions[n].request for n in numbers]
        return [answer.text for answer in self.model.answer(requests)]


class Ours(FewShot):
    """chatflow today: one reading, all choices, and the summary and the draft composed."""

    heads, questions_name = "support-2", "questions"

    def read(self, prompts: list[Ids]) -> None:
        from chatflow.models.gemma.engine import Reading

        texts = [self.work["texts"][self.work["prompts"].index(prompt)] for prompt in prompts]
        assert self.model.heads is not None
        self.model.engine.read([Reading("", text, ()) for text in texts], self.model.heads.layers)

    @functools.cached_property
    def words(self) -> Any:
        from chatflow.choices.words import words_of
        from chatflow.prompts.templates import default_sources

        return words_of(default_sources(), "base")

    def task(self, numbers: list[int]) -> list[str]:
        import dataclasses

        from chatflow.stages.analyse import read_of, to_analysis
        from chatflow.stages.ask import Answered
        from chatflow.stages.draft import composed

        questions = [self.questions[n] for n in numbers]
        found = []
        answers = self.model.answer([question.request for question in questions])
        for question, answer in zip(questions, answers, strict=True):
            answered = Answered(question, answer)
            analysis = to_analysis(answered)
            if analysis.sentiment == -1:
                read = read_of(answered)
                asked = dataclasses.replace(question, analysis=analysis, read=read)
                composed(asked, answer.model, self.words)
            found.append(
                json.dumps({"sentiment": int(analysis.sentiment), "summary": analysis.summary})
            )
        return found


class Ours8(Ours):
    """chatflow with `--quantization=int8`."""

    def __init__(self, work: dict[str, Any]):
        super().__init__({**work, "quantization": "int8"})


SIDES = {
    "talks": Talks,
    "keras_hub": Keras,
    "llama.cpp, 4 bits": Llama,
    "llama.cpp, 8 bits": Llama8,
    "transformers": Transformers,
    "few_shot": FewShot,
    "chatflow": Ours,
    "chatflow, int8": Ours8,
}


def measure(name: str, work: dict[str, Any]) -> dict[str, Any]:
    side = SIDES[name](work)
    figures: dict[str, Any] = {"side": name, "task": [], "read": [], "engine": []}
    side.task([0])
    figures["seconds_to_first_answer"] = time.perf_counter() - STARTED
    for size, count in work["task"][name]:
        batches = cut(range(count), size)
        if name != "talks":  # every prompt of theirs has the same shape
            side.task(batches[0])  # compiles
        seconds, answers = timed(lambda batches=batches: [a for b in batches for a in side.task(b)])
        figures["task"].append({"batch": size, "seconds_per_chat": seconds / count})
        figures["answers"] = answers
        print(f"{name}: task, batch {size}: {seconds / count:.2f} s/chat", file=sys.stderr)
    for size, count in work["read"].get(name, ()):
        batches = cut(work["prompts"][:count], size)
        read = sum(map(len, work["prompts"][:count]))
        side.read(batches[0])  # compiles
        seconds, _ = timed(lambda batches=batches: [side.read(batch) for batch in batches])
        figures["read"].append({"batch": size, "tokens_per_second": read / seconds})
        print(f"{name}: read, batch {size}: {read / seconds:.0f}/s", file=sys.stderr)
    for size, count in work["engine"][name]:
        batches = cut(work["prompts"][:count], size)
        tokens = work["tokens"]

        def run(tokens: int, batches: list[list[Ids]] = batches) -> list[Ids]:
            return [ids for batch in batches for ids in side.generate(batch, tokens)]

        run(tokens)  # compiles
        seconds, found = timed(functools.partial(run, tokens))
        run(2)
        short, _ = timed(functools.partial(run, 2))
        figures["engine"].append(
            {
                "batch": size,
                "tokens_per_second": tokens * count / seconds,
                "ms_per_step": (seconds - short) / len(batches) / (tokens - 2) * 1000,
            }
        )
        figures["tokens"] = found or None
        print(f"{name}: engine, batch {size}: {tokens * count / seconds:.1f}/s", file=sys.stderr)
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    figures["compilations"] = side.compilations
    return figures


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        given = json.load(file)
    print(json.dumps(measure(sys.argv[1], given)))
