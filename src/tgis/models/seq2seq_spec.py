"""`Seq2SeqSpec`: how the encoder-decoder families of T5's kind differ. No tensors, no names."""

from dataclasses import dataclass

from tgis.models.spec import Activation


@dataclass(frozen=True, slots=True)
class Seq2SeqSpec:
    """An encoder-decoder network with relative position biases (T5, arXiv:1910.10683)."""

    family: str
    vocab_size: int
    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    num_buckets: int  # of relative distances
    max_distance: int  # from here on all distances share a bucket
    activation: Activation
    gated_mlp: bool
    scaled_logits: bool  # the head reads hidden / sqrt(hidden_size)
