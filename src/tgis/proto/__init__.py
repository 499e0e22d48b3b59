"""The code of `proto/generation.proto`, written by `tools/generate_proto.py`; do not edit."""
