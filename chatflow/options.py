"""Declares each flag of a pipeline once: type, default, help, choices and least value.

A flag is a field of the settings that use it; `Options` has all of them. The command line, the
README's table and the Flex Template are made from it. All other flags are Beam's.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from chatflow.errors import UsageError, one_line

DEFAULT_MODEL = "gemma3-270m"

GROUPS = _DATA, _CHATS, _MODEL, _WORKER, _REMOTE, _RUN = (
    "data", "messages to chats", "model and prompts",
    "models on the workers", "remote models", "running",
)  # fmt: skip


def flag(
    default: Any,
    help: str,
    group: str,
    choices: Sequence[str] = (),
    least: float = 0,
    shown: bool = True,
) -> Any:
    """Returns a field of settings that is a flag of the same name and of the default's type.

    A boolean is `--name`, `--name=true` or `--noname`. Use `shown=False` to leave the flag out of
    printed settings if somebody may write a secret into it by mistake.
    """
    choices = ("true", "false") if isinstance(default, bool) else tuple(choices)
    metadata = {"help": help, "group": group, "choices": choices, "least": least}
    return dataclasses.field(default=default, metadata=metadata, repr=shown)


SettingsT = TypeVar("SettingsT", bound="Settings")


MAX_LINE_BYTES = 16_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of settings; raises `UsageError` for a flag with a wrong choice or a low number."""

    def __post_init__(self) -> None:
        for name, known in self.defaults().items():
            value, choices = getattr(self, name), known["choices"]
            if isinstance(known["default"], bool):
                continue
            if choices and value not in choices:
                raise UsageError(f"--{name}={value}: must be one of {', '.join(choices)}")
            if isinstance(value, (int, float)) and not known["least"] <= value < math.inf:
                raise UsageError(f"--{name}={value}: must be at least {known['least']}")

    def take(self, kind: type[SettingsT]) -> SettingsT:
        """Returns the part of these settings that `kind` declares."""
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})

    @classmethod
    def defaults(cls) -> dict[str, dict[str, Any]]:
        """Returns default, help, group, choices and least value by flag, sorted by group."""
        flags = [f for f in dataclasses.fields(cls) if f.metadata]
        flags.sort(key=lambda f: GROUPS.index(f.metadata["group"]))
        return {f.name: {"default": f.default, **f.metadata} for f in flags}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places(Settings):
    """What to read, and where results go."""

    input: str = flag(
        "", "Chats and messages to read: globs of files or folders, local or gs://; or "
        "Pub/Sub: projects/P/subscriptions/S or projects/P/topics/T. Separate several "
        "with commas.", _DATA,
    )  # fmt: skip
    output: str = flag(
        "", "Folder for analyses*.jsonl, drafts*.jsonl and dead_letters*.jsonl. A run on files "
        "replaces those of an earlier run; a stream adds to them.", _DATA,
    )  # fmt: skip
    analyses: str = flag(
        "", "Where analyses go instead: file prefixes, tables as files (NAME.csv, NAME.parquet), "
        "Pub/Sub topics (projects/P/topics/T), BigQuery tables (bigquery://P.DATASET.TABLE), "
        "databases (as for --database) or webhooks (https://…). Separate several with commas.",
        _DATA,
    )  # fmt: skip
    drafts: str = flag("", "Where drafts go instead.", _DATA)
    dead_letters: str = flag("", "Where dead letters go instead.", _DATA)
    database: str = flag(
        "", "Database of `chatflow console`: sqlite:///FILE or "
        "postgresql+psycopg://USER@HOST/NAME. Chats, analyses, drafts and dead letters go there "
        "and to the other destinations.", _DATA,
    )  # fmt: skip
    skip_done: str = flag(
        "", "Earlier results: a glob or folder of files, or a database. Skips chats that have an "
        "analysis there with the same content, prompt and model. Only for input from files.", _DATA,
    )  # fmt: skip
    answers: str = flag(
        "", "Database, as for --database, that keeps each model answer as soon as it arrives, so "
        "that no question is paid for twice, even after a run was stopped.", _DATA,
    )  # fmt: skip
    id_label: str = flag(
        "", "Attribute of Pub/Sub messages whose value identifies repeated ones, which the runner "
        "drops if it can (Dataflow does). chatflow itself drops repeated message_ids.", _DATA,
    )  # fmt: skip
    roles: str = flag(
        "", "Roles that your system has and chatflow does not know, as THEIRS=OURS,…; OURS is "
        "customer, agent, bot or system.", _DATA,
    )  # fmt: skip
    placeholders: str = flag(
        "", "File with more texts that your system writes instead of words, such as \"This message "
        "was deleted\", one per line.", _DATA,
    )  # fmt: skip
    input_format: str = flag(
        "auto", "Format of the input; auto: recognised by how each file begins. Otherwise "
        "chatflow (its own JSON), csv, parquet, slack, whatsapp, convokit, or JSON of "
        "cx_insights, contact_lens, genesys, zendesk, intercom, chatwoot, telegram, openai or "
        "sharegpt.", _DATA,
    )  # fmt: skip
    columns: str = flag(
        "", "Which column of a table holds which field, as FIELD=COLUMN,…; fields are chat, text, "
        "who (the role), user, at, id, reply and private. Not needed for columns with usual names.",
        _DATA,
    )  # fmt: skip
    max_line_bytes: int = flag(
        MAX_LINE_BYTES, "A longer input line becomes a dead letter.", _DATA, least=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkSettings(Settings):
    """How to write records.

    Attributes:
      streaming: whether the records come from a stream, which never ends.
      fields: names of an analysis's `fields` that get their own columns in CSV and Parquet.
    """

    database_password: str = flag(
        "", "Where the password of the database is, in a form that --webhook_secret takes. "
        "Default: where libpq looks for it.", _DATA, shown=False,
    )  # fmt: skip
    webhook_secret: str = flag(
        "", "Where the secret that signs webhooks is, never the secret itself: env:NAME, "
        "file:PATH (local or gs://…), or projects/P/secrets/S/versions/V of Secret Manager. "
        "Workers read it when they start.", _DATA, shown=False,
    )  # fmt: skip
    streaming: bool = False
    fields: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedactionSettings(Settings):
    """Which personal data to leave out of prompts and results."""

    redact: str = flag(
        "", "Personal data to replace with placeholders such as [EMAIL_1] before any model or sink "
        "gets it: all, or some of url, email, iban, card, ip, phone, address, id (national ids) "
        "and name (what the chat itself calls people). "
        "dlp:projects/P/locations/L/inspectTemplates/T or dlp:TYPE+TYPE also asks Google's "
        "Sensitive Data Protection. Separate several with commas.", _DATA,
    )  # fmt: skip
    redact_countries: str = flag(
        "US,GB,DE", "Countries whose national ids, addresses and phone numbers to look for.",
        _DATA,
    )  # fmt: skip
    redact_patterns: str = flag(
        "", "TOML file with your own kinds of personal data: NAME = 'regular expression', one per "
        "line.", _DATA,
    )  # fmt: skip
    redact_key: str = flag(
        "", "Where a key is, in a form that --webhook_secret takes. Ids that are personal data "
        "become hashes; without the key nobody can find an id by trying many.", _DATA, shown=False,
    )  # fmt: skip
    keep_raw: str = flag(
        "", "Where to keep the original chats and what each placeholder stands for: a database, "
        "from which `chatflow console` fills them in, or a file prefix. Default: nowhere.", _DATA,
    )  # fmt: skip


MOST_HOURS = 876_000
"""A hundred years: a time plus or minus that many hours is still valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules(Settings):
    """When to analyse a chat that arrives as single messages, and how much of it to keep."""

    quiet_seconds: float = flag(
        60.0, "A chat that arrives as single messages is analysed when it is closed, or when it "
        "has had no message for this many seconds (event time).", _CHATS, least=0.001,
    )  # fmt: skip
    every_messages: int = flag(
        20, "While such a chat goes on, it is also analysed each time this many messages have "
        "arrived; 0: never.", _CHATS, least=0,
    )  # fmt: skip
    max_messages: int = flag(
        500, "Number of newest messages of a chat to keep; older ones are dropped and counted.",
        _CHATS, least=1,
    )  # fmt: skip
    retention_hours: float = flag(
        24.0, "How long a chat is kept after its last message. A message whose sent_at is further "
        "than this before its publication gets the time of its publication instead.",
        _CHATS, least=0.001,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("quiet_seconds", "retention_hours"):
            if (value := getattr(self, name)) > MOST_HOURS:
                raise UsageError(f"--{name}={value}: must be at most {MOST_HOURS}")
        if self.quiet >= self.retention:
            raise UsageError(
                f"--quiet_seconds={self.quiet_seconds}: must be less than "
                f"--retention_hours={self.retention_hours} ({self.retention_hours * 3600:.0f} s)"
            )

    @property
    def quiet(self) -> timedelta:
        return timedelta(seconds=self.quiet_seconds)

    @property
    def retention(self) -> timedelta:
        return timedelta(hours=self.retention_hours)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model to ask, and with which prompts."""

    inference: str = flag(
        "on_worker", "Where the model runs.", _MODEL, choices=("on_worker", "remote")
    )
    model: str = flag(
        DEFAULT_MODEL,
        "The model. On the worker: gemma3-270m (embedded, needs no download), a keras_hub preset "
        "of Gemma, Llama 3, Qwen 3 or SmolLM 3 (gemma3_instruct_1b, qwen3_4b_en, …), a "
        "folder, hf://…, kaggle://… or gs://…. Also torch:NAME for "
        "T5 and other text models on PyTorch, and vllm:NAME for one that vLLM serves on the worker's "
        "GPU (google/flan-t5-small, google/gemma-3-1b-it, a folder, gs://…). "
        "Remotely: gemini-… or projects/P/locations/L/endpoints/E on Vertex AI, openai:NAME at "
        "--api_endpoint, anthropic:NAME. "
        "scripted:FILE answers from a script, for tests.",
        _MODEL,
    )
    model_kind: str = flag(
        "auto", "Whether the model continues text (base) or follows instructions (instruct); "
        "auto: by its name.", _MODEL, choices=("auto", "base", "instruct"),
    )  # fmt: skip
    prompts: str = flag(
        "", "Folder with analysis.jinja and apology.jinja; default: chatflow's own for the "
        "model's kind.", _MODEL,
    )  # fmt: skip
    models: str = flag(
        "", "YAML file that chooses model, prompts and thresholds by an attribute of the chats, "
        "such as tenant or language; see docs/how-to/models.md.", _MODEL,
    )  # fmt: skip
    draft_model: str = flag(
        "", "Another model that writes the drafts, named as for --model; its name decides where "
        "it runs.", _MODEL,
    )  # fmt: skip
    escalate_model: str = flag(
        "", "Another model that analyses again the chats that the first one is not sure of.", _MODEL
    )  # fmt: skip
    escalate_below: str = flag(
        "", "Confidence of the first model, by field, below which --escalate_model is asked, e.g. "
        "tone:0.8,resolved:0.7.", _MODEL,
    )  # fmt: skip
    fallback_model: str = flag(
        "", "Another model to ask when the first one refuses to answer, or cannot.", _MODEL
    )  # fmt: skip
    model_updates: str = flag(
        "", "Glob of files, the newest of which holds the model's weights, e.g. "
        "gs://B/models/*/SHA256SUMS.json for folders, gs://B/adapters/*.lora.h5 or "
        "gs://B/*.pt. Loaded at the start; streams also load newer ones while they run.", _MODEL,
    )  # fmt: skip
    prompt_updates: bool = flag(
        False, "In streams, read the templates again while they run, and use new ones.", _MODEL,

    )  # fmt: skip
    update_seconds: float = flag(
        60.0, "Seconds between two checks for new weights and templates.", _MODEL, least=0.1,
    )  # fmt: skip
    state_dict_path: str = flag(
        "", "Weights of a torch: model, instead of those in its folder: a PyTorch state dict "
        "(torch.save) or a safetensors file, local or gs://.", _WORKER,
    )  # fmt: skip
    adapter: str = flag(
        "", "LoRA weights that `chatflow tune` made for a Gemma 1 to 3 on the worker: a *.lora.h5 "
        "file, local or gs://.",
        _WORKER,
    )  # fmt: skip
    heads: str = flag(
        "auto", "Heads that `chatflow tune` made, which choose tone, fields and sentences from the "
        "hidden states of a Gemma 1 to 3 on the worker: a *.heads.npz file, local or gs://. auto: "
        "chatflow's own heads, if there are some for the model; none: the tone is scored after "
        "examples in the prompt.",
        _WORKER,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching(Settings):
    """How to batch requests for one call of a model."""

    max_batch_size: int = flag(
        32,
        "Most requests in one batch to a model on the worker; with vLLM, most requests at once.",
        _MODEL,
        least=1,
    )
    max_batch_duration_secs: float = flag(
        0.2, "In streams, how long a request waits for others to fill its batch; 0: a batch holds "
        "only requests of one bundle.", _MODEL, least=0,
    )  # fmt: skip
    batch_buckets: str = flag(
        "", "In streams, prompt lengths in tokens, e.g. 256,512, that separate batches of shorter "
        "from batches of longer prompts; default: all lengths are batched together.", _MODEL,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.boundaries

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Returns `batch_buckets` as sorted numbers."""
        try:
            numbers = sorted({int(number) for number in self.batch_buckets.split(",") if number})
        except ValueError:
            numbers = [0]
        if any(number < 1 for number in numbers):
            raise UsageError(f"--batch_buckets={self.batch_buckets}: must be numbers, e.g. 256,512")
        return tuple(numbers)

    def within_bundles(self) -> Batching:
        """Returns these settings for files, where a batch holds requests of one bundle only."""
        return dataclasses.replace(self, max_batch_duration_secs=0, batch_buckets="")


ONE_BUNDLE = Batching(max_batch_size=16, max_batch_duration_secs=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings(Settings):
    """How a worker runs a model; a request may wait `merge_seconds` for those of other callers."""

    max_prompt_tokens: int = flag(
        1536, "Most tokens of one prompt. The oldest messages are left out first, and the record "
        "says how many.", _MODEL, least=64,
    )  # fmt: skip
    dtype: str = flag(
        "auto", "Precision of the weights; auto: bfloat16 on an accelerator, else the precision of "
        "--state_dict_path, else float32. float16: for torch: models.",
        _WORKER, choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    quantization: str = flag(
        "none", "int8: Keras stores the weights in 8 bits, in a quarter of the memory of float32; "
        "answers differ a little.", _WORKER, choices=("none", "int8"),
    )  # fmt: skip
    large_model: bool = flag(
        True, "One copy of the weights serves all processes of a worker; false: each process "
        "loads its own.", _WORKER,
    )  # fmt: skip
    model_copies: int = flag(
        1, "Copies of the weights per worker, which take requests in turn.", _WORKER, least=1,
    )  # fmt: skip
    vllm_args: str = flag(
        "", "Flags for vLLM's server, e.g. tensor-parallel-size=2,gpu-memory-utilization=0.9; they "
        "override chatflow's.", _WORKER,
    )  # fmt: skip
    merge_seconds: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_copies > 1 and not self.large_model:
            raise UsageError("--model_copies: only with --large_model=true")


ONE_COPY = WorkerSettings()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteSettings(Settings):
    """Where a service is and how to call it; sent to the workers.

    `project` and `location` are for Gemini models; an endpoint's name contains both.
    """

    project: str = ""
    location: str = flag(
        "", "Location of a Gemini model, e.g. global; default: Beam's --region, or "
        "GOOGLE_CLOUD_LOCATION.", _REMOTE,
    )  # fmt: skip
    api_endpoint: str = flag(
        "", "Address of the service: a server that speaks OpenAI's protocol, with its path "
        "(http://localhost:11434/v1), or another address for the Vertex AI API. Google's "
        "credentials are never sent to an http:// address.", _REMOTE,
    )  # fmt: skip
    api_key: str = flag(
        "", "Where the key of an openai: or anthropic: model is: env:NAME, file:PATH or "
        "projects/P/secrets/S/versions/V.", _REMOTE,
    )  # fmt: skip
    endpoint_override: str = flag(
        "", "Address at which an endpoint answers, e.g. that of a Private Service Connect "
        "forwarding rule. The endpoint is then not looked up.", _REMOTE,
    )  # fmt: skip
    request_format: str = flag(
        "chat_completions", "What to send to an endpoint. chat_completions: instances of chat "
        "completions (Model Garden's vLLM containers); raw_predict: the same as a raw prediction "
        "(containers with OpenAI's route); prompt: instances with a prompt.", _REMOTE,
        choices=("chat_completions", "raw_predict", "prompt"),
    )  # fmt: skip
    response_format: str = flag(
        "response_format", "How to tell an endpoint or vLLM the JSON schema of its answer. "
        "response_format: as for OpenAI; structured_outputs: as for vLLM from 0.12 on; "
        "guided_json: as for earlier vLLM; none: not at all.", _REMOTE,
        choices=("response_format", "structured_outputs", "guided_json", "none"),
    )  # fmt: skip
    thinking: str = flag(
        "auto", "How much a Gemini or OpenAI model thinks before it answers; you pay for these "
        "tokens. A level (minimal, low, medium, high); a number of tokens (Gemini 2.5; others only "
        "get more room for it); none: the model decides; auto: as little as possible.",
        _REMOTE,
    )  # fmt: skip
    service_tier: str = flag(
        "standard", "flex: half the price, but answers may take minutes (raise --request_timeout) "
        "and calls are refused more often. For Gemini at --location=global, and for OpenAI.",
        _REMOTE, choices=("standard", "flex"),
    )  # fmt: skip
    max_in_flight: int = flag(
        16, "Most calls at once to a remote model, per worker process.", _REMOTE, least=1
    )
    max_requests_per_second: float = flag(
        0.0, "Most calls per second to a remote model, per worker process; 0: no limit.",
        _REMOTE, least=0,
    )  # fmt: skip
    rate_limit_service: str = flag(
        "", "HOST:PORT of an Envoy rate limit service that all workers ask before each call "
        "(domain chatflow, descriptor model).", _REMOTE,
    )  # fmt: skip
    request_timeout: float = flag(
        60.0, "Most seconds for one call to a remote model or to vLLM, until the last byte of its "
        "answer.", _REMOTE, least=0.1,
    )  # fmt: skip
    retry_seconds: float = flag(
        120.0, "Most seconds that failed calls for one prompt and the pauses after them may take; "
        "then it becomes a dead letter.", _REMOTE, least=0,
    )  # fmt: skip

    @property
    def without_credentials(self) -> bool:
        return (self.endpoint_override or self.api_endpoint).startswith("http://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(
    RemoteSettings,
    WorkerSettings,
    Batching,
    ModelSettings,
    Rules,
    RedactionSettings,
    SinkSettings,
    Places,
):
    """All flags of `chatflow run`."""

    accelerator: str = flag(
        "", "Resource hint of the inference steps, e.g. "
        "type:nvidia-l4;count:1;install-nvidia-driver, for runners that choose machines by it.",
        _WORKER,
    )  # fmt: skip
    min_ram: str = flag(
        "", "Resource hint of the inference steps, e.g. 16GB.", _WORKER
    )  # fmt: skip
    max_cost_usd: float = flag(
        0.0, "US dollars, by the prices in --prices, after which a run stops asking models; the "
        "rest becomes dead letters (over_budget). Needs --answers. 0: no limit.", _REMOTE, least=0,
    )  # fmt: skip
    check_endpoint: bool = flag(
        True, "At launch, check that the model exists, at no cost. If the service cannot be "
        "reached from this machine, the job starts anyway.", _REMOTE,

    )  # fmt: skip
    prices: str = flag(
        "", "TOML file with prices of models, for the estimated cost in the summary; default: "
        "chatflow/models/prices.toml.", _REMOTE,
    )  # fmt: skip
    summary: str = flag(
        "table", "What to print at the end: a table of results and counts, or the counts as one "
        "line of JSON.", _RUN, choices=("table", "json"),
    )  # fmt: skip
    show: int = flag(100, "Most results to show in the table.", _RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vllm_args and not self.model.startswith("vllm:"):
            raise UsageError("--vllm_args: only with --model=vllm:…")
        _ = self.resource_hints

    @property
    def resource_hints(self) -> dict[str, str]:
        """Returns Beam's resource hints for the inference steps."""
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
        """Returns the flags that differ from their defaults, written as on a command line."""
        return [
            f"--{name}={as_text(value)}"
            for name, known in self.defaults().items()
            if (value := getattr(self, name)) != known["default"]
        ]


def as_text(value: Any) -> str:
    """Returns a flag's value as written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def unknown(flag: str, known: Iterable[str], otherwise: str) -> str:
    """Returns the message for an unknown flag, with the closest known one or else `otherwise`."""
    close = difflib.get_close_matches(flag.split("=")[0], known, n=1)
    return f"unknown flag {flag}; " + (f"did you mean {close[0]}?" if close else otherwise)


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` for wrong flags and accepts booleans in every spelling.

    Attributes:
      commands: the names that the first argument can be; empty if the parser has no commands.
    """

    commands: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        self._switches: set[str] = set()
        super().__init__(*args, **kwargs)

    def flags(self) -> list[str]:
        """Returns all flags as written on a command line."""
        return [*self._option_string_actions, *(f"--no{name}" for name in self._switches)]

    def add_switch(self, name: str, default: bool = False, help: str = "", to: Any = None) -> None:
        """Adds a boolean flag to the group `to`: `--name`, `--name true`, `--noname`, and so on."""
        self._switches.add(name)
        (to or self).add_argument(
            f"--{name}", default=default, type=_boolean, metavar="true|false", help=help
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        self._check_command(*arguments[:1])
        for number, argument in enumerate(arguments):
            name = argument.removeprefix("--")
            if name == argument:
                continue
            if name in self._switches and arguments[number + 1 : number + 2] not in _VALUES:
                arguments[number] = f"--{name}=true"
            elif name.removeprefix("no") in self._switches - {name}:
                arguments[number] = f"--{name.removeprefix('no')}=false"
        return super().parse_known_args(arguments, namespace)

    def _check_command(self, name: str = "") -> None:
        if not name or not self.commands or name in (*self.commands, *self.flags()):
            return
        see = f"see {self.prog} --help"
        if name.startswith("-"):
            raise UsageError(unknown(name, self.flags(), f"flags follow the command; {see}"))
        close = difflib.get_close_matches(name, self.commands, n=1)
        hint = f"did you mean {close[0]}?" if close else see
        raise UsageError(f"unknown command {name!r}; {hint}")

    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))


_VALUES = ["true"], ["false"]


def _boolean(text: str) -> bool:
    if [text.lower()] not in _VALUES:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def number(
    kind: type[int] | type[float] = float, most: float = math.inf, zero: bool = False
) -> Any:
    """Returns a flag type: a number above 0, or also 0, and at most `most`."""
    bounds = f"{'0 or ' if zero else ''}above 0" + (
        f", at most {most:g}" if most < math.inf else ""
    )

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= most or (zero and value == 0)):
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"must be a {whole}number, {bounds}; found {text!r}")
        return value

    return parse


