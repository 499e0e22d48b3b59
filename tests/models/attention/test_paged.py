"""The kernel in Triton, by its interpreter where there is no card."""

import os

import pytest
import torch
from tests.models.attention.test_blocks import KINDS, STEPS, case

from tgis.models.attention.blocks import Attend, attend_reference

pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
if os.environ.get("TRITON_INTERPRET") != "1":
    reason = "Triton's interpreter must be asked for from the start: TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def attend() -> Attend:
    from tgis.models.attention.paged import attend_paged

    return attend_paged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_against_the_reference(attend: Attend, kind: str, step: str) -> None:
    one = case(KINDS[kind], STEPS[step])
    expected = one.attend(attend_reference)
    torch.testing.assert_close(one.attend(attend), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_sizes_of_blocks(attend: Attend, size: int) -> None:
    one = case(KINDS["alibi-window"], STEPS["chunks-and-decoding"], size)
    expected = one.attend(attend_reference)
    torch.testing.assert_close(one.attend(attend), expected, rtol=0, atol=2e-5)


def test_half_precision(attend: Attend) -> None:
    one = case(KINDS["grouped"], STEPS["long"], dtype=torch.float16)
    expected = one.attend(attend_reference)
    torch.testing.assert_close(one.attend(attend), expected, rtol=0, atol=4e-3)


def test_what_lies_beyond_the_last_key_does_not_count(attend: Attend) -> None:
    one = case(KINDS["grouped"], STEPS["decoding"])
    expected = one.attend(attend)
    blocks = one.inputs.blocks
    assert blocks is not None
    for table, length in zip(blocks.tables, blocks.num_keys, strict=True):
        last = int(table[(length - 1) // 16])
        one.k[last, (length - 1) % 16 + 1 :] = torch.inf
        one.v[last, (length - 1) % 16 + 1 :] = torch.nan
    assert torch.equal(one.attend(attend), expected)
