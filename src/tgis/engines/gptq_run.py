"""`text-generation-server quantize`: from a checkpoint of floats to one of GPTQ's weights.

Block after block: each is calibrated with what the blocks before it, already quantised, give out.
A block that is done is kept in a directory beside the output, and not done again when the command
is repeated; the output appears complete, in one step.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tgis import __version__
from tgis.config import Config
from tgis.engines.blocks import Blocks, matrix_of, perplexity
from tgis.engines.gptq_texts import Texts, read_texts
from tgis.engines.hf_load import load_model
from tgis.errors import ConfigError, ModelError
from tgis.hub.quantised import stored_weight, write_checkpoint
from tgis.hub.resolve import resolve
from tgis.hub.safetensors import Checkpoint, open_checkpoint
from tgis.models.families import FAMILIES
from tgis.quant.gptq import Moments, Options, gptq_tensors, quantise_gptq
from tgis.quant.grouped import Grouped, dequantise
from tgis.types import ModelFiles, ModelKind

Report = Callable[[str], None]
_PARTS = ("q", "scale", "zero", "group")


@dataclass(frozen=True, slots=True)
class Task:
    """What to do."""

    output: Path
    calibration_file: Path
    options: Options
    num_samples: int = 128
    sample_length: int = 2048


def quantise_model(config: Config, task: Task, report: Report) -> None:
    """Write the quantised checkpoint.

    Args:
        config: names the model.
        task: what to do.
        report: told, in a line each, of results.

    Raises:
        ConfigError: the output exists, or is half made by other options; the text is too short.
        ModelError: the model is none that can be quantised, or what is made would be broken.
    """
    if task.output.exists():
        raise ConfigError(f"OUTPUT_DIR {task.output} exists already")
    files = resolve(config)
    _check(files)
    model_dir = Path(files.path)
    length = min(task.sample_length, files.max_length or task.sample_length)
    texts = read_texts(model_dir, task.calibration_file, task.num_samples, length)
    stored = open_checkpoint(model_dir)
    work = task.output.with_name(task.output.name + ".partial")
    try:
        with torch.inference_mode(), _keeping(work):
            state = _State(work, task, files, texts)
            model = load_model(config, files, _dtype(files), None)
            before = state.once("perplexity", partial(perplexity, model, texts.held_out))
            report(f"Perplexity on held-out text before: {before:.4f}")
            modules = _quantise_blocks(model, texts, task.options, state)
            report(f"Perplexity on held-out text after:  {perplexity(model, texts.held_out):.4f}")
            _write(stored, model_dir, state, modules, task)
    except OSError as error:
        raise ModelError(f"cannot write to {work}: {error.strerror or error}") from None
    finally:
        stored.close()
    report(f"Saved the quantised model to {task.output}")


def _check(files: ModelFiles) -> None:
    if files.quantization is not None:
        method = files.quantization.get("quant_method")
        raise ModelError(f"Model {files.name}: its weights are quantised already, by {method}")
    if files.kind is not ModelKind.DECODER_ONLY or files.model_type not in FAMILIES:
        raise ModelError(
            f"Model {files.name}: models of type {files.model_type} cannot be quantised by this"
            f" command (only {', '.join(sorted(FAMILIES))})"
        )


def _dtype(files: ModelFiles) -> torch.dtype:
    """float16 is slow on CPUs, and holds less than the moments need."""
    return torch.bfloat16 if files.dtype == "bfloat16" else torch.float32


class _State:
    """What has been done, in a directory of its own."""

    def __init__(self, work: Path, task: Task, files: ModelFiles, texts: Texts) -> None:
        self.work = work
        settings = {
            "model": [files.path, files.weights],
            "options": asdict(task.options),
            "texts": [_digest(texts.calibration), _digest(texts.held_out)],
        }
        self._file = work / "state.json"
        if not self._file.exists():
            work.mkdir(parents=True, exist_ok=True)
            self._values: dict[str, Any] = {"settings": settings}
            self._save()
        self._values = json.loads(self._file.read_bytes())
        if self._values["settings"] != json.loads(json.dumps(settings)):
            raise ConfigError(
                f"{work} is half made from another model, text or options; remove it to start anew"
            )

    def once(self, key: str, compute: Callable[[], float]) -> float:
        """A number that is computed the first time only."""
        if key not in self._values:
            self._values[key] = compute()
            self._save()
        return float(self._values[key])

    def block(self, n: int) -> Path:
        """The file of a block's quantised weights; it is complete if it is there."""
        return self.work / f"block-{n:05}.safetensors"

    def weight(self, n: int, name: str, bits: int) -> Grouped:
        """One of them."""
        return _grouped(load_file(self.block(n)), name, bits)

    def _save(self) -> None:
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(self._values))
        draft.replace(self._file)


