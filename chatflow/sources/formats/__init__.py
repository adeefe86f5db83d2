"""Reads chats as other systems write them: each module turns a format into chatflow's own JSON."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
