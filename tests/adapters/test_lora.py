"""PEFT's LoRA files: what is read of them, and what is refused, each by name."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.adapters.lora_files import (
    CONFIG,
    EMBEDDING,
    HIDDEN,
    PREFIX,
    RANK,
    TARGETS,
    VOCAB,
    pair,
    read,
    write,
)
from torch import Tensor

from tgis.adapters.lora import Lora
from tgis.adapters.store import Refused

FILES = ["adapter_model.safetensors", "adapter_model.bin"]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("file", FILES)
def test_all_modules(tmp_path: Path, file: str) -> None:
    modules = ["model.embed", "model.0.q", "model.0.down", "lm_head"]
    tensors = {k: v for n, module in enumerate(modules) for k, v in pair(module, seed=n).items()}
    write(tmp_path, tensors, file)
    lora = read(tmp_path)
    assert set(lora.pairs) == set(modules)
    for n, module in enumerate(modules):
        a, b = pair(module, seed=n).values()
        torch.testing.assert_close(lora.pairs[module], (a, b * 3.0))
    assert lora.num_bytes == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({"r": 5}, 5, 6 / 5),
        ({"r": 4, "use_rslora": True}, 4, 3.0),
        ({"lora_alpha": 1.5}, 2, 0.75),
        ({"rank_pattern": {"q": 3}}, 3, 2.0),
        ({"rank_pattern": {"model.0.q": 1, "q": 3}}, 1, 6.0),
        ({"rank_pattern": {"0.q": 3}, "alpha_pattern": {"down": 1, "q": 9}}, 3, 3.0),
        ({"alpha_pattern": {r"^model\.\d+\.(q|v)": 4}}, 2, 2.0),
        ({"alpha_pattern": {r".*\.q": 8, "q": 1}}, 2, 4.0),
        ({"alpha_pattern": {"model.0": 8, "uq": 8, "q.x": 8}}, 2, 3.0),
        ({"r": 3, "lora_alpha": None}, 3, None),
    ],
    ids=str,
)
def test_ranks_and_scales(
    tmp_path: Path, config: dict[str, Any], rank: int, scale: float | None
) -> None:
    tensors = pair("model.0.q", rank)
    write(tmp_path, tensors, **config)
    if scale is None:
        refused(tmp_path, "option lora_alpha = None is not a number of that size")
        return
    a, b = tensors.values()
    torch.testing.assert_close(read(tmp_path).pairs["model.0.q"], (a, b * scale))


def test_types(tmp_path: Path) -> None:
    """Computed in float32, and rounded once."""
    a, b = pair("model.0.q").values()
    for stored in (torch.float64, torch.float16, torch.bfloat16):
        tensors = {name: t.to(stored) for name, t in pair("model.0.q").items()}
        write(tmp_path, tensors, lora_alpha=0.2)
        for dtype in (torch.float32, torch.bfloat16):
            got = read(tmp_path, dtype=dtype).pairs["model.0.q"]
            expected = (a.to(stored).to(dtype), (b.to(stored).float() * 0.1).to(dtype))
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_names_without_or_with_other_prefixes(tmp_path: Path) -> None:
    write(tmp_path, pair("0.q"))
    assert set(read(tmp_path).pairs) == {"model.0.q"}
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in pair("model.0.q").items()}
    write(tmp_path, bare)
    assert set(read(tmp_path).pairs) == {"model.0.q"}


def test_copies_of_the_models_own_weights(tmp_path: Path) -> None:
    """PEFT saves them beside adapters of embeddings and heads."""
    table = torch.cat((EMBEDDING, torch.randn(VOCAB - 3, HIDDEN)))
    copy = {f"{PREFIX}model.embed.base_layer.weight": table}
    for file in FILES:
        (tmp_path / "a" / WEIGHTS).unlink(missing_ok=True)
        write(tmp_path, {**pair("model.embed"), **copy}, file)
        assert set(read(tmp_path).pairs) == {"model.embed"}
    write(tmp_path, {**pair("model.embed"), **{k: v + 1 for k, v in copy.items()}})
    refused(tmp_path, "embed.base_layer.weight is not the model's: it was trained on another model")
    write(tmp_path, {**pair("model.embed"), **{k: v[:-1] for k, v in copy.items()}})
    refused(tmp_path, f"embed.base_layer.weight has shape [10, 6], but {ASK_FOR} [11, 6]")


ASK_FOR = "this model and adapter_config.json ask for"


def refused(root: Path, *messages: str, **rules: Any) -> None:
    with pytest.raises(Refused) as caught:
        read(root, **rules)
    for message in messages:
        assert message in str(caught.value)
    assert str(root) not in str(caught.value)


def q(**changes: Tensor | None) -> dict[str, Tensor]:
    """The pair of a module with some tensors replaced or left out."""
    named = {PREFIX + name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {k: v for k, v in {**pair("model.0.q"), **named}.items() if v is not None}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__0__q__lora_A__weight": torch.zeros(RANK, HIDDEN + 1)},
            f"model.0.q.lora_A.weight has shape [2, 7], but {ASK_FOR} [2, 6]",
        ),
        (
            {"model__0__q__lora_B__weight": torch.zeros(8, RANK + 1)},
            f"model.0.q.lora_B.weight has shape [8, 3], but {ASK_FOR} [8, 2]",
        ),
        (
            {"model__0__q__lora_B__weight": torch.zeros(16)},
            f"model.0.q.lora_B.weight has shape [16], but {ASK_FOR} [8, 2]",
        ),
        (
            {"model__0__q__lora_A__weight": torch.tensor(1.0)},
            f"model.0.q.lora_A.weight has shape [], but {ASK_FOR} [2, 6]",
        ),
        ({"model__0__q__lora_B__weight": None}, "model.0.q.lora_A.weight has no counterpart"),
        (
            {"model__1__q__lora_A__weight": torch.zeros(2, 6)},
            "model.1.q.lora_A.weight: this model has no module that it could belong to",
        ),
        (
            {"0__q__lora_A__weight": torch.zeros(RANK, HIDDEN)},
            "0.q.lora_A.weight is there twice, by another name",
        ),
        (
            {"model__0__q__lora_magnitude_vector": torch.zeros(8)},
            "model.0.q.lora_magnitude_vector is not supported: it is no matrix of LoRA",
        ),
        (
            {"lm_head__weight": torch.zeros(VOCAB, HIDDEN)},
            "lm_head.weight is not supported: it is no matrix of LoRA",
        ),
        (
            {"model__0__q__base_layer__weight": torch.zeros(8, HIDDEN)},
            "model.0.q.base_layer.weight: this model has no module that it could belong to",
        ),
        (
            {"model__embed__lora_A__weight": torch.zeros(RANK, VOCAB)},
            "model.embed.lora_A.weight: in this model that module is an embedding",
        ),
        (
            {"model__0__down__lora_embedding_A": torch.zeros(RANK, 4)},
            "model.0.down.lora_embedding_A: in this model that module is no embedding",
        ),
        (
            {"model__0__q__lora_A__weight": torch.zeros(RANK, HIDDEN, dtype=torch.int32)},
            "model.0.q.lora_A.weight is of torch.int32, not of floating point numbers",
        ),
        (
            {"model__0__q__lora_B__weight": torch.full((8, RANK), float("nan"))},
            "model.0.q.lora_B.weight contains non-finite elements",
        ),
        (
            {"model__0__q__lora_A__weight": torch.full((RANK, HIDDEN), 3.4e38)},
            "model.0.q.lora_A.weight contains non-finite elements after conversion"
            " from torch.float32 to torch.float16",
        ),
        (
            {"model__0__q__lora_B__weight": torch.full((8, RANK), 3e4)},
            "model.0.q.lora_B.weight contains non-finite elements after conversion",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_tensors_that_are_refused(
    tmp_path: Path, file: str, changes: dict[str, Tensor | None], message: str
) -> None:
    write(tmp_path, q(**changes), file)
    refused(tmp_path, message, dtype=torch.float16)


def test_no_tensors(tmp_path: Path) -> None:
    write(tmp_path, {})
    refused(tmp_path, "there are no LoRA tensors")
    (tmp_path / "a" / WEIGHTS).unlink()
    refused(tmp_path, "neither adapter_model.safetensors nor adapter_model.bin is there")


def test_a_limit_in_bytes_of_the_models_type(tmp_path: Path) -> None:
    tensors = pair("model.0.q")
    num_bytes = sum(t.nbytes for t in tensors.values())
    for file in FILES:
        write(tmp_path, tensors, file)
        assert read(tmp_path, limit=num_bytes).num_bytes == num_bytes
        assert read(tmp_path, limit=num_bytes // 2, dtype=torch.bfloat16).num_bytes
        message = f"{num_bytes} bytes exceed the allowed cache size of {num_bytes - 1}"
        refused(tmp_path, message, limit=num_bytes - 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "option use_dora = True is not supported"),
        ({"bias": "lora_only"}, "option bias = 'lora_only' is not supported"),
        ({"lora_bias": True}, "option lora_bias = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "option modules_to_save = ['lm_head'] is not supported"),
        ({"layer_replication": [[0, 4]]}, "option layer_replication = [[0, 4]] is not supported"),
        ({"target_parameters": ["x"]}, "option target_parameters = ['x'] is not supported"),
        ({"trainable_token_indices": [1]}, "option trainable_token_indices = [1] is not supported"),
        ({"alora_invocation_tokens": [1]}, "option alora_invocation_tokens = [1] is not supported"),
        ({"use_qalora": True}, "option use_qalora = True is not supported"),
        ({"ensure_weight_tying": True}, "option ensure_weight_tying = True is not supported"),
        ({"of_the_future": {"x": 1}}, "option of_the_future = {'x': 1} is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "option init_lora_weights = pissa_niter_4 is not"),
        ({"init_lora_weights": "olora"}, "it changes the model's own weights"),
        ({"r": 0}, "option r = 0 is not a rank (1 to 65536)"),
        ({"r": 1 << 20}, "option r = 1048576 is not a rank"),
        ({"r": True}, "option r = True is not a rank"),
        ({"r": 2.0}, "option r = 2.0 is not a rank"),
        ({"r": 3}, f"model.0.q.lora_A.weight has shape [2, 6], but {ASK_FOR} [3, 6]"),
        ({"lora_alpha": "8"}, "option lora_alpha = '8' is not a number of that size"),
        ({"lora_alpha": float("nan")}, "option lora_alpha = nan is not a number of that size"),
        ({"lora_alpha": 1e300}, "option lora_alpha = 1e+300 is not a number of that size"),
        ({"use_rslora": "yes"}, "option use_rslora = 'yes' is not true or false"),
        ({"rank_pattern": ["q"]}, "option rank_pattern is not an object of at most 5 entries"),
        ({"rank_pattern": {str(n): 1 for n in range(6)}}, "is not an object of at most 5 entries"),
        ({"rank_pattern": {"q": "x"}}, "option rank_pattern: q = 'x' is not a rank"),
        ({"alpha_pattern": {"q": None}}, "option alpha_pattern: q = None is not a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "option alpha_pattern: pattern (a+)+$ is not supported"),
        ({"alpha_pattern": {".*.*.*x": 1}}, "pattern .*.*.*x is not supported"),
        ({"alpha_pattern": {"(q": 1}}, "option alpha_pattern: pattern (q is malformed"),
        ({"alpha_pattern": {"q" * 300 + "*": 1}}, "... is not supported"),
        ({"x" * 5000: 1}, "... = 1 is not supported"),
        ({"\x00\x1b[2J": 1}, "option '\\x00\\x1b[2J' = 1 is not supported"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)  # fmt: skip
def test_options_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write(tmp_path, pair("model.0.q"), **config)
    refused(tmp_path, message)


HARMLESS = {
    "auto_mapping": None, "base_model_name_or_path": "/x", "bias": "none", "corda_config": None,
    "eva_config": None, "exclude_modules": ["x"], "fan_in_fan_out": True, "inference_mode": True,
    "init_lora_weights": "gaussian", "layer_replication": None, "layers_pattern": "layers",
    "layers_to_transform": [0], "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.1,
    "megatron_config": {"x": 1}, "megatron_core": "megatron.core", "modules_to_save": [],
    "peft_version": "9", "qalora_group_size": 16, "revision": "main", "target_modules": "all",
    "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": None, "rank_pattern": None,
    "runtime_config": {"ephemeral_gpu_offload": True}, "of_the_future": None,
}  # fmt: skip


def test_options_that_say_nothing(tmp_path: Path) -> None:
    write(tmp_path, pair("model.0.q"), **HARMLESS)
    assert set(read(tmp_path).pairs) == {"model.0.q"}


def test_a_base_of_other_sizes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, pair("model.0.q"))
    target = TARGETS["model.0.q"]
    wider = target._replace(in_features=HIDDEN + 2)  # type: ignore[attr-defined]
    message = f"model.0.q.lora_A.weight has shape [2, 6], but {ASK_FOR} [2, 8]"
    refused(tmp_path, message, targets={"model.0.q": wider})
    refused(tmp_path, "this model has no module that it could belong to", targets={})


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


A = {"dtype": "F32", "shape": [RANK, HIDDEN], "data_offsets": [0, 48]}
KEY = PREFIX + "model.0.q.lora_A.weight"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has a broken safetensors header, or none"),
        (b"1234567", "has a broken safetensors header, or none"),
        (struct.pack("<Q", 1 << 62) + b"{}", "has a broken safetensors header, or none"),
        (struct.pack("<Q", 100) + b"{}", "has a broken safetensors header, or none"),
        (raw(b"{" * 100), "has a broken safetensors header, or none"),
        (raw(b"[" * 1_000_000), "has a broken safetensors header, or none"),
        (raw([]), "has a broken safetensors header, or none"),
        (raw({KEY: {}}), "has a broken safetensors header, or none"),
        (raw({KEY: A | {"dtype": "X"}}), "has a broken safetensors header, or none"),
        (raw({KEY: A | {"shape": [-2, -6]}}, b"0" * 48), "has a broken safetensors header"),
        (raw({KEY: A | {"shape": [1 << 40, 1 << 40]}}, b"0" * 48), "broken safetensors header"),
        (raw({KEY: A | {"data_offsets": [-8, 40]}}, b"0" * 48), "has a broken safetensors header"),
        (raw({KEY: A | {"data_offsets": [0, 47]}}, b"0" * 48), "has a broken safetensors header"),
        (raw({KEY: A | {"data_offsets": [1 << 60, (1 << 60) + 48]}}), "is truncated"),
        (raw({KEY: A}, b"0" * 47), "adapter_model.safetensors is truncated"),
    ],
)  # fmt: skip
def test_files_that_are_broken(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, pair("model.0.q"))
    (tmp_path / "a" / WEIGHTS).write_bytes(content)
    refused(tmp_path, message)


def test_a_sparse_file_of_a_terabyte(tmp_path: Path) -> None:
    """Nothing of it is read but the header, whatever that is said to be."""
    write(tmp_path, pair("model.0.q"))
    for file, content in ((WEIGHTS, struct.pack("<Q", 1 << 39)), ("adapter_model.bin", b"PK")):
        with (tmp_path / "a" / file).open("wb") as handle:
            handle.write(content)
            handle.truncate(1 << 40)
        refused(tmp_path, file)
        (tmp_path / "a" / file).unlink()


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["TGIS_BOMB"],))


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGIS_BOMB", str(tmp_path / "exploded"))
    write(tmp_path, {})
    (tmp_path / "a" / WEIGHTS).unlink()
    bin_file = tmp_path / "a" / "adapter_model.bin"
    torch.save({**pair("model.0.q"), "x": Bomb()}, bin_file)
    refused(tmp_path, "adapter_model.bin is broken or holds more than tensors")
    bin_file.write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "adapter_model.bin is truncated or is no file of torch.save")
    torch.save(pair("model.0.q"), bin_file, _use_new_zipfile_serialization=False)
    refused(tmp_path, "adapter_model.bin is truncated or is no file of torch.save")
    assert not (tmp_path / "exploded").exists()


def test_archives_that_are_no_plain_tensors(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "a" / WEIGHTS).unlink()
    bin_file = tmp_path / "a" / "adapter_model.bin"
    for content, message in (
        ([torch.zeros(2)], "holds no tensors by name"),
        ({1: torch.zeros(2)}, "holds more than tensors by name"),
        ({KEY: [1.0]}, "holds more than tensors by name"),
        ({KEY: torch.zeros(2, 6).to_sparse()}, "adapter_model.bin"),
        ({KEY: torch.zeros(1).expand(1 << 40)}, "has shape [1099511627776]"),
    ):
        counterpart = {KEY.replace("_A", "_B"): torch.zeros(8, 2)}
        torch.save(content | counterpart if isinstance(content, dict) else content, bin_file)
        refused(tmp_path, message)
    torch.save(pair("model.0.q"), bin_file)
    whole = bin_file.read_bytes()
    for length in range(0, len(whole), 97):
        bin_file.write_bytes(whole[:length])
        refused(tmp_path, "adapter_model.bin")
    with zipfile.ZipFile(bin_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 24))
    refused(tmp_path, "adapter_model.bin is compressed")


def attempt(root: Path) -> Lora | str:
    """What is read, or the message."""
    try:
        return read(root)
    except Refused as error:
        message = str(error)
    assert message.isprintable()
    return message


# Every example writes the same files anew.
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

GOOD = raw(
    {
        KEY: A,
        KEY.replace("_A", "_B"): {"dtype": "F32", "shape": [8, RANK], "data_offsets": [48, 112]},
    },
    b"\0" * 112,
)


@FUZZ
@given(at=st.integers(0, len(GOOD) - 1), new=st.binary(max_size=6), removed=st.integers(0, 6))
def test_changed_bytes_are_read_or_refused(
    tmp_path: Path, at: int, new: bytes, removed: int
) -> None:
    write(tmp_path, {})
    (tmp_path / "a" / WEIGHTS).write_bytes(GOOD[:at] + new + GOOD[at + removed :])
    found = attempt(tmp_path)
    assert isinstance(found, str) or set(found.pairs) == {"model.0.q"}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@FUZZ
@given(key=st.sampled_from(sorted({*CONFIG, *HARMLESS})) | st.text(max_size=8), value=values)
def test_any_option_is_read_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    if key == "peft_type":
        return
    write(tmp_path, pair("model.0.q"), **{key: value})
    found = attempt(tmp_path)
    assert isinstance(found, str) or set(found.pairs) == {"model.0.q"}
