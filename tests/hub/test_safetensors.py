import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tgis.errors import ModelError
from tgis.hub.headers import ITEM_BYTES, read_header
from tgis.hub.safetensors import DTYPES, open_checkpoint

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c.scalar": torch.tensor(7, dtype=torch.int64),
    "d.empty": torch.empty(0, 4, dtype=torch.float16),
}


def write_raw(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_index(directory: Path, weight_map: Any) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_every_tensor_reads_as_it_was_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in TENSORS.items():
        assert name in checkpoint
        with checkpoint.tensor(name, tuple(expected.shape)) as stored:
            assert stored.dtype == expected.dtype
            assert torch.equal(stored, expected)
    assert "e" not in checkpoint


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {
        name: torch.arange(8).to(torch.uint8).view(8 // dtype.itemsize, -1).view(dtype)
        for name, dtype in DTYPES.items()
        if dtype != torch.bool
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in tensors.items():
        with checkpoint.tensor(name, tuple(expected.shape)) as stored:
            assert stored.dtype == DTYPES[name]
            assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8))


def test_a_tensor_off_its_alignment(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_raw(tmp_path / "model.safetensors", text, b"\0" + struct.pack("<f", 1.5))
    with open_checkpoint(tmp_path).tensor("x", (1,)) as stored:
        assert stored.item() == 1.5


def test_a_tensor_outlives_the_checkpoint(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.tensor("a", (2, 3)) as stored:
        pass
    checkpoint.close()
    assert torch.equal(stored, TENSORS["a"])


def test_progress_counts_each_tensor_once(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    calls: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(tmp_path, lambda done, total: calls.append((done, total)))
    for name in ("a", "a", "b"):
        with checkpoint.tensor(name, tuple(TENSORS[name].shape)):
            pass
    assert checkpoint.num_bytes == 24 + 10 + 8
    assert calls == [(24, 42), (34, 42)]
    assert checkpoint.untaken() == ["c.scalar", "d.empty"]


def test_missing_tensor_and_wrong_shape(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with (
        pytest.raises(ModelError, match=r"weight nope does not exist"),
        checkpoint.tensor("nope", ()),
    ):
        pass
    wrong = re.escape(
        "weight a has shape [2, 3] in model.safetensors, but config.json asks for [3, 2]"
    )
    with pytest.raises(ModelError, match=wrong), checkpoint.tensor("a", (3, 2)):
        pass


def test_shards_with_an_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    save_file({"a": TENSORS["b"]}, tmp_path / "another-format.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.untaken() == ["a", "b"]
    assert checkpoint.info("a").file.name == "one.safetensors"


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    assert open_checkpoint(tmp_path).untaken() == ["a", "b"]
    save_file({"c": TENSORS["b"]}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).untaken() == ["c"]


def test_a_name_in_two_files(tmp_path: Path) -> None:
    for file in ("one", "two"):
        save_file({"a": TENSORS["a"]}, tmp_path / f"{file}.safetensors")
    message = "Key a was found in multiple files: one.safetensors and two.safetensors"
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, "names gone.safetensors, which is not in"),
        ({"z": "one.safetensors"}, "places z in one.safetensors, which does not hold it"),
        (["a"], "is not an index"),
        ({"a": 3}, "is not an index"),
    ],
)
def test_a_wrong_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="is not an index"):
        open_checkpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors weights found in") as caught:
        open_checkpoint(tmp_path)
    assert "convert" not in str(caught.value)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    command = f"text-generation-server convert-to-safetensors {tmp_path}"
    with pytest.raises(ModelError, match=re.escape(command)):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 20, 150, -1])
def test_a_truncated_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match="is truncated"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "needs 12 bytes"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}, "needs -8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "is truncated"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "is truncated"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype F4"),
        ({"dtype": "F32", "shape": [2]}, "broken safetensors header"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "broken safetensors header"),
        ({"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}, "broken safetensors header"),
        ("F32", "broken safetensors header"),
    ],
)
def test_a_wrong_header(tmp_path: Path, entry: Any, message: str) -> None:
    file = tmp_path / "model.safetensors"
    write_raw(file, {"x": entry}, bytes(8))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ModelError, match=f"a header of {1 << 62} bytes in a file of 10"):
        open_checkpoint(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200), length=st.integers(0, 300) | st.none())
def test_no_bytes_do_worse_than_a_model_error(
    tmp_path: Path, data: bytes, length: int | None
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(data if length is None else struct.pack("<Q", length) + data)
    try:
        read_header(file)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_the_format_has_one_table_of_sizes() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
