from typing import Any, NamedTuple

import pytest

from tgis.errors import ModelError
from tgis.quant.scheme import Scheme, read_scheme


class Info(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def gptq(**changes: Info | None) -> dict[str, Info]:
    tensors: dict[str, Info | None] = {
        "qweight": Info("I32", (8, 40)),
        "qzeros": Info("I32", (2, 5)),
        "scales": Info("F16", (2, 40)),
        "g_idx": Info("I32", (64,)),
        **changes,
    }
    return {f"x.{name}": info for name, info in tensors.items() if info is not None}


def awq(**changes: Info) -> dict[str, Info]:
    return gptq(qweight=Info("I32", (64, 5)), g_idx=None, **changes)


PLAIN = {"x.weight": Info("BF16", (4, 4))}


@pytest.mark.parametrize(
    ("config", "headers", "expected"),
    [
        (None, PLAIN, None),
        (GPTQ, gptq(), Scheme("gptq", 4, 32, 1)),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(), Scheme("gptq", 4, 32, 0)),
        ({"bits": 4, "group_size": 32}, gptq(), Scheme("gptq", 4, 32, 1)),
        (AWQ, awq(), Scheme("awq", 4, 32)),
        (
            {**GPTQ, "bits": 8, "group_size": -1},
            gptq(
                qweight=Info("I32", (16, 40)), qzeros=Info("I32", (1, 10)),
                scales=Info("BF16", (1, 40)),
            ),
            Scheme("gptq", 8, -1, 1),
        ),
    ],
)  # fmt: skip
def test_schemes(config: Any, headers: Any, expected: Scheme | None) -> None:
    assert read_scheme(config, headers) == expected


@pytest.mark.parametrize(
    ("config", "headers", "message"),
    [
        (None, gptq(), "weight x.qweight is quantised, but neither quantization_config"),
        (GPTQ, PLAIN, "quant_method = gptq, but no weight is stored as"),
        ({"quant_method": "fp8"}, gptq(), "quant_method = 'fp8' is not supported .only gptq, awq"),
        ({**GPTQ, "bits": 3}, gptq(), "bits = 3 is not supported .only 4, 8"),
        ({**GPTQ, "bits": True}, gptq(), "bits = True is not supported"),
        ({**AWQ, "bits": 8}, awq(), "bits = 8 is not supported .only 4"),
        ({**GPTQ, "bits": 8}, gptq(), r"weight x.qweight of shape \[8, 40\] does not hold the 64"),
        ({**GPTQ, "group_size": 0}, gptq(), "group_size = 0 is not a positive integer or -1"),
        ({**GPTQ, "group_size": None}, gptq(), "group_size = None is not"),
        ({**GPTQ, "group_size": 128}, gptq(), "x.scales has 2 groups, .* = 128 makes 1 of 64"),
        ({**GPTQ, "checkpoint_format": "marlin"}, gptq(), "checkpoint_format = 'marlin' is not"),
        ({**AWQ, "version": "gemv"}, awq(), "version = 'gemv' is not supported .only gemm"),
        (GPTQ, gptq(g_idx=None), "weight x.g_idx does not exist"),
        (GPTQ, gptq(scales=None), "weight x.scales does not exist"),
        (GPTQ, gptq(qzeros=None), "weight x.qzeros does not exist"),
        (GPTQ, gptq(qweight=Info("F16", (8, 40))), r"weight x.qweight is F16 \[8, 40\], but must"),
        (GPTQ, gptq(g_idx=Info("I32", (64, 1))), "weight x.g_idx is .* with 1 dimension$"),
        (GPTQ, gptq(scales=Info("F16", (2, 41))), r"weight x.scales has shape \[2, 41\], but"),
        (GPTQ, gptq(qzeros=Info("I32", (2, 6))), r"qzeros has shape .*asks for \[2, 5\]"),
    ],
)
def test_what_is_wrong_is_named(config: Any, headers: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_scheme(config, headers)
    assert "\n" not in str(caught.value)
