"""Model files: where they are, how they are read."""
