"""Offline inference: a file of prompts in, a directory of answers out."""
