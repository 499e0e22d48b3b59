import pytest
import torch

from tgis.errors import ConfigError
from tgis.models.dtypes import choose_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_setting_is_obeyed(name: str, dtype: torch.dtype) -> None:
    assert choose_dtype(name) == (dtype, "asked for")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "dtype"),
    [
        (False, False, torch.float32),
        (False, True, torch.bfloat16),
        (True, True, torch.bfloat16),
    ],
)
def test_the_default_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    chosen, reason = choose_dtype(None)
    assert chosen == dtype
    assert "bfloat16" in reason


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="Unrecognized data type: int3"):
        choose_dtype("int3")
