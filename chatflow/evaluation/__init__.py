"""`chatflow evaluate`: how good a model and its prompts are, on labelled chats."""
