"""Gemma on the workers: keras_hub on the JAX backend."""
