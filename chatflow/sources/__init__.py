"""In: files, Pub/Sub; lines to chats and events."""
