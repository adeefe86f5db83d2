"""A run: it is launched, watched and ended."""
