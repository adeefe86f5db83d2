"""`chatflow model`: what is done to models before and beside a run, a module a command."""
