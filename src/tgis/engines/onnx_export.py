"""Models of Transformers as ONNX files in Optimum's layout.

The files are written to a directory beside the target, read again by the engine that will serve
them, compared with the model, and only then moved to their place in one step.
"""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgis.config import Config
from tgis.engines import ort
from tgis.engines.hf import HfNetwork
from tgis.engines.hf_load import load_model
from tgis.engines.onnx_parts import Part, parts_of
from tgis.engines.ort_graph import first_line, require_onnxruntime, session_options
from tgis.engines.probe import choose_batching, trial
from tgis.errors import ConfigError, ModelError
from tgis.hub import onnx_files
from tgis.hub.resolve import resolve
from tgis.types import ModelFiles, ModelKind

Report = Callable[[str], None]

# Logits may differ by so much, as a share of the largest.
TOLERANCE = 1e-4
# What goes along: configuration and tokenizer, but no weights.
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
_INDEX = ".index.json"
# Files beyond this size keep their weights in a file beside them: 2 GiB is protobuf's limit.
_MOST_INSIDE = 3 << 29
_MOST_SAID = 300  # characters of a library's own words
_LIBRARIES = ("onnx_ir", "onnxscript")


class Options(NamedTuple):
    """How to export.

    Attributes:
        merge_graphs: one graph for all passes of an encoder-decoder model's decoder.
        optimize: let ONNX Runtime rewrite the graphs.
        provider: ONNX Runtime's execution provider; None = the first of CUDA's and the CPU's.
    """

    merge_graphs: bool = False
    optimize: bool = False
    provider: str | None = None


def export(config: Config, target: Path, options: Options, report: Report) -> None:
    """Write a model's ONNX files, with its configuration and tokenizer.

    Args:
        config: names the model.
        target: a directory that does not exist, or is empty.
        report: told, in a line each, of progress.

    Raises:
        ConfigError: a library is missing, or an option or the target is wrong.
        ModelError: the model cannot be exported; nothing is left at the target.
    """
    _require("convert-to-onnx")
    provider = _provider(options.provider)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"TARGET {target} exists and is not an empty directory")
    files = resolve(config)
    report(f"Provider: {provider}")
    report(f"Options: merge_graphs={options.merge_graphs}, optimize={options.optimize}")
    report(f"Model type: {files.model_type}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=target.parent) as scratch:
            made = Path(scratch, "model")
            made.mkdir()
            _write(config, files, made, options, provider, report)
            made.replace(target)
    except OSError as error:
        raise ModelError(f"cannot write ONNX files to {target}: {error.strerror}") from None
    report(f"Saved the ONNX model to {target}")


def _require(setting: str) -> None:
    require_onnxruntime(setting)
    import importlib

    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"{setting} needs {name} ({error}): pip install 'tgis[ort]'"
            ) from None


def _provider(asked: str | None) -> str:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if asked is None:
        usable = "CUDAExecutionProvider" in there and torch.cuda.is_available()
        return "CUDAExecutionProvider" if usable else "CPUExecutionProvider"
    if asked not in there:
        raise ConfigError(
            f"--provider={asked}: this ONNX Runtime has no such provider; it has {', '.join(there)}"
        )
    return asked


def _write(
    config: Config, files: ModelFiles, made: Path, options: Options, provider: str, report: Report
) -> None:
    # This attention adds large negative numbers where others skip: padding then gives no NaN.
    eager = {"transformers_attn_impl": "eager"}
    model = load_model(_with(config, **eager), files, torch.float32, None).eval()
    for pattern in _COPIED:
        for file in Path(files.path).glob(pattern):
            if not file.name.endswith(_INDEX):
                shutil.copyfile(file, made / file.name)
    try:
        graphs = {}
        for part in parts_of(model):
            report(f"Exporting {part.file}")
            graphs[part.file] = _trace(part)
    except ModelError as error:
        raise ModelError(f"Model {files.name} cannot be exported: {error}") from None
    if options.merge_graphs and onnx_files.FIRST in graphs:
        report(f"Merging {onnx_files.FIRST} and {onnx_files.LATER}")
        from tgis.engines.onnx_merge import merge_decoders

        graphs[onnx_files.MERGED] = merge_decoders(
            graphs.pop(onnx_files.FIRST), graphs.pop(onnx_files.LATER)
        )
    elif options.merge_graphs:
        report(f"{onnx_files.SINGLE} is one graph for all passes already")
    for name, graph in graphs.items():
        _save(graph, made / name)
        if options.optimize:
            report(f"Optimizing {name}")
            _optimize(made / name, provider)
    report("Comparing the files with the model")
    _verify(model, config, files, made)


def _with(config: Config, **changes: Any) -> Config:
    import msgspec

    return msgspec.structs.replace(config, **changes)


@torch.no_grad()
def _trace(part: Part) -> Any:
    """An `onnx_ir.Model`.

    Raises:
        ModelError: torch cannot export the module.
    """
    shapes = {
        name: [dict(axes) for axes in value] if isinstance(value, list) else dict(value)
        for name, value in part.axes.items()
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                part.module.eval(),
                kwargs=part.examples,
                dynamic_shapes=shapes,
                input_names=part.inputs,
                output_names=part.outputs,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever tracing makes of a model's code
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = " ".join(str(cause).split())[:_MOST_SAID]
        raise ModelError(f"{part.file}: {type(cause).__name__}: {what}") from error
    assert program is not None
    return program.model


def _save(graph: Any, path: Path) -> None:
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(graph)  # where in whose files each node comes from
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    data = f"{path.name}_data" if size > _MOST_INSIDE else None
    onnx_ir.save(graph, path, external_data=data)


def _optimize(path: Path, provider: str) -> None:
    """Rewrite a file as ONNX Runtime would when it loads it.

    What holds on every CPU only; for another device what is good there. The reference's levels of
    Optimum are O1 and O3.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = session_options(torch.get_num_threads())
    on_cpu = provider == "CPUExecutionProvider"
    options.graph_optimization_level = (
        levels.ORT_ENABLE_BASIC if on_cpu else levels.ORT_ENABLE_EXTENDED
    )
    rewritten = path.parent / "optimized"
    rewritten.mkdir()
    options.optimized_model_filepath = str(rewritten / path.name)
    data = f"{path.name}_data"
    if (path.parent / data).exists():
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, data)
    try:
        onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise ModelError(f"{path.name}: cannot be optimized: {first_line(error)}") from None
    for file in rewritten.iterdir():
        file.replace(path.parent / file.name)
    rewritten.rmdir()


@torch.inference_mode()
def _verify(model: Any, config: Config, files: ModelFiles, made: Path) -> None:
    """Let the engine compute what the model computes, row by row.

    Raises:
        ModelError: the files give other logits.
    """
    written = resolve(_with(config, model_name=str(made), deployment_framework=ort.NAME))
    start_id = files.decoder_start_token_id if files.kind is ModelKind.ENCODER_DECODER else None
    pad_id = files.pad_token_id or 0
    network = ort.OrtNetwork(ort.load_graphs(written))
    caps = ort.caps_of(network, written, start_id)
    batching = choose_batching(network, caps, pad_id, start_id)
    expected = trial(HfNetwork(model), caps, "single", pad_id, start_id)
    found = trial(network, caps, batching, pad_id, start_id)
    worst = max(map(_difference, found, expected))
    if not worst <= TOLERANCE:  # nor NaN
        raise ModelError(
            f"Model {files.name} cannot be exported: the files give other scores than the model"
            f" (they differ by {worst:.2g} of the largest, {TOLERANCE} is allowed)"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own remarks out of the log; what matters becomes an error here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
