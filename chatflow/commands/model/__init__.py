"""`chatflow model`: fetches, converts and measures models."""