def add_flags(parser: Parser, leave_out: Sequence[str] = (), only: Sequence[str] = ()) -> None:
    """Adds the flags of `Options` to a parser, without `leave_out`; with `only`, just those."""
    groups: dict[str, Any] = {}
    for name, flag in Options.defaults().items():
        if name in leave_out or (only and name not in only):
            continue
        group = flag["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        shown = "" if flag["default"] == "" else " (default: %(default)s)"
        if isinstance(flag["default"], bool):
            shown = f" (default: {as_text(flag['default'])})"
            parser.add_switch(name, flag["default"], flag["help"] + shown, groups[group])
            continue
        groups[group].add_argument(
            f"--{name}",
            default=flag["default"],
            type=type(flag["default"]),
            choices=flag["choices"] or None,
            metavar=None if flag["choices"] else name.rsplit("_", 1)[-1].upper(),
            help=flag["help"] + shown,
        )


def from_flags(parsed: argparse.Namespace, required: Sequence[str] = ()) -> Options:
    """Returns the options of parsed flags; raises `UsageError` if one is missing or wrong."""
    for name in required:
        if not getattr(parsed, name):
            raise UsageError(f"--{name} is missing: {Options.defaults()[name]['help']}")
    names = Options.defaults()
    return Options(**{name: getattr(parsed, name) for name in names if hasattr(parsed, name)})


class Cloud(NamedTuple):
    """A Google Cloud project and location; empty if unknown."""

    project: str = ""
    location: str = ""


NO_CLOUD = Cloud()
