from pathlib import Path

import pytest
import torch
from tests.models.twins import CONFIGS, save_checkpoint

from tgis.config import Config
from tgis.engines.registry import choose_engine, load_engine
from tgis.errors import ConfigError, ModelError
from tgis.hub.resolve import resolve


def test_unset_is_native_for_known_families() -> None:
    assert choose_engine(None, "llama") == "tgis_native"
    with pytest.raises(ModelError, match="no engine serves model_type 'mamba'"):
        choose_engine(None, "mamba")


def test_a_setting_is_obeyed() -> None:
    assert choose_engine("tgis_native", "llama") == "tgis_native"
    with pytest.raises(ConfigError, match=r"DEPLOYMENT_FRAMEWORK = nope is unknown \(one of tgis"):
        choose_engine("nope", "llama")


def test_a_model_is_loaded_as_the_settings_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama"])
    config = Config(model_name=str(tmp_path), dtype="float32")
    with caplog.at_level("INFO"):
        engine = load_engine(config, resolve(config))
    assert engine.caps.dtype == "float32"
    assert str(torch.float32) in caplog.text
