"""Reads lines of files and Pub/Sub messages and parses them into chats and events."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
