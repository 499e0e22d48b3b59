"""Where the native engine computes, by settings and by what cards there are."""

from typing import Any

import pytest
import torch

from tgis.config import Config
from tgis.engines.placement import HOST, Placement, choose_placement, prepare_card
from tgis.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(params=[0, 2])
def cards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return int(request.param)


def chosen(**settings: Any) -> Placement:
    return choose_placement(Config(**settings))


def test_what_is_chosen(cards: int, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen() == HOST
    assert ("not on 2 GPUs" in caplog.text) == bool(cards)
    assert chosen(device="cpu") == HOST
    assert chosen(device="cpu", kv_layout="blocks", attention="flex") == (CPU, "blocks", "flex")
    if cards:
        assert chosen(device="cuda") == Placement(torch.device("cuda", 0), "blocks")
        second = torch.device("cuda", 1)
        found = chosen(device="cuda", rank=1, num_shard=2, attention="flex")
        assert found == (second, "blocks", "flex")
        spread = {"world_size": 6, "num_shard": 6, "local_world_size": 2, "rank": 5}
        assert chosen(device="cuda", **spread).device == second


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        chosen(**settings)
    return str(caught.value)


def test_what_is_refused(cards: int) -> None:
    assert refusal(device="cpu", attention="flex").startswith("ATTENTION = flex: it chooses what")
    if cards:
        assert refusal(device="cuda", kv_layout="rows").startswith(
            "KV_LAYOUT = rows: it is for CPUs"
        )
        assert refusal(device="cuda", num_shard=3) == "3 shards configured but only 2 GPUs detected"
    else:
        assert refusal(device="cuda").startswith("DEVICE = cuda: there is no CUDA device")


@pytest.mark.parametrize("given", [None, "max_split_size_mb:128"])
def test_a_card_is_prepared(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    """PyTorch reads the variable itself; TGIS's own choice stands in where there is none."""
    calls: list[object] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", calls.append)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.append)
    second = torch.device("cuda", 1)
    config = Config(pytorch_cuda_alloc_conf=given, cuda_process_memory_fraction=0.6)
    prepare_card(config, second)
    assert calls == ([] if given else ["expandable_segments:True"]) + [second, 0.6]
