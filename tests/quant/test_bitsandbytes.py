import sys
import warnings
from pathlib import Path

import pytest
import torch
from tests.engines import test_native_seq2seq as seq2seq
from tests.models import twins
from tests.models.test_packing import near
from tests.models.test_quantised import CONFIGS, NAMES, logits

from tgis.errors import ConfigError
from tgis.models.packing import choose_packing


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"QUANTIZE = bitsandbytes: .* pip install 'tgis\[bitsandbytes\]'$"
    with pytest.raises(ConfigError, match=message):
        choose_packing("bitsandbytes", torch.bfloat16)


def require_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes", reason="the extra tgis[bitsandbytes] is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_families(tmp_path: Path, name: str) -> None:
    require_library()
    if name in seq2seq.CONFIGS:
        seq2seq.save(CONFIGS[name], tmp_path)
    else:
        twins.save_checkpoint(tmp_path, CONFIGS[name])
    near(logits(tmp_path, "bitsandbytes"), logits(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_lose_as_much_as_8_bits_do(dtype: torch.dtype, bias: bool) -> None:
    require_library()
    packing = choose_packing("bitsandbytes", dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator).to(dtype)
    b = torch.randn(96, generator=generator).to(dtype) if bias else None
    for rows in (1, 3, 40):
        x = torch.randn(rows, 128, generator=generator)
        x[:, 7] = 20.0  # beyond the threshold: computed in full precision
        x = x.to(dtype)
        exact = torch.nn.functional.linear(
            x.float(), weight.float(), None if b is None else b.float()
        )
        y = packing.make_linear(weight, b)(x)
        assert y.dtype == dtype
        assert (y.float() - exact).norm() < 0.02 * exact.norm()
        assert packing.make_head(weight, b)(x).dtype == torch.float32
