"""The command-line commands, one per file."""
