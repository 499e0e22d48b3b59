"""Every back end that is installed against the reference, on the card."""

from dataclasses import replace

import pytest
import torch
from tests.models.attention.test_blocks import KINDS, STEPS, case

from tgis.models.attention.backends import BACKENDS, Needs
from tgis.models.attention.blocks import attend_reference

CARD = torch.device("cuda", 0)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_against_the_reference(name: str, kind: str, step: str, dtype: torch.dtype) -> None:
    heads = replace(KINDS[kind], head_dim=64)
    backend = BACKENDS[name]
    reason = backend.refusal(Needs(CARD, dtype, heads.head_dim, heads.slopes is not None))
    if reason:
        pytest.skip(f"{name}: {reason}")
    one = case(heads, STEPS[step], backend.block_tokens, dtype, CARD)
    exact = case(heads, STEPS[step], backend.block_tokens, torch.float32, CARD)
    expected = exact.attend(attend_reference)
    with torch.inference_mode():
        computed = one.attend(backend.load()).float()
    torch.testing.assert_close(computed, expected, rtol=0, atol=TOLERANCE[dtype])
