"""Loads a Hugging Face model and its tokenizer: one copy in memory, in one precision."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import transformers
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

from chatflow.errors import UsageError, one_line
from chatflow.weights.presets import local_file

_log = logging.getLogger(__name__)


def load(
    path: str, state_dict_path: str = "", dtype: str = "auto", name: str = ""
) -> tuple[Any, Any]:
    """Returns a model that is ready to answer, on the GPU if there is one, and its tokenizer.

    Measured with a T5 of 60 M parameters on CPUs with AVX512-BF16: compared with float32, bfloat16
    takes half the time to score and two thirds to write; float16 takes three times as long.

    Args:
      path: a local folder, or a name on the hub; messages use `name` instead.
      state_dict_path: weights to use instead, on any filesystem that Beam knows.
      dtype: `float32`, `bfloat16`, `float16`, or `auto`: on GPUs bfloat16, or float16 if they lack
        it; on CPUs the state dict's type, else float32.

    Raises:
      UsageError: there is no text model, or its weights do not fit or are not finite.
    """
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        noise: Any = transformers.logging
        noise.set_verbosity_error()
        noise.disable_progress_bar()
    model_flag = f"--model={name or path}"
    flag = f"--state_dict_path={state_dict_path}" if state_dict_path else model_flag
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        empty = without_weights(config)
        if state_dict_path:
            model, found = from_state_dict(empty, state_dict_path, _wanted(dtype))
            with contextlib.suppress(OSError):  # not all models have one
                model.generation_config = transformers.GenerationConfig.from_pretrained(path)
        else:
            # Beam's Hugging Face handlers do the same, but cannot be imported without TensorFlow.
            model, found = type(empty).from_pretrained(
                path, dtype=_wanted(dtype) or torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"{model_flag}: {one_line(error)}") from None
    _check_fit(found, flag)
    _check_numbers(model, flag)
    model.requires_grad_(False).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return model, tokenizer


def _wanted(dtype: str) -> torch.dtype | None:
    """Returns the type to load; None keeps that of the weights."""
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    if not torch.cuda.is_available():
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def without_weights(config: Any) -> Any:
    """Returns a configuration's text model without allocating it; `ValueError` if it has none."""
    auto: Any = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        return auto.from_config(config)


def from_state_dict(
    empty: Any, path: str, dtype: torch.dtype | None
) -> tuple[Any, Mapping[str, Any]]:
    """Returns a model like `empty` with a state dict's weights, and missing and unexpected keys.

    Beam's PytorchModelHandlerTensor opens what `torch.save` wrote. Its usual way is to copy the
    weights into a random float32 model. That takes twice the memory, widens halves to float32 and,
    because transformers 5 ties them, puts Flan-T5's output weights in place of its embeddings.
    Measured peaks for 242 MB of float32 weights: 235 MB here, 471 MB Beam's way; as halves, 155 and
    394 MB.

    `empty` is from `without_weights`; `dtype` None keeps the file's. Raises `UsageError` if the
    file does not hold a state dict of this model.
    """
    flag = f"--state_dict_path={path}"

    class Weights(torch.nn.Module):
        """Takes a state dict's tensors as they are; transformers adds what no state dict has."""

        def load_state_dict(self, state_dict: Any, *_: Any) -> Any:
            check_state_dict(state_dict, empty.state_dict(), flag)
            wanted = dtype or usual_dtype(state_dict)
            convert(state_dict, wanted, getattr(empty, "_keep_in_fp32_modules", None) or ())
            self.model, self.found = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=state_dict,
                dtype=wanted,
                output_loading_info=True,
            )

    if path.endswith(".safetensors"):
        import safetensors.torch

        weights = Weights()
        weights.load_state_dict(safetensors.torch.load_file(local_file(path, _log.info)))
    else:
        try:
            # Loads on the CPU; from there each tensor goes to the GPU once.
            weights = PytorchModelHandlerTensor(path, Weights).load_model()
        except UsageError:
            raise
        except Exception as error:  # unpickling raises all kinds
            raise UsageError(f"{flag}: no state dict can be read: {one_line(error)}") from None
    return weights.model, weights.found


def check_state_dict(value: Any, expected: Mapping[str, torch.Tensor], flag: str) -> None:
    """Raises `UsageError` if the value is not a state dict with weights of the model's shapes."""
    if not isinstance(value, dict) or not all(torch.is_tensor(v) for v in value.values()):
        raise UsageError(
            f"{flag}: is not a state dict; save one with torch.save(model.state_dict(), PATH)"
        )
    for name in sorted(value.keys() & expected.keys()):
        ours, theirs = tuple(expected[name].shape), tuple(value[name].shape)
        if ours != theirs:
            raise UsageError(
                f"{flag}: the weights do not fit the model: {name} has the shape {theirs}, where "
                f"the configuration says {ours}"
            )


def usual_dtype(state_dict: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Returns the floating-point type of most weights."""
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for tensor in state_dict.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def convert(
    state_dict: MutableMapping[str, torch.Tensor], dtype: torch.dtype, kept: tuple[str, ...]
) -> None:
    """Converts in place, tensor by tensor, so that only one tensor is in memory twice.

    `kept` are modules that transformers keeps in float32 because float16 is too narrow: T5's `wo`.
    """
    done: dict[int, torch.Tensor] = {}  # for tied weights: one tensor, several names
    for name, tensor in state_dict.items():
        narrow = dtype == torch.float16 and set(kept) & set(name.split("."))
        if tensor.is_floating_point() and tensor.dtype != dtype and not narrow:
            key = tensor.data_ptr()
            if key not in done or done[key].shape != tensor.shape:
                done[key] = tensor.to(dtype)
            state_dict[name] = done[key]


def _check_fit(found: Mapping[str, Any], flag: str) -> None:
    """Raises `UsageError` if weights are missing or unexpected."""
    for kind, what in (("missing_keys", "lack"), ("unexpected_keys", "have too many:")):
        if names := sorted(found[kind]):
            more = f" and {len(names) - 3} more" if names[3:] else ""
            raise UsageError(
                f"{flag}: the weights do not fit the model: they {what} "
                f"{', '.join(names[:3])}{more}"
            )


def _check_numbers(model: torch.nn.Module, flag: str) -> None:
    """Raises `UsageError` if a weight is infinite or not a number."""
    for name, weight in model.named_parameters():
        ends = torch.stack(torch.aminmax(weight.detach()))  # takes no memory; NaN becomes both ends
        if not ends.isfinite().all():
            raise UsageError(
                f"{flag}: the weights {name} are not all finite numbers; were they saved in a "
                "precision that is too narrow?"
            )