def _digest(windows: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()


def _quantise_blocks(model: Any, texts: Texts, options: Options, state: _State) -> dict[str, int]:
    """Quantise what is not done yet, and put all into the model.

    Returns:
        Name of each quantised layer -> the number of its block.
    """
    blocks = Blocks(model, texts.calibration)
    modules: dict[str, int] = {}
    make: Any = tqdm
    with make(total=len(blocks), desc="Quantizing", unit="block") as bar:
        for n in range(len(blocks)):
            layers = blocks.layers()
            if not state.block(n).exists():
                _save(state.block(n), _quantise_block(blocks, layers, options, bar))
            tensors = load_file(state.block(n))
            for name, layer in layers.items():
                weight = matrix_of(layer)
                weight.copy_(dequantise(_grouped(tensors, name, options.bits)))
                modules[name] = n
            blocks.advance()
            bar.update()
    return modules


def _quantise_block(
    blocks: Blocks, layers: dict[str, nn.Module], options: Options, bar: Any
) -> dict[str, Grouped]:
    moments = {name: Moments(matrix_of(layer).shape[1]) for name, layer in layers.items()}
    blocks.inputs({name: each.add for name, each in moments.items()})
    done = {}
    for name, layer in layers.items():
        bar.set_postfix_str(name.removeprefix(f"{blocks.name}."))
        hessian = moments.pop(name).hessian
        done[name] = quantise_gptq(matrix_of(layer), hessian, options, name)
        gptq_tensors(
            name, done[name], options.checkpoint_format
        )  # refuses what cannot be stored, before hours of work
    return done


def _save(path: Path, weights: dict[str, Grouped]) -> None:
    tensors = {
        f"{name}:{part}": getattr(weight, part).contiguous()
        for name, weight in weights.items()
        for part in _PARTS
    }
    draft = path.with_suffix(".new")
    save_file(tensors, draft)
    draft.replace(path)


def _grouped(tensors: dict[str, Tensor], name: str, bits: int) -> Grouped:
    return Grouped(bits, **{part: tensors[f"{name}:{part}"] for part in _PARTS})


def _write(
    stored: Checkpoint, model_dir: Path, state: _State, modules: dict[str, int], task: Task
) -> None:
    """All files, in a directory that becomes the output when it is complete."""
    bits, checkpoint_format = task.options.bits, task.options.checkpoint_format

    def replacement(module: str, name: str) -> dict[str, Tensor]:
        weight = state.weight(modules[module], module, bits)
        return gptq_tensors(name, weight, checkpoint_format)

    replaced = {}
    for module in modules:
        name = stored_weight(module, stored)
        replaced[name] = partial(replacement, module, name.removesuffix(".weight"))
    made = state.work / "model"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    write_checkpoint(stored, model_dir, made, replaced, quantization_config(task.options))
    made.replace(task.output)
    shutil.rmtree(state.work)


def quantization_config(options: Options) -> dict[str, Any]:
    """As Transformers and GPTQModel read it."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": options.checkpoint_format,
        **asdict(options),
        "static_groups": False,
        "true_sequential": False,
        "lm_head": False,
        "meta": {"quantizer": [f"tgis:{__version__}"]},
    }


@contextmanager
def _keeping(work: Path) -> Iterator[None]:
    """Say that nothing is lost where the user has had enough."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept in {work}, run the command again", flush=True)
        raise
