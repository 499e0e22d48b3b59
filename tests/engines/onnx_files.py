"""ONNX files of tiny models, made once for all tests, and changed ones."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from tests.engines.hf_models import SMALL, START, VOCAB, Sequences, generate, random_ids, save_model

from tgis.config import Config
from tgis.engines import onnx_export, ort
from tgis.engines.onnx_export import Options
from tgis.hub.resolve import resolve

CONFIGS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**SMALL | {"num_hidden_layers": 2}, num_key_value_heads=2),
    "t5": hf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=START,
        pad_token_id=0,
        eos_token_id=None,
    ),
}


class Exported(NamedTuple):
    """A model of Transformers and its ONNX files."""

    model: Any
    path: Path

    def engine(self, path: Path | None = None) -> Any:
        """The engine over these files, or over changed ones."""
        return load(path or self.path)


def load(path: Path, **settings: Any) -> Any:
    """The ONNX Runtime engine over a directory."""
    config = Config(model_name=str(path), deployment_framework=ort.NAME, **settings)
    return ort.load(config, resolve(config), torch.float32)


def export(
    source: Path, target: Path, options: Options | None = None, config: Any = None
) -> list[str]:
    """Export a model; returns the lines reported."""
    lines: list[str] = []
    settings = config or Config(model_name=str(source))
    onnx_export.export(settings, target, options or Options(), lines.append)
    return lines


def make(path: Path, config: Any, options: Options | None = None) -> Exported:
    """A random model and its files."""
    model = save_model(path / "model", config)
    export(path / "model", path / "onnx", options)
    return Exported(model, path / "onnx")


def changed(source: Path, target: Path, file: str, change: Callable[[Any], None]) -> Path:
    """A copy of a model's directory; `change` gets one graph as an `onnx_ir.Model`."""
    import onnx_ir

    shutil.copytree(source, target)
    graph = onnx_ir.load(target / file)
    change(graph)
    onnx_ir.save(graph, target / file)
    return target


def joining_and_leaving(model: Any, engine: Any) -> None:
    """Sequences of many lengths join and leave; each must get what Transformers gives it alone."""
    joins = {0: (0, 3), 1: (0, 17), 2: (4, 9), 3: (7, 1)}  # slot -> step, length of the prompt
    counts = {0: 24, 1: 9, 2: 24, 3: 12}
    sequences = Sequences(engine, model.config.is_encoder_decoder)
    step, running = 0, set[int]()
    while step == 0 or running:
        for slot, (start, length) in joins.items():
            if start == step:
                sequences.add(slot, random_ids(slot, length))
                running.add(slot)
        sequences.step(sorted(running))
        for slot in sorted(running):
            if len(sequences.logits[slot]) == counts[slot]:
                engine.release([slot])
                running.remove(slot)
        step += 1
    for slot, (_, length) in joins.items():
        tokens, logits = generate(model, random_ids(slot, length), counts[slot])
        assert sequences.tokens[slot][-counts[slot] :] == tokens
        found = torch.stack(sequences.logits[slot])
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
