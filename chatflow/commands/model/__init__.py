"""`chatflow model`: fetches, converts and measures models, one module per command."""

DESCRIPTION = "Copies models to where workers load them, and computes what they need."

COMMANDS = {
    "fetch": "copy a model to a folder or bucket",
    "convert": "make a Keras preset from GGUF or Hugging Face's format",
    "save-state-dict": "write a model's weights as one file of a chosen precision",
    "info": "parameters, memory and machines of a model",
}
