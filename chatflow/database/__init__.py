"""A database of results, and of what people do with them: SQLite or PostgreSQL."""
