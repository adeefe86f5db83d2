"""Contains the steps that a chat passes through, from its first message to a draft."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
