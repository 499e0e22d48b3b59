"""From logits to tokens: processing, choice and details, each sequence by its own parameters."""

from tgis.sampling.logprobs import input_details
from tgis.sampling.sampler import Choice, Sampler

__all__ = ["Choice", "Sampler", "input_details"]
