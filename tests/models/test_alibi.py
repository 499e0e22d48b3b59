import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from tgis.models.attention.alibi import alibi_slopes

NUM_HEADS = [1, 2, 3, 5, 6, 8, 12, 32, 71, 112]


@pytest.mark.parametrize("num_heads", NUM_HEADS)
def test_the_slopes_of_bloom(num_heads: int) -> None:
    bias = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(num_heads), bias[:, 0, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_bias", [4.0, 8.0])
@pytest.mark.parametrize("num_heads", NUM_HEADS)
def test_the_slopes_of_mpt(num_heads: int, max_bias: float) -> None:
    bias = build_mpt_alibi_tensor(num_heads, 2, max_bias)
    slopes = alibi_slopes(num_heads, max_bias)
    torch.testing.assert_close(slopes, -bias[:, 0, 0], rtol=1e-6, atol=0)
