"""Gemma on the workers: keras_hub on the JAX backend."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
