"""How models are kept, batched and called."""

from __future__ import annotations

from typing import NamedTuple


class Batching(NamedTuple):
    """How requests are put together for one call of a model.

    Attributes:
      size: most requests in a batch.
      seconds: in streams, whose bundles are small, how long a request waits for others,
        of other bundles, too; None: a batch holds requests of one bundle only.
      buckets: lengths in tokens between which requests are batched apart, so that
        short ones are not padded to long ones. Only where they wait for others.
    """

    size: int = 16
    seconds: float | None = None
    buckets: tuple[int, ...] = ()


ONE_BUNDLE = Batching()


class WorkerSettings(NamedTuple):
    """How a model is kept on a worker.

    Attributes:
      dtype: `float32`, `bfloat16`, `float16` (PyTorch), or `auto`: bfloat16 on an accelerator.
      quantization: `int8` or `none`.
      large_model: one copy of the weights serves all processes of a worker; else each
        process loads its own.
      model_copies: copies of the weights by worker, each of which serves all processes.
      merge_seconds: how long a request may wait for those of other callers.
      max_prompt_tokens: the budget of one prompt, as estimated; for vLLM.
      vllm_args: flags of vLLM's server; see `vllm.parse_arguments`.
    """

    dtype: str = "auto"
    quantization: str = "none"
    large_model: bool = True
    model_copies: int = 1
    merge_seconds: float = 0.02
    max_prompt_tokens: int = 1536
    vllm_args: str = ""


ONE_COPY = WorkerSettings()


class RemoteSettings(NamedTuple):
    """Where a service is, and how it is called. Travels to the workers.

    Attributes:
      project, location: of a Gemini model; an endpoint's are in its name.
      api_endpoint: an address instead of Google's. One that begins with `http://` is called
        without credentials.
      endpoint_override: the address at which an endpoint answers, e.g. that of a Private
        Service Connect forwarding rule; the endpoint is not looked up then.
      timeout: seconds for one call, to the last byte of its answer.
      max_in_flight: calls at once, by worker process.
      max_per_second: calls a second, by worker process; 0: any number.
      rate_limit_service: address of an Envoy rate limit service that a fleet shares.
      retry_seconds: what failed calls of one request and the waiting after them may take.
      request_format: `chat_completions`, `raw_predict` or `prompt`; see `vertex.body`.
      response_format: how an endpoint is told the JSON schema of its answer; see
        `vertex.schema_fields`.
      thinking: of a Gemini model; see `gemini.thinking_of`.
    """

    project: str = ""
    location: str = ""
    api_endpoint: str = ""
    endpoint_override: str = ""
    timeout: float = 60.0
    max_in_flight: int = 16
    max_per_second: float = 0.0
    rate_limit_service: str = ""
    retry_seconds: float = 120.0
    request_format: str = "chat_completions"
    response_format: str = "response_format"
    thinking: str = "auto"

    @property
    def without_credentials(self) -> bool:
        return (self.endpoint_override or self.api_endpoint).startswith("http://")
