"""Every flag, in one place: type, default, help and check.

The command line, its `--help` and the README's table are made from `Options`. Flags
that are not here are Beam's and go to the runner.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from chatflow.errors import UsageError, one_line

DEFAULT_MODEL = "gemma3-270m"


def _flag(
    default: Any, help: str, group: str, choices: Sequence[str] = (), least: float = 0
) -> Any:
    metadata = {"help": help, "group": group, "choices": tuple(choices), "least": least}
    return dataclasses.field(default=default, metadata=metadata)


_DATA, _CHATS, _MODEL = "data", "messages to chats", "model and prompts"
_WORKER, _REMOTE, _RUN = "models on the workers", "remote models", "running"


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `chatflow run`; a field is a flag of the same name."""

    input: str = _flag(
        "", "Chats and messages to read: globs of JSON Lines files or folders, local or gs://; or "
        "Pub/Sub: projects/P/subscriptions/S or projects/P/topics/T. Several are divided by "
        "commas.", _DATA,
    )  # fmt: skip
    output: str = _flag(
        "", "Folder for analyses*.jsonl, drafts*.jsonl and dead_letters*.jsonl. Those of an "
        "earlier run in it are replaced; a stream adds to them.", _DATA,
    )  # fmt: skip
    analyses: str = _flag(
        "", "Where analyses go instead: file prefixes, Pub/Sub topics (projects/P/topics/T), "
        "BigQuery tables (bigquery://P.DATASET.TABLE), the tables of a database (as --database) "
        "and webhooks (https://…), divided by commas.", _DATA,
    )  # fmt: skip
    drafts: str = _flag("", "Where drafts go instead.", _DATA)
    dead_letters: str = _flag("", "Where dead letters go instead.", _DATA)
    database: str = _flag(
        "", "Database of `chatflow console`: chats, analyses, drafts and dead letters go there, "
        "besides the other destinations: sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME.",
        _DATA,
    )  # fmt: skip
    database_password: str = _flag(
        "", "Where the database's password is, as for --webhook_secret; or as libpq finds it.",
        _DATA,
    )  # fmt: skip
    webhook_secret: str = _flag(
        "", "Where the secret is by which webhooks are signed, never the secret itself: env:NAME, "
        "file:PATH (local or gs://…), or projects/P/secrets/S/versions/V of Secret Manager. "
        "Workers read it when they start.", _DATA,
    )  # fmt: skip
    id_label: str = _flag(
        "", "Attribute of Pub/Sub messages by whose value the runner leaves out repeated ones "
        "(Dataflow does; everywhere, messages are told apart by their message_id).", _DATA,
    )  # fmt: skip
    max_line_bytes: int = _flag(
        16_000_000, "A longer input line becomes a dead letter.", _DATA, least=1
    )
    quiet_seconds: float = _flag(
        60.0, "A chat that comes as single messages is analysed when nothing was said in it for "
        "so long (event time), and when it is closed.", _CHATS, least=0.001,
    )  # fmt: skip
    every_messages: int = _flag(
        20, "While it goes on, it is analysed each time after so many messages; 0: never.",
        _CHATS, least=0,
    )  # fmt: skip
    max_messages: int = _flag(
        500, "Newest messages of a chat that are kept; older ones are dropped, and counted.",
        _CHATS, least=1,
    )  # fmt: skip
    retention_hours: float = _flag(
        24.0, "A chat is forgotten so long after its last message; a message whose sent_at is "
        "further than this before its publication is dated by its publication.",
        _CHATS, least=0.001,
    )  # fmt: skip
    inference: str = _flag(
        "on_worker", "Where the model runs.", _MODEL, choices=("on_worker", "remote")
    )
    model: str = _flag(
        DEFAULT_MODEL,
        "The model. On the worker: gemma3-270m (embedded, needs no download), any Gemma preset of "
        "keras_hub (gemma3_instruct_1b, …), a folder, hf://…, kaggle://… or gs://…; torch:NAME for "
        "T5 and other text models on PyTorch, vllm:NAME for one that vLLM serves on the worker's "
        "GPU (google/flan-t5-small, google/gemma-3-1b-it, a folder, gs://…). "
        "Remotely: gemini-… or projects/P/locations/L/endpoints/E on Vertex AI. "
        "scripted:FILE answers from a script, for tests.",
        _MODEL,
    )
    model_kind: str = _flag(
        "auto", "Whether the model continues text (base) or follows instructions (instruct); "
        "auto: by its name.", _MODEL, choices=("auto", "base", "instruct"),
    )  # fmt: skip
    prompts: str = _flag(
        "", "Folder with analysis.jinja and apology.jinja; default: chatflow's own for the "
        "model's kind.", _MODEL,
    )  # fmt: skip
    models: str = _flag(
        "", "YAML file that says by an attribute of the chats (tenant, language) which model, "
        "prompts and thresholds they have; see docs/systems.md.", _MODEL,
    )  # fmt: skip
    model_updates: str = _flag(
        "", "Files among which the newest is what the model's weights come from, e.g. "
        "gs://B/models/*/SHA256SUMS.json for folders, gs://B/adapters/*.lora.h5 or "
        "gs://B/*.pt: taken up at the start, and in streams while they run.", _MODEL,
    )  # fmt: skip
    prompt_updates: str = _flag(
        "false", "In streams, read the templates again, and take up what is new.", _MODEL,
        choices=("true", "false"),
    )  # fmt: skip
    update_seconds: float = _flag(
        60.0, "Between two looks for new weights and templates.", _MODEL, least=0.1,
    )  # fmt: skip
    max_prompt_tokens: int = _flag(
        1536, "Budget of one prompt; the oldest messages are left out first, and the record "
        "says so.", _MODEL, least=64,
    )  # fmt: skip
    max_batch_size: int = _flag(
        32,
        "Most requests in one batch to a model on the worker; to vLLM, at once.",
        _MODEL,
        least=1,
    )
    max_batch_duration_secs: float = _flag(
        0.2, "In streams, how long a request waits for others to fill its batch; 0: only those "
        "of its bundle.", _MODEL, least=0,
    )  # fmt: skip
    batch_buckets: str = _flag(
        "", "In streams, lengths of prompts in tokens, e.g. 256,512, between which requests are "
        "batched apart; default: together.", _MODEL,
    )  # fmt: skip
    state_dict_path: str = _flag(
        "", "Weights of a torch: model, instead of its folder's: a state dict of PyTorch's "
        "(torch.save) or a file of safetensors, local or gs://.", _WORKER,
    )  # fmt: skip
    adapter: str = _flag(
        "auto", "LoRA weights of a Gemma on the worker, as `chatflow tune` makes them, "
        "*.lora.h5, local or gs://; auto: chatflow's own, where the prompts have tone_bias for it; "
        "none.",
        _WORKER,
    )  # fmt: skip
    dtype: str = _flag(
        "auto", "Precision of the weights; auto: bfloat16 on an accelerator, else that of "
        "--state_dict_path, else float32. float16: for torch: models.",
        _WORKER, choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    quantization: str = _flag(
        "none", "Weights of 8 bits, by Keras: a quarter of the memory of float32, answers that "
        "differ a little.", _WORKER, choices=("none", "int8"),
    )  # fmt: skip
    large_model: str = _flag(
        "true", "One copy of the weights serves all processes of a worker; false: each process "
        "loads its own.", _WORKER, choices=("true", "false"),
    )  # fmt: skip
    model_copies: int = _flag(
        1, "Copies of the weights by worker, which take requests in turn.", _WORKER, least=1,
    )  # fmt: skip
    vllm_args: str = _flag(
        "", "Flags of vLLM's server, e.g. tensor-parallel-size=2,gpu-memory-utilization=0.9; they "
        "go before chatflow's.", _WORKER,
    )  # fmt: skip
    accelerator: str = _flag(
        "", "Resource hint of the inference steps, e.g. "
        "type:nvidia-l4;count:1;install-nvidia-driver, for runners that choose machines by it.",
        _WORKER,
    )  # fmt: skip
    min_ram: str = _flag(
        "", "Resource hint of the inference steps, e.g. 16GB.", _WORKER
    )  # fmt: skip
    location: str = _flag(
        "", "Location of a Gemini model, e.g. global; default: Beam's --region, or "
        "GOOGLE_CLOUD_LOCATION.", _REMOTE,
    )  # fmt: skip
    api_endpoint: str = _flag(
        "", "Address of the Vertex AI API instead of Google's; one with http:// is called "
        "without credentials.", _REMOTE,
    )  # fmt: skip
    endpoint_override: str = _flag(
        "", "Address at which an endpoint answers: of a Private Service Connect forwarding rule, "
        "or any other. The endpoint is not looked up then.", _REMOTE,
    )  # fmt: skip
    check_endpoint: str = _flag(
        "true", "At launch, ask whether the model is there, at no cost; where the service cannot "
        "be reached from here, the job is started all the same.", _REMOTE,
        choices=("true", "false"),
    )  # fmt: skip
    request_format: str = _flag(
        "chat_completions", "What an endpoint is sent: instances of chat completions (Model "
        "Garden's vLLM containers); the same as a raw prediction (containers with OpenAI's "
        "route); or instances with a prompt.", _REMOTE,
        choices=("chat_completions", "raw_predict", "prompt"),
    )  # fmt: skip
    response_format: str = _flag(
        "response_format", "How an endpoint or vLLM is told the JSON schema of its answer: as "
        "OpenAI, as vLLM from 0.12 on, as vLLM before, or not at all.", _REMOTE,
        choices=("response_format", "structured_outputs", "guided_json", "none"),
    )  # fmt: skip
    thinking: str = _flag(
        "auto", "How much a Gemini model thinks before it answers, which is paid for: a level "
        "(minimal, low, medium, high), a number of tokens (Gemini 2.5), none to leave it to the "
        "model, or auto for as little as it takes.", _REMOTE,
    )  # fmt: skip
    max_in_flight: int = _flag(
        16, "Most calls at once to a remote model, by worker process.", _REMOTE, least=1
    )
    max_requests_per_second: float = _flag(
        0.0, "Most calls a second to a remote model, by worker process; 0: as many as it takes.",
        _REMOTE, least=0,
    )  # fmt: skip
    rate_limit_service: str = _flag(
        "", "HOST:PORT of an Envoy rate limit service that all workers ask before each call "
        "(domain chatflow, descriptor model).", _REMOTE,
    )  # fmt: skip
    request_timeout: float = _flag(
        60.0, "Seconds for one call to a remote model or to vLLM, to the last byte of its answer.",
        _REMOTE, least=0.1,
    )  # fmt: skip
    retry_seconds: float = _flag(
        120.0, "What failed calls for one prompt, and the waiting after them, may take, before "
        "it becomes a dead letter.", _REMOTE, least=0,
    )  # fmt: skip
    prices: str = _flag(
        "", "TOML file with prices of models, for the estimated cost in the summary; default: "
        "chatflow/prices.toml.", _REMOTE,
    )  # fmt: skip
    summary: str = _flag(
        "table", "What is printed at the end: a table of results and counts, or the counts as "
        "one line of JSON.", _RUN, choices=("table", "json"),
    )  # fmt: skip
    show: int = _flag(100, "Most results in the table.", _RUN)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise UsageError(f"--{field.name}={value}: must be one of {', '.join(choices)}")
            if isinstance(value, (int, float)) and value < field.metadata["least"]:
                raise UsageError(
                    f"--{field.name}={value}: must be at least {field.metadata['least']}"
                )
        if self.quiet_seconds >= self.retention_hours * 3600:
            raise UsageError(
                f"--quiet_seconds={self.quiet_seconds}: must be less than "
                f"--retention_hours={self.retention_hours} ({self.retention_hours * 3600:.0f} s)"
            )
        if self.vllm_args and not self.model.startswith("vllm:"):
            raise UsageError("--vllm_args: only with --model=vllm:…")
        if self.model_copies > 1 and self.large_model == "false":
            raise UsageError("--model_copies: only with --large_model=true, which counts them")
        _ = self.bucket_boundaries, self.resource_hints

    @property
    def bucket_boundaries(self) -> tuple[int, ...]:
        """`batch_buckets` as numbers, in order."""
        try:
            numbers = sorted({int(number) for number in self.batch_buckets.split(",") if number})
        except ValueError:
            numbers = [0]
        if any(number < 1 for number in numbers):
            raise UsageError(f"--batch_buckets={self.batch_buckets}: must be numbers, e.g. 256,512")
        return tuple(numbers)

    @property
    def resource_hints(self) -> dict[str, str]:
        """Beam's resource hints of the inference steps."""
        from apache_beam.transforms.resources import parse_resource_hints

        hints = {"accelerator": self.accelerator, "min_ram": self.min_ram}
        given = {name: value for name, value in hints.items() if value}
        for name, value in given.items():
            try:
                parse_resource_hints({name: value})
            except ValueError as error:
                raise UsageError(f"--{name}={value}: {one_line(error)}") from None
        return given

    def flags(self) -> list[str]:
        """The flags that are not at their defaults, as a command line has them."""
        return [
            f"--{field.name}={value}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]

    @classmethod
    def defaults(cls) -> dict[str, dict[str, Any]]:
        """By flag: its default, help and choices; what documentation is made from."""
        return {
            field.name: {"default": field.default, **field.metadata}
            for field in dataclasses.fields(cls)
        }


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags as a `UsageError`."""

    def error(self, message: str) -> Any:
        raise UsageError(message)


def add_flags(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = (), only: Sequence[str] = ()
) -> None:
    groups: dict[str, Any] = {}
    for name, flag in Options.defaults().items():
        if name in leave_out or (only and name not in only):
            continue
        group = flag["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        shown = "" if flag["default"] == "" else " (default: %(default)s)"
        groups[group].add_argument(
            f"--{name}",
            default=flag["default"],
            type=type(flag["default"]),
            choices=flag["choices"] or None,
            metavar=None if flag["choices"] else name.rsplit("_", 1)[-1].upper(),
            help=flag["help"] + shown,
        )


def from_flags(parsed: argparse.Namespace, required: Sequence[str] = ()) -> Options:
    """Options from parsed flags.

    Raises:
      UsageError: a required flag is missing, or a value is out of its range.
    """
    for name in required:
        if not getattr(parsed, name):
            raise UsageError(f"--{name} is missing: {Options.defaults()[name]['help']}")
    names = [field.name for field in dataclasses.fields(Options)]
    return Options(**{name: getattr(parsed, name) for name in names if hasattr(parsed, name)})


class Cloud(NamedTuple):
    """A Google Cloud project and location, empty where unknown."""

    project: str = ""
    location: str = ""


NO_CLOUD = Cloud()
