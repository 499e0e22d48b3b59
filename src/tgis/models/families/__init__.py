"""The decoder-only families of the native engine, by `model_type`."""

from tgis.errors import ModelError
from tgis.models.families import bloom, falcon, gpt2, gpt_neox, llama, mpt, opt
from tgis.models.families.base import Family, TensorNames
from tgis.models.model_config import ModelConfig
from tgis.models.spec import DecoderSpec

TABLES = (llama, gpt_neox, bloom, falcon, gpt2, mpt, opt)

FAMILIES: dict[str, Family] = {
    model_type: family
    for table in TABLES
    for family in table.FAMILIES
    for model_type in family.model_types
}


def read_spec(config: ModelConfig) -> tuple[DecoderSpec, TensorNames]:
    """The network that a configuration describes, and its names in the checkpoint.

    Raises:
        ModelError: an unknown family, or an option of it that is not supported.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model_type {config.model_type!r} is not known to the native engine"
            f" (only {', '.join(sorted(FAMILIES))})"
        )
    return family.read(config)
