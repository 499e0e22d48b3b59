"""Command lines: thin, and light to import."""
