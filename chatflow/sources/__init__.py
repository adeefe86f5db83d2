"""In: lines of files and messages of Pub/Sub, parsed to chats and events."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
