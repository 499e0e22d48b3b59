"""Checkpoints that GPTQModel has made serve here; it and Transformers read those of our command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engines.gptqmodel_files import (
    logits_of_gptqmodel,
    logits_of_transformers,
    quantise_with_gptqmodel,
)
from tests.engines.test_gptq_run import load, logits
from tests.models import twins
from torch import Tensor

from tgis.cli.server import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]

IDS = [1, *twins.random_ids(4, 30)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    story = "Lily and Tom went to the park. They saw a big red ball and a little dog. " * 8
    path.write_text("\n\n".join([story] * 16))
    return path


def values(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> [rows, n x 32 / bits]."""
    shifts = torch.arange(0, 32, bits)
    return ((words.long()[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def stands_for(tensors: dict[str, Tensor], name: str, bits: int, offset: int) -> Tensor:
    """A weight [out, in], as the format's description says."""
    q = values(tensors[f"{name}.qweight"].T, bits).T
    zero = values(tensors[f"{name}.qzeros"], bits) + offset
    group = tensors[f"{name}.g_idx"].long()
    return (tensors[f"{name}.scales"].float()[group] * (q - zero[group])).T


def awq_stands_for(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The same for AWQ, whose words have their outputs in another order."""

    def unpacked(part: str) -> Tensor:
        found = values(tensors[f"{name}.{part}"], 4)
        places = torch.arange(found.shape[1]).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        return torch.empty_like(found).index_copy_(1, places, found)

    q, zero, scale = unpacked("qweight"), unpacked("qzeros"), tensors[f"{name}.scales"].float()
    group = torch.arange(len(q)) // (len(q) // len(scale))
    return (scale[group] * (q - zero[group])).T


@pytest.mark.parametrize(
    ("options", "offset"),
    [
        (("4", "128", "no", "gptq"), 1),
        (("4", "64", "yes", "gptq"), 1),
        (("8", "32", "no", "gptq"), 1),
        (("4", "128", "no", "gptq_v2"), 0),
        (("4", "32", "no", "gemm"), 0),
    ],
    ids=["usual", "order of activation", "8 bits", "version 2", "awq"],
)
def test_its_checkpoints(
    demo_model_dir: Path, text: Path, tmp_path: Path, options: tuple[str, ...], offset: int
) -> None:
    quantise_with_gptqmodel(demo_model_dir, tmp_path / "made", text, *options)
    engine = load(tmp_path / "made")
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    import transformers

    oracle = transformers.AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name in tensors:  # AWQ changes norms too
                parameter.copy_(tensors[name])
        for name, module in oracle.named_modules():
            if f"{name}.qweight" in tensors:
                if options[-1] == "gemm":
                    module.weight.copy_(awq_stands_for(tensors, name))
                else:
                    module.weight.copy_(stands_for(tensors, name, int(options[0]), offset))
        expected = oracle(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(engine, IDS), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "read"),
    [
        (["--act-order"], logits_of_gptqmodel),
        (["--no-sym"], logits_of_gptqmodel),
        (["--bits", "8"], logits_of_gptqmodel),
        # Its kernel for CPUs wants whole groups, and 704 input features are no multiple of 128.
        (["--group-size", "64"], logits_of_transformers),
        (["--group-size", "64", "--act-order"], logits_of_transformers),
    ],
    ids=["order", "zero points", "8 bits", "transformers", "transformers, order"],
)
def test_ours(
    demo_model_dir: Path, text: Path, tmp_path: Path, options: list[str], read: Any
) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(demo_model_dir), str(out), "--calibration-file", str(text)]
    assert main([*command, "--samples", "4", "--sample-length", "64", *options]) == 0
    read(out, json.dumps(IDS), tmp_path / "logits")
    theirs = torch.load(tmp_path / "logits", weights_only=True)
    ours = logits(load(out), IDS)
    assert (theirs - ours).norm() < 0.02 * ours.norm()  # it may compute in 16 bits
