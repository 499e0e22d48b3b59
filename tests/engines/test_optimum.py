"""Files that Optimum has made serve as ours do."""

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the extra tgis[ort] is not installed")

from tests.engines.hf_models import CONFIGS, save_model
from tests.engines.onnx_files import CONFIGS as TINY
from tests.engines.onnx_files import joining_and_leaving, load
from tests.engines.optimum_files import export_with_optimum
from tests.engines.test_hf import Loaded, check_any_company

from tgis.hub import onnx_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.usefixtures("single_thread")]
DECODERS = {"llama": TINY["llama"]} | {name: CONFIGS[name] for name in ("opt", "falcon-alibi")}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(tmp_path: Path, name: str) -> None:
    config = DECODERS[name]
    model = save_model(tmp_path / "model", config)
    export_with_optimum(tmp_path / "model", tmp_path / "onnx", "text-generation")
    engine = load(tmp_path / "onnx")
    assert engine._batching == "padded"
    joining_and_leaving(model, engine)


def test_an_encoder_and_a_decoder_in_two_files_or_merged(tmp_path: Path) -> None:
    """Its decoders take no mask of their own: only rows of equal length share a pass."""
    model = save_model(tmp_path / "model", TINY["t5"])
    export_with_optimum(tmp_path / "model", tmp_path / "onnx", "text2text-generation")
    for file in (onnx_files.MERGED, onnx_files.LATER):
        engine = load(tmp_path / "onnx")
        assert engine._batching == "aligned"
        assert engine._network._later.name == file
        joining_and_leaving(model, engine)
        check_any_company(Loaded("", model, engine), 1)
        if file == onnx_files.MERGED:
            (tmp_path / "onnx" / file).unlink()
