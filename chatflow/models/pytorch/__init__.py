"""T5, Flan-T5 and other text models of Hugging Face's on PyTorch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
