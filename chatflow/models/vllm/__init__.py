"""vLLM's own server on the workers."""
