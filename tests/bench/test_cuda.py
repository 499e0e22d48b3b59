"""What the benchmark of CUDA devices makes of what it measures; what it says without one."""

import pytest
import torch
import transformers
from benchmarks import cuda
from benchmarks.cuda import Bounds, Shape, mix_seconds, shape_of, step_seconds


def test_the_shape_counts_what_a_token_is_multiplied_by() -> None:
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    shape = shape_of(config, 2)
    assert shape.num_weights == sum(p.numel() for p in matrices)
    assert shape.weight_bytes == 2 * shape.num_weights
    assert shape.kv_bytes == 2 * 3 * 16 * 2


def test_a_step_is_bound_by_reading_or_by_multiplying() -> None:
    bounds, shape = Bounds(bandwidth=1000.0, rate=10_000.0), Shape(500, 1000, 10)
    assert step_seconds(bounds, shape, 1, 0) == 1.0
    assert step_seconds(bounds, shape, 1, 50) == 1.5
    assert step_seconds(bounds, shape, 100, 0) == 10.0
    # a prompt of 20 tokens, then tokens 2 and 3, which read 21 and 22 of the cache
    expected = 2.0 + (1 + 0.21) + (1 + 0.22)
    assert mix_seconds(bounds, shape, 1, 20, 3) == pytest.approx(expected)


def test_the_table_says_what_is_short() -> None:
    found = {name: {"tokens/s": 1234.0, "share": claim} for name, claim in cuda.CLAIMS.items()}
    found["prefill"]["share"] = 0.49
    table = cuda.table(found)
    assert table.count("(short)") == 1
    assert "| prefill | 1,234 | 0.49 (short) | 0.50 |" in table


def test_without_a_card_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main([]) == 1
    assert "there is none here: nothing was measured" in capsys.readouterr().err
