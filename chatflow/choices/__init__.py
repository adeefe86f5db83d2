"""Choices that a small model makes about what it has read, and texts composed from them."""
