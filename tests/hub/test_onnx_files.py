"""Which ONNX files are chosen, among all that the Hub may have."""

from pathlib import Path

import pytest

from tgis.errors import ModelError
from tgis.hub.onnx_files import GraphFiles, find_graphs, with_weights
from tgis.types import ModelKind

DECODER, SEQ2SEQ = ModelKind.DECODER_ONLY, ModelKind.ENCODER_DECODER
PAIR = ["decoder_model.onnx", "decoder_with_past_model.onnx"]


def write(directory: Path, names: list[str]) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return directory


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        (["model.onnx"], DECODER, (None, "model.onnx", "model.onnx")),
        (PAIR, DECODER, (None, *PAIR)),
        (
            [*PAIR, "decoder_model_merged.onnx"],
            DECODER,
            (None, "decoder_model_merged.onnx", "decoder_model_merged.onnx"),
        ),
        (["onnx/model.onnx"], DECODER, (None, "onnx/model.onnx", "onnx/model.onnx")),
        # What lies beside config.json comes first, and what is plain.
        (["model.onnx", "onnx/model.onnx"], DECODER, (None, "model.onnx", "model.onnx")),
        (
            ["model_fp16.onnx", "onnx/model.onnx"],
            DECODER,
            (None, "onnx/model.onnx", "onnx/model.onnx"),
        ),
        (
            ["onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"],
            DECODER,
            (None, "onnx/model.onnx", "onnx/model.onnx"),
        ),
        # The only variant.
        (["onnx/model_q4f16.onnx"], DECODER, (None, *["onnx/model_q4f16.onnx"] * 2)),
        (
            ["decoder_model_merged_quantized.onnx", "decoder_model_quantized.onnx"],
            DECODER,
            (None, *["decoder_model_merged_quantized.onnx"] * 2),
        ),
        (
            ["encoder_model.onnx", *PAIR],
            SEQ2SEQ,
            ("encoder_model.onnx", *PAIR),
        ),
        (
            [
                f"onnx/{name}{variant}.onnx"
                for name in ("encoder_model", "decoder_model_merged", "decoder_model")
                for variant in ("", "_quantized")
            ],
            SEQ2SEQ,
            ("onnx/encoder_model.onnx", *["onnx/decoder_model_merged.onnx"] * 2),
        ),
        # The encoder of one folder does not go with the decoder of another.
        (
            ["encoder_model.onnx", *(f"onnx/{name}" for name in ["encoder_model.onnx", *PAIR])],
            SEQ2SEQ,
            ("onnx/encoder_model.onnx", *(f"onnx/{name}" for name in PAIR)),
        ),
    ],
)
def test_chosen(
    tmp_path: Path, names: list[str], kind: ModelKind, expected: tuple[str | None, str, str]
) -> None:
    assert find_graphs(write(tmp_path, names), kind) == GraphFiles(*expected)


def test_none(tmp_path: Path) -> None:
    assert find_graphs(write(tmp_path, ["model.safetensors"]), DECODER) is None


@pytest.mark.parametrize(
    ("names", "kind", "text"),
    [
        (
            ["onnx/model_fp16.onnx", "onnx/model_quantized.onnx"],
            DECODER,
            r"several variants .*\(onnx/model_fp16.onnx, onnx/model_quantized.onnx\), and none",
        ),
        (PAIR[:1], DECODER, r"expected model.onnx or .*, but there are only decoder_model.onnx"),
        (PAIR, SEQ2SEQ, r"expected encoder_model.onnx and decoder_model_merged.onnx or "),
        (["encoder_model_fp16.onnx", *PAIR], SEQ2SEQ, r"there are only decoder_model.onnx, "),
    ],
)
def test_refused(tmp_path: Path, names: list[str], kind: ModelKind, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        find_graphs(write(tmp_path, names), kind)


def test_weights_beside_a_graph(tmp_path: Path) -> None:
    more = ["model.onnx_data", "model.onnx_data_1", "model_fp16.onnx", "model_fp16.onnx_data"]
    write(tmp_path, [f"onnx/{name}" for name in ["model.onnx", *more]])
    graphs = find_graphs(tmp_path, DECODER)
    assert graphs is not None
    found = ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx_data_1"]
    assert with_weights(tmp_path, graphs) == found
