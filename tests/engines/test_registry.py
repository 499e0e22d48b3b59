import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from tests.models.twins import CONFIGS, save_checkpoint

from tgis.config import Config, parse
from tgis.engines.registry import choose_engine, load_engine
from tgis.errors import ConfigError, ModelError
from tgis.hub.resolve import resolve
from tgis.models.collectives import Group
from tgis.models.parallel import Shard

# An engine of another package: it answers every step with zeros.
TOY = """
import torch
from tgis.engines.base import EngineCaps

class Toy:
    def __init__(self, config, files, dtype):
        self.arguments = (config, files, dtype)
        self.caps = EngineCaps("Toy", files.kind, "padded", False, 5, None, 1, str(dtype))

    def allocate(self, shape): pass
    def forward(self, plan): return torch.zeros(plan.num_logits, 5)
    def release(self, slots): pass
    def close(self): pass

def load(config, files, dtype, progress):
    progress(1, 1)
    return Toy(config, files, dtype)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that registers engines, as an installer leaves it."""
    site = tmp_path / "site"
    info = site / "toy_engine-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "toy_engine.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tgis.engines]\nToy = toy_engine:load\nlost = toy_engine:nowhere\n"
        "tgis_native = toy_engine:load\n"
    )
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("toy_engine", None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_checkpoint(path, CONFIGS["llama"])
    return path


def test_unset_is_native_for_known_families_and_transformers_for_others() -> None:
    for model_type in ("llama", "t5", "gpt2"):
        assert choose_engine(None, model_type).name == "tgis_native"
    for model_type in ("mamba", "bart", "made_up"):
        assert choose_engine(None, model_type).name == "hf_transformers"


@pytest.mark.parametrize("name", ["hf_transformers", "hf_accelerate", "hf_optimum_bt"])
def test_a_setting_is_obeyed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_engine("tgis_native", "llama").name == "tgis_native"
    assert not caplog.records
    assert choose_engine(name, "bart").value == "tgis.engines.hf:load"
    assert not caplog.records
    assert choose_engine(name, "bloom").value == "tgis.engines.hf:load"
    assert caplog.messages == ["tgis_native is the recommended engine for models of type bloom"]


@pytest.mark.parametrize(
    ("name", "module"), [("hf_optimum_ort", "tgis.engines.ort"), ("ibm_fms", "tgis.engines.fms")]
)
def test_engines_of_other_libraries(name: str, module: str) -> None:
    assert choose_engine(name, "llama").value == f"{module}:load"


def test_what_is_impossible_says_what_is_possible() -> None:
    message = (
        "DEPLOYMENT_FRAMEWORK = ds_inference: this installation has no such engine; a model of"
        " type mamba can be served by hf_transformers, hf_accelerate, hf_optimum_bt, hf_optimum_ort"
    )
    with pytest.raises(ConfigError) as refused:
        choose_engine("ds_inference", "mamba")
    assert str(refused.value) == message
    text = "can be served by tgis_native, hf_transformers, .*, hf_optimum_ort, ibm_fms$"
    with pytest.raises(ConfigError, match=text):
        choose_engine("ds_inference", "llama")
    with pytest.raises(ModelError, match=r"does not serve models of type mamba \(only .*llama.*\)"):
        choose_engine("tgis_native", "mamba")


def test_a_model_is_loaded_as_the_settings_say(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(model_name=str(model), dtype="float32")
    with caplog.at_level("INFO"):
        engine = load_engine(config, resolve(config))
    assert engine.caps.dtype == "float32"
    assert str(torch.float32) in caplog.text


@pytest.mark.usefixtures("toy")
def test_another_package_can_register_an_engine(model: Path) -> None:
    config = parse([str(model), "--engine", "Toy", "--dtype", "bfloat16"], {})
    assert config.deployment_framework == "Toy"
    files, told = resolve(config), list[tuple[int, int]]()
    engine = load_engine(config, files, lambda *call: told.append(call))
    assert engine.caps.name == "Toy"
    assert engine.arguments == (config, files, torch.bfloat16)  # type: ignore[attr-defined]
    assert told == [(1, 1)]
    with pytest.raises(ConfigError, match="hf_optimum_ort, Toy, lost"):
        choose_engine("ds_inference", "mamba")


@pytest.mark.usefixtures("toy")
def test_names_of_our_own_cannot_be_taken() -> None:
    assert choose_engine("tgis_native", "llama").value.startswith("tgis.")


@pytest.mark.usefixtures("toy")
def test_a_registered_engine_that_is_not_there(model: Path) -> None:
    config = Config(model_name=str(model), deployment_framework="lost")
    with pytest.raises(ConfigError, match="toy_engine:nowhere cannot be imported"):
        load_engine(config, resolve(config))


@pytest.mark.parametrize("framework", [None, "tgis_native", "hf_transformers", "hf_accelerate"])
def test_only_the_native_engine_splits_models(
    model: Path, framework: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    files = resolve(Config(model_name=str(model)))
    config = Config(deployment_framework=framework, dtype="float32", num_shard=2)
    engine = load_engine(config, files, group=Group(Shard(1, 2)))
    assert engine.caps.name == "tgis_native"
    warned = f"rather than {framework} because more than one shard is configured" in caplog.text
    assert warned is (framework not in (None, "tgis_native"))


def test_a_model_that_cannot_be_split_is_refused(model: Path) -> None:
    files = resolve(Config(model_name=str(model)))
    other = msgspec.structs.replace(files, model_type="cohere")
    with pytest.raises(ModelError, match=r"num_shard = 2: models of type cohere cannot be split"):
        load_engine(Config(num_shard=2), other, group=Group(Shard(0, 2)))
