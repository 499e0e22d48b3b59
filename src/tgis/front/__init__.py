"""The front: clients, validation, text, deadlines and metrics. Knows no torch and no engine."""
