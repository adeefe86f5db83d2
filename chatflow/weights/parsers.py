"""The flags of `chatflow model save-state-dict` and `info`; the rest is imported when they run."""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ("float16", "bfloat16", "float32")

VERTEX_FLAGS = {
    "project": "of Google Cloud; default: GOOGLE_CLOUD_PROJECT",
    "region": "e.g. us-central1; default: GOOGLE_CLOUD_LOCATION",
    "image": "chatflow's container image with PyTorch (chatflow[torch])",
    "machine_type": "default: what `chatflow model info` suggests",
    "disk_size_gb": "at least 100; default: what `chatflow model info` suggests",
    "staging_bucket": "gs:// folder for what the job writes beside PATH",
    "service_account": "whom the job runs as; default: that of the project's custom jobs",
    "api_endpoint": "address of the API instead of Google's; http:// is called without credentials",
}


def add_save(commands: Any) -> None:
    parser = commands.add_parser(
        "save-state-dict",
        help="write a model's weights as one file of a chosen precision",
        description="Writes the state_dict of a model of Hugging Face's as one file, which Beam's "
        "PytorchModelHandler and --state_dict_path read, tensor by tensor: neither the model nor "
        "the file is ever in memory as a whole. Its SHA-256 is put beside it. "
        "--on=vertex does the same on a machine of Vertex AI.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", metavar="NAME", help="a model on the hub (google/flan-t5-xl), a folder, or gs://…"
    )
    parser.add_argument(
        "path", metavar="PATH", help="the file, local or gs://: .pt, .pth or .safetensors"
    )
    _add_common(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at PATH")
    group = parser.add_argument_group("on Vertex AI")
    group.add_argument(
        "--on", choices=("here", "vertex"), default="here", help="where (default: %(default)s)"
    )
    for name, help in VERTEX_FLAGS.items():
        metavar = name.rsplit("_", 1)[-1].upper()
        group.add_argument(f"--{name}", default="", metavar=metavar, help=help)
    group.add_argument(
        "--no_wait_until_finish", action="store_true", help="start the job, print its id, and end"
    )
    parser.set_defaults(act=_save)


def add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="parameters, memory and machines of a model",
        description="Computes what it takes to write a model's state dict, to load it and to run "
        "it, and the smallest machines for that; without NAME, for Flan-T5, Flan-UL2 and Gemma. "
        "chatflow size says more of what runs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", default="",
        help="a model on the hub (google/flan-t5-xl), a folder, gs://…, a Gemma, or a state dict",
    )  # fmt: skip
    _add_common(parser)
    parser.set_defaults(act=_info)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="precision (default: %(default)s)"
    )
    parser.add_argument("--summary", choices=("table", "json"), default="table")


def _save(parsed: argparse.Namespace) -> int:
    from chatflow.weights.save import act

    return act(parsed)


def _info(parsed: argparse.Namespace) -> int:
    from chatflow.weights.info import act

    return act(parsed)
