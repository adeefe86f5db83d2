"""Finds personal data in chats, and puts placeholders such as `[EMAIL_1]` in its place."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
