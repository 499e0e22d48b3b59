"""Loading models with Transformers."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import logging as hf_logging

from tgis.config import Config
from tgis.errors import ModelError
from tgis.hub.facts import remote_code_refusal
from tgis.hub.safetensors import Progress
from tgis.types import ModelFiles, ModelKind

log = logging.getLogger(__name__)

_CLASSES: dict[ModelKind, tuple[str, Any]] = {
    ModelKind.DECODER_ONLY: (
        "AutoModelForCausalLM",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    ModelKind.ENCODER_DECODER: (
        "AutoModelForSeq2SeqLM",
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
}


def load_model(
    config: Config, files: ModelFiles, dtype: torch.dtype, progress: Progress | None
) -> Any:
    """A `PreTrainedModel` with all its weights, ready to infer.

    Raises:
        ModelError: Transformers does not know such a model, may not run its code, or cannot load
            it; a weight is missing or of another shape.
    """
    if files.quantization is not None:
        quantization = files.quantization.get("quant_method")
        raise ModelError(f"{quantization} quantization not supported by hf_transformers engine")
    auto_class = getattr(transformers, choose_class(files, config.trust_remote_code))
    arguments: dict[str, Any] = {}
    if (attention := _attention(config)) is not None:
        arguments["attn_implementation"] = attention
    with _quiet(), _told(progress, files):
        try:
            model, info = auto_class.from_pretrained(
                files.path,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused here
                **arguments,
            )
        except Exception as error:  # whatever a model's code makes of its configuration
            asked = f" with TRANSFORMERS_ATTN_IMPL = {attention}" if attention else ""
            raise ModelError(
                f"Model {files.name}: Transformers cannot load it{asked}: {_first_line(error)}"
            ) from error
    _check_weights(files.name, info)
    return model


def choose_class(files: ModelFiles, trust_remote_code: bool) -> str:
    """The name of the class that loads models of this kind.

    TGIS prefers causal where both kinds are possible, but for bart. Here config.json decides
    (`is_encoder_decoder`, in `ModelFiles.kind`), which says the same of bart, and the right thing
    of marian, mbart, pegasus and their like.

    Raises:
        ModelError: there is none.
    """
    name, known = _CLASSES[files.kind]
    if files.model_type in known:
        return name
    auto_map = files.config.get("auto_map")
    if isinstance(auto_map, dict) and name in auto_map:
        if not trust_remote_code:
            raise remote_code_refusal(files.name)
        return name
    raise ModelError(f"Model {files.name}: Unsupported model type {files.model_type}")


def _check_weights(name: str, info: Any) -> None:
    if mismatched := sorted(info["mismatched_keys"]):
        weight, in_files, expected = mismatched[0]
        raise ModelError(
            f"Model {name}: weight {weight} has shape {list(in_files)},"
            f" but config.json asks for {list(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"Model {name}: weight {missing[0]} does not exist"
            f" ({len(missing)} are missing in the files)"
        )


def _attention(config: Config) -> str | None:
    if config.transformers_attn_impl:
        return config.transformers_attn_impl
    if config.deployment_framework == "hf_optimum_bt":
        log.info("hf_optimum_bt: BetterTransformer is part of PyTorch now; using its attention")
        return "sdpa"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers' own chatter out of the log; what matters becomes an error here."""
    hf_logging.disable_default_handler()
    hf_logging.enable_propagation()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"transformers\b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _told(progress: Progress | None, files: ModelFiles) -> Iterator[None]:
    """Tell `progress` of the parameters loaded, as their share of the files' bytes."""
    total = sum((Path(files.path) / name).stat().st_size for name in files.weights)

    def watch(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if progress is None or kwargs.get("desc") != "Loading weights":
            return factory(*args, **kwargs)
        return _counted(list(args[0]), total, progress)

    previous = hf_logging.set_tqdm_hook(watch)
    try:
        yield
    finally:
        hf_logging.set_tqdm_hook(previous)
    if progress is not None:
        progress(total, total)


def _counted(items: list[Any], total: int, progress: Progress) -> Iterable[Any]:
    for number, item in enumerate(items):
        progress(total * number // len(items), total)
        yield item
