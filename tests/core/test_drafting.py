"""What `--speculate` becomes, and what of memory is set aside for it."""

from pathlib import Path

import msgspec
import pytest
from tests.kit.fake_engine import FakeEngine

from tgis.config import SERVE, Config, parse
from tgis.core.draft_model import DraftModel
from tgis.core.drafting import Drafting
from tgis.core.drafts import PromptLookup
from tgis.core.pool import make_pool
from tgis.core.speculation import NO_SPECULATION
from tgis.engines.base import CacheShape, EngineCaps
from tgis.errors import ConfigError
from tgis.hub.resolve import resolve
from tgis.types import ModelFiles

LENGTH = 128


def config(drafts: str, *flags: str) -> Config:
    return parse(["--speculate", drafts, "--dtype", "float32", *flags], {}, SERVE)


def demo() -> ModelFiles:
    return resolve(parse([], {}, SERVE))


def engine(**caps: object) -> FakeEngine:
    fake = FakeEngine()
    fake.caps = _replaced(fake.caps, caps)
    fake.allocate(CacheShape(4, LENGTH))
    return fake


def _replaced(caps: EngineCaps, changes: dict[str, object]) -> EngineCaps:
    import dataclasses

    return dataclasses.replace(caps, **changes)  # type: ignore[arg-type]


def test_off_costs_nothing() -> None:
    fake = engine(verifies_drafts=False)
    assert Drafting(config("off"), fake, None, LENGTH).speculation() is NO_SPECULATION
    assert not fake.plans


def test_prompt_lookup() -> None:
    drafting = Drafting(config("prompt-lookup"), engine(), None, LENGTH)
    speculation = drafting.speculation()
    assert isinstance(speculation._drafter, PromptLookup)
    assert drafting.reserved_bytes == 0


@pytest.mark.parametrize(
    ("flags", "is_quantised", "most"),
    [
        ([], False, 128),
        (["--quantize", "int8-dynamic"], False, 128),
        (["--quantize", "int4"], False, 32),
        ([], True, 32),
    ],
)
def test_steps_with_drafts_are_small_enough_to_be_rounded_alike(
    flags: list[str], is_quantised: bool, most: int
) -> None:
    settings = config("prompt-lookup", *flags)
    drafting = Drafting(settings, engine(), None, LENGTH, is_quantised)
    assert drafting.speculation()._most_step_tokens == most


def test_a_draft_model_and_its_memory() -> None:
    small = config("/a/model", "--speculate-max-batch-size", "3")
    drafting = Drafting(small, engine(), demo(), LENGTH)
    assert isinstance(drafting.speculation()._drafter, DraftModel)
    # keys and values of 6 layers with 4 heads of 32 floats
    assert drafting.reserved_bytes == 3 * LENGTH * 2 * 6 * 4 * 32 * 4


@pytest.mark.parametrize("drafts", ["prompt-lookup", "/a/model"])
def test_engines_that_cannot_verify_are_refused_by_name(drafts: str) -> None:
    files = demo() if drafts != "prompt-lookup" else None
    with pytest.raises(ConfigError, match=f"--speculate={drafts}: engine fake cannot verify"):
        Drafting(config(drafts), engine(verifies_drafts=False), files, LENGTH)


def test_draft_models_are_decoders_of_the_native_engine() -> None:
    files = msgspec.structs.replace(demo(), model_type="xlnet")
    with pytest.raises(ConfigError, match="does not serve models of type xlnet"):
        Drafting(config("/a/model"), engine(), files, LENGTH)
    with pytest.raises(ConfigError, match="on the CPU only; prompt-lookup works"):
        Drafting(config("/a/model"), engine(kv_layout="blocks"), demo(), LENGTH)


def test_a_broken_draft_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    files = msgspec.structs.replace(demo(), path=str(tmp_path), weights=("model.safetensors",))
    with pytest.raises(ConfigError, match="--speculate=/a/model: "):
        Drafting(config("/a/model"), engine(), files, LENGTH)


def test_reserved_memory_is_not_dealt_out(caplog: pytest.LogCaptureFixture) -> None:
    settings = config("off", "--kv-cache-memory", "2MB", "--max-batch-size", "2")
    fake = engine(kv_bytes_per_token=10_000)
    assert make_pool(fake, settings, 64).memory.total == 200
    assert make_pool(fake, settings, 64, 1_000_000).memory.total == 100
    with pytest.raises(ConfigError, match="--kv-cache-memory is 500000"):
        make_pool(fake, settings, 64, 1_500_000)
