"""Beam's RunInference, without its `ModelManager`, which imports PyTorch and SciPy's optimisers."""

import resource

from chatflow.imports import without

with without("apache_beam.ml.inference.model_manager"):
    from apache_beam.ml.inference import base
    from apache_beam.ml.inference.base import (
        KeyedModelHandler,
        ModelHandler,
        PredictionResult,
        RemoteModelHandler,
        RunInference,
    )

base.resource = resource  # without the manager, Beam leaves it out, and then measures no memory

__all__ = [
    "KeyedModelHandler",
    "ModelHandler",
    "PredictionResult",
    "RemoteModelHandler",
    "RunInference",
]
