"""Between: what a chat passes through from its arrival to a draft."""
