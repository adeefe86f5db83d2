"""Loads a preset's weights into a backbone, with an adapter or quantised."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import keras
import keras_hub

from chatflow.weights.families import family_of

_SCORING = "chatflow_scoring"
"""Attribute of an adapter file that is only for the scoring pass."""


def load_backbone(
    preset: str, dtype: str = "auto", quantization: str = "none", adapter: str = ""
) -> Any:
    """Returns a preset's backbone; see `models.gemma.engine.load_engine`."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with without_initial_values(), by_default(dtype):
        backbone = keras_hub.models.Backbone.from_preset(preset, dtype=dtype)
    if adapter and not family_of(backbone).learns:
        raise ValueError(f"the adapter is for Gemma 1 to 3, not for {family_of(backbone).name}")
    if adapter:
        add_adapter(backbone, adapter)
    if quantization != "none":
        if not family_of(backbone).quantizes:
            raise ValueError(f"keras_hub cannot quantise {preset}: --quantization={quantization}")
        with warnings.catch_warnings():
            # Keras warns that layers without a kernel cannot be quantised.
            warnings.filterwarnings("ignore", ".*does not have a `quantize` method.*")
            backbone.quantize(quantization)
    return backbone


def add_adapter(backbone: keras_hub.models.Backbone, path: str) -> None:
    """Merges a LoRA (https://arxiv.org/abs/2106.09685) into the weights: no cost at run time."""
    backbone.load_lora_weights(path)
    for layer in backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            merged, layer.lora_enabled = layer.kernel, False
            layer._kernel.assign(merged)


def mark_as_scoring(path: str) -> None:
    """Marks an adapter's file as only for the scoring pass."""
    with h5py.File(path, "a") as file:
        file.attrs[_SCORING] = True


def is_of_scoring(path: str) -> bool:
    with h5py.File(path) as file:
        return bool(file.attrs.get(_SCORING, False))


@contextlib.contextmanager
def by_default(dtype: str) -> Iterator[None]:
    """Sets this type for layers that are made without one, such as those of SmolLM 3."""
    known = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(known)


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Makes Keras start with zeros instead of random weights, before it reads those of the file."""
    initializer = keras.initializers.VarianceScaling
    drawn = initializer.__call__
    initializer.__call__ = lambda self, shape, dtype=None: jnp.zeros(shape, dtype)
    try:
        yield
    finally:
        initializer.__call__ = drawn
