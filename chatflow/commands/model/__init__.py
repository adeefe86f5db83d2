"""`chatflow model`: fetches, converts and measures models, one module per command."""

DESCRIPTION = "Brings models to where workers load them, and says what they need."

COMMANDS = {
    "fetch": "copy a model to a folder or bucket",
    "convert": "make a preset of Keras's from GGUF or Hugging Face's format",
    "save-state-dict": "write a model's weights as one file of a chosen precision",
    "info": "parameters, memory and machines of a model",
}
