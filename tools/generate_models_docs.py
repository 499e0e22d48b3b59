"""Write docs/models.md: which models run on which engine, and the shapes that prove it.

    python -m tools.generate_models_docs [--check]

Rows come from the engines' tables, cells from the configurations that the tests compare with
Transformers, so a family without a test shows as a row without shapes.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.engines import (
    hf_models,
    onnx_files,
    test_fms,
    test_native_seq2seq,
    test_onnx_export,
    test_optimum,
)
from tests.models import test_packing, test_quantised, twins
from tests.quant import test_bitsandbytes

from tgis.engines.registry import ENGINES
from tgis.models.families import FAMILIES
from tgis.models.families.t5 import SEQ2SEQ_FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """\
# Models

<!-- Made by tools/generate_models_docs.py from the tables and the tests: do not edit. -->

A model is a directory or a cached Hugging Face model with safetensors weights. `--deployment-framework`
(`DEPLOYMENT_FRAMEWORK`) chooses the engine; unset means the native one where the model's family is
known to it, else Transformers.

## Engines

| name | what it is |
|---|---|
| `tgis_native` | our own networks: one decoder, families as tables, fused CPU kernels; float32, bfloat16, float16; continuous batching with chunked prefill, prefix caching, tensor parallelism |
| `hf_transformers`, `hf_accelerate`, `hf_optimum_bt` | any causal or sequence-to-sequence model that Transformers can load, in padded batches whose rows join and leave |
| `hf_optimum_ort` | ONNX files in Optimum's layout, made by Optimum or by `text-generation-server convert-to-onnx`; extra `ort` |
| `ibm_fms` | checkpoints that IBM's Foundation Model Stack loads; extra `fms` |

[engines.md](engines.md) says how to choose. Other packages add engines through the entry point
group `tgis.engines`.

## Native families

Every shape below is a tiny random checkpoint that the tests compare with Transformers in float32:
logits within 1e-4 alone, in mixed batches, in chunks and cached, greedy tokens over 64 steps,
and bfloat16 within its own rounding (`tests/models`, `tests/engines/test_native_seq2seq.py`).
Under a [quantised format](quantisation.md) stands "yes" where the family has been compared with itself
on the weights that the quantised ones stand for; under the last two, whose inputs are rounded too, with
itself in float32, as near as 8 bits allow.
"""
GENERAL = """
## Transformers engine

Whatever `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` loads. These kinds are compared with
`generate` token by token, alone and in batches whose rows join and leave
(`tests/engines/test_hf.py`):

"""
OTHERS = """
## Engines of other libraries

Shapes that are compared with Transformers in the same way: through files that `convert-to-onnx`
has made (`tests/engines/test_ort.py`, `test_onnx_export.py`), through files that Optimum has made
(`test_optimum.py`), and in the Foundation Model Stack (`test_fms.py`).

"""
TAIL = """
Models with Python code of their own (`auto_map`) need `--trust-remote-code`, and run on this engine
only. Models with `.bin` weights only are refused with the command that converts them.
"""


def shapes(configs: Mapping[str, Any], model_type: str) -> str:
    """Names of the tested configurations of a model type."""
    return ", ".join(name for name, config in configs.items() if config.model_type == model_type)


def table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    columns = header.count("|") - 1
    body = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{header}\n{'|---' * columns}|\n{body}"


def page() -> str:
    """The whole page."""
    native = {**twins.CONFIGS, **test_native_seq2seq.CONFIGS}
    # RefinedWeb and RefinedWebModel are older names of Falcon in its configurations.
    types = sorted({*FAMILIES, *SEQ2SEQ_FAMILIES})
    rows = [(f"`{name}`", shapes(native, name) or _alias(name), *quantised(name)) for name in types]
    general = sorted({config.model_type for config in hf_models.CONFIGS.values()})
    general_rows = [(f"`{name}`", shapes(hf_models.CONFIGS, name)) for name in general]
    assert {"tgis_native", "hf_transformers"} <= ENGINES.keys()
    return (
        HEAD
        + "\n"
        + table(
            f"| model_type | shapes compared with Transformers | {' | '.join(QUANTISED)} |", rows
        )
        + GENERAL
        + table("| model_type | shapes |", general_rows)
        + TAIL
        + OTHERS
        + table("| model_type | convert-to-onnx | Optimum's files | ibm_fms |", other_rows())
    )


QUANTISED = {
    **dict.fromkeys(test_quantised.STORED, test_quantised.NAMES),
    **dict.fromkeys(test_quantised.LOADING, test_quantised.NAMES),
    "int8-dynamic": [*test_packing.CONFIGS, *test_packing.SEQ2SEQ],
    "bitsandbytes": test_bitsandbytes.NAMES,
}
"""Format of weights -> names of the configurations that are tested with it."""


def quantised(model_type: str) -> list[str]:
    """A cell for each format."""
    model_type = next(iter(_same(model_type)), model_type)
    tested = {
        name: config.model_type
        for name, config in (twins.CONFIGS | test_native_seq2seq.CONFIGS).items()
    }
    return [
        "yes" if model_type in {tested.get(name) for name in names} else ""
        for names in QUANTISED.values()
    ]


def other_rows() -> list[tuple[str, ...]]:
    """The engines of other libraries, by model type."""
    columns = [
        onnx_files.CONFIGS | {name: hf_models.CONFIGS[name] for name in test_onnx_export.FAMILIES},
        test_optimum.DECODERS | {"t5": onnx_files.CONFIGS["t5"]},
        test_fms.CONFIGS,
    ]
    types = sorted({config.model_type for configs in columns for config in configs.values()})
    return [(f"`{name}`", *(shapes(configs, name) for configs in columns)) for name in types]


def _same(model_type: str) -> list[str]:
    """Tested model types of the same family."""
    family = FAMILIES.get(model_type)
    same = [name for name in FAMILIES if FAMILIES[name] is family]
    return [name for name in same if shapes(twins.CONFIGS, name)]


def _alias(model_type: str) -> str:
    others = [f"`{name}`" for name in _same(model_type)]
    return f"read as {', '.join(others)}" if others else ""


def main() -> int:
    """Entry point."""
    if "--check" in sys.argv[1:]:
        in_step = PAGE.read_text() == page()
        if not in_step:
            print("docs/models.md is out of step: python -m tools.generate_models_docs")
        return 0 if in_step else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
