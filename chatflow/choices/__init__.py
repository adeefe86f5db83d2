"""What a small model chooses, from what it has read, and the texts that are composed of it."""
