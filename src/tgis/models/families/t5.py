"""T5, Flan-T5, UL2 and mT5, mT0: encoder-decoders of one network, by `model_type`."""

from tgis.errors import ModelError
from tgis.models.families.common import ACTIVATIONS
from tgis.models.model_config import ModelConfig
from tgis.models.seq2seq_spec import Seq2SeqSpec
from tgis.models.spec import Activation


def _mlp(config: ModelConfig) -> tuple[Activation, bool]:
    """Activation of the MLP, and whether a gate goes through it."""
    name = config.string("feed_forward_proj", default="relu")
    gate, _, activation = name.rpartition("-")
    if gate not in ("", "gated") or activation not in ACTIVATIONS:
        raise ModelError(f"config.json: feed_forward_proj = {name!r} is not supported")
    # The name is older than the activation that it stands for.
    return "gelu_tanh" if name == "gated-gelu" else ACTIVATIONS[activation], gate == "gated"


def _read(config: ModelConfig, scaled_logits: bool) -> Seq2SeqSpec:
    num_layers = config.size("num_layers")
    activation, gated = _mlp(config)
    return Seq2SeqSpec(
        family=config.model_type,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("d_model"),
        num_encoder_layers=num_layers,
        num_decoder_layers=config.size("num_decoder_layers", default=num_layers),
        num_heads=config.size("num_heads"),
        head_dim=config.size("d_kv"),
        intermediate_size=config.size("d_ff"),
        norm_eps=config.number("layer_norm_epsilon", default=1e-6),
        num_buckets=config.size("relative_attention_num_buckets", default=32),
        max_distance=config.size("relative_attention_max_distance", default=128),
        activation=activation,
        gated_mlp=gated,
        scaled_logits=scaled_logits,
    )


def read_seq2seq_spec(config: ModelConfig) -> Seq2SeqSpec:
    """The network that a configuration describes.

    Raises:
        ModelError: an unknown family, or an option of it that is not supported.
    """
    if config.model_type == "t5":
        # T5 1.1 and Flan-T5 say that nothing is tied, the original says nothing; newer files say
        # what is meant, and that everything is tied.
        tied = config.flag("tie_word_embeddings", default=True)
        return _read(config, scaled_logits=config.flag("scale_decoder_outputs", default=tied))
    if config.model_type == "mt5":
        return _read(config, scaled_logits=False)
    raise ModelError(
        f"model_type {config.model_type!r} is no encoder-decoder of the native engine"
        f" (only {', '.join(SEQ2SEQ_FAMILIES)})"
    )


SEQ2SEQ_FAMILIES = ("mt5", "t5")
