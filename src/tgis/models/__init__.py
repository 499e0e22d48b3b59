"""The native engine's networks: one decoder, families as tables over it."""
