"""T5, Flan-T5 and other text models of Hugging Face's on PyTorch."""
