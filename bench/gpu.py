"""Measures the engine on a GPU, with random weights of real shapes: no download is needed.

    python bench/gpu.py                   # Gemma 3 1B and 4B in bfloat16
    python bench/gpu.py --shapes tiny     # tries the script itself, anywhere

Measures chats per second (a prompt of 512 tokens, 64 greedy tokens) of the handler of the
talks (one prompt at a time, `generate`, `max_length=1024`), of keras_hub's `generate` in
batches and of chatflow, at batch 1 to 64; and the share of the memory bandwidth bound at
each, and of the best throughput. Prints a line of JSON with the date and the card.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from chatflow.weights.presets import local_preset, use_jax

use_jax()
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras_hub  # noqa: E402
from sides import keras_generate  # noqa: E402

from chatflow.models.gemma.engine import Engine, Row  # noqa: E402
from chatflow.models.gemma.grammar import Text  # noqa: E402
from chatflow.weights.keras_loading import without_initial_values  # noqa: E402

# From the presets' own config.json.
SHAPES = {
    "1b": {
        "num_layers": 26, "num_query_heads": 4, "num_key_value_heads": 1, "hidden_dim": 1152,
        "intermediate_dim": 6912, "head_dim": 256, "sliding_window_size": 512,
    },
    "4b": {
        "num_layers": 34, "num_query_heads": 8, "num_key_value_heads": 4, "hidden_dim": 2560,
        "intermediate_dim": 10240, "head_dim": 256, "sliding_window_size": 1024,
    },
    "tiny": {
        "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 32,
        "intermediate_dim": 64, "head_dim": 16, "sliding_window_size": 16,
    },
}  # fmt: skip


def random_backbone(shape: dict[str, Any], dtype: str) -> Any:
    with without_initial_values():
        backbone = keras_hub.models.Gemma3Backbone(
            vocabulary_size=262144, image_size=None, vision_encoder=None,
            use_sliding_window_attention=True, dtype=dtype, **shape,
        )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(backbone.weights))
    for key, variable in zip(keys, backbone.weights, strict=True):
        variable.assign(0.02 * jax.random.normal(key, variable.shape, variable.dtype))
    return backbone


def best(function: Callable[[], Any], times: int = 3) -> float:
    function()  # compiles
    found = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def copy_bandwidth() -> float:
    """Returns the bytes read and written in a second."""
    source = jnp.ones(1 << 28 if jax.default_backend() != "cpu" else 1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * source.nbytes / best(lambda: copy(source).block_until_ready())


def measure(name: str, dtype: str, batches: list[int], tokens: int, answer: int) -> dict[str, Any]:
    engine = Engine(
        random_backbone(SHAPES[name], dtype),
        keras_hub.tokenizers.Tokenizer.from_preset(local_preset("gemma3-270m")),
    )
    weights = sum(value.nbytes for value in engine.forward.weights)
    bound = weights / copy_bandwidth()
    text = "the parcel is late and nobody answers " * tokens
    prompts = [engine.encode(f"{number} {text}")[:tokens] for number in range(max(batches))]
    texts = [str(engine.tokenizer.detokenize(ids)) for ids in prompts]
    model = engine.forward.model
    model.compile(sampler="greedy")

    def generate(rows: int, length: int) -> None:
        keras_generate(model, prompts[:rows], length)

    def ours(rows: int, steps: int) -> None:
        engine.run([Row("", text, text=Text(), max_tokens=steps) for text in texts[:rows]])

    talks = best(lambda: generate(1, 2 * tokens), 1)
    found = {"shape": name, "weights_gb": weights / 1e9, "talks_chats_per_second": 1 / talks}
    found["batches"] = []
    for rows in batches:
        theirs = best(lambda rows=rows: generate(rows, tokens + answer))
        whole = best(lambda rows=rows: ours(rows, answer))
        step = (whole - best(lambda rows=rows: ours(rows, 2))) / (answer - 2)
        found["batches"].append(
            {
                "rows": rows,
                "keras_hub_chats_per_second": rows / theirs,
                "chatflow_chats_per_second": rows / whole,
                "to_talks": talks * rows / whole,
                "to_keras_hub": theirs / whole,
                "ms_per_step": step * 1000,
                "of_bandwidth_bound": bound / step,
            }
        )
        print(found["batches"][-1], file=sys.stderr)
    top = max(row["chatflow_chats_per_second"] for row in found["batches"])
    for row in found["batches"]:
        row["of_best_throughput"] = row["chatflow_chats_per_second"] / top
    found["compilations"] = engine.forward.compilations
    return found


def bench() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default="1b,4b", help="1b, 4b, tiny; separated with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batches", default="1,8,64", help="separated with commas")
    flags = parser.parse_args()
    batches = [int(rows) for rows in flags.batches.split(",")]
    figures = []
    for name in flags.shapes.split(","):
        tokens, answer = (64, 8) if name == "tiny" else (512, 64)
        figures.append(measure(name, flags.dtype, batches, tokens, answer))
    device = jax.devices()[0]
    print(
        json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "device": device.device_kind,
                "shapes": figures,
            }
        )
    )


if __name__ == "__main__":
    bench()
