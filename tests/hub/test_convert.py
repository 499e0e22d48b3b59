"""`.bin` weights as safetensors: equal, once each, all or nothing, and no code of theirs is run."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tgis.config import Config
from tgis.errors import ModelError
from tgis.hub import convert
from tgis.hub.convert import convert_weights
from tgis.hub.resolve import resolve
from tgis.hub.safetensors import open_checkpoint
from tgis.hub.shared_tensors import duplicates
from tgis.hub.weight_files import has_safetensors, weight_files

BIN, ST = "pytorch_model.bin", "model.safetensors"
BIN_INDEX, ST_INDEX = "pytorch_model.bin.index.json", "model.safetensors.index.json"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def write(directory: Path, content: Any, name: str = BIN, **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(content, directory / name, **options)
    return directory


def converted(directory: Path) -> list[str]:
    """Convert; returns what was reported."""
    lines: list[str] = []
    convert_weights(directory, lines.append)
    return lines


def refusal(directory: Path) -> str:
    """Why the conversion failed; it must have left everything as it was."""
    before = sorted(directory.iterdir())
    with pytest.raises(ModelError) as refused:
        converted(directory)
    assert sorted(directory.iterdir()) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(one: Tensor, other: Tensor) -> bool:
    """Equality of every bit."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


KINDS = {
    "float32": normal(3, 4),
    "bfloat16": normal(3, 4, dtype=torch.bfloat16),
    "float16": normal(5, dtype=torch.float16),
    "int8": torch.arange(-4, 4, dtype=torch.int8),
    "bool": torch.tensor([True, False]),
    "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 7),
    "transposed": normal(3, 4).T,
    "strided": normal(8)[::2],
    "expanded": torch.ones(1).expand(5),
    "parameter": torch.nn.Parameter(normal(2, 2)),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "plain"])
def test_tensors_of_all_kinds_come_out_bit_by_bit(
    tmp_path: Path, zipped: bool, wrapped: bool
) -> None:
    content: Any = {"state_dict": OrderedDict(KINDS), "epoch": 3} if wrapped else KINDS
    write(tmp_path, content, _use_new_zipfile_serialization=zipped)
    assert converted(tmp_path) == [f"Converting {BIN} (1 of 1)"]
    result = load_file(tmp_path / ST)
    assert result.keys() == KINDS.keys()
    assert all(same(result[name], tensor.detach()) for name, tensor in KINDS.items())
    assert metadata(tmp_path / ST) == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [ST, BIN]


def test_files_that_are_no_weights_stay(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin", "my_arguments.bin"):
        write(tmp_path, KINDS, name)
    assert converted(tmp_path) == ["No pytorch .bin files found to convert"]
    write(tmp_path, KINDS, "adapter_model.bin")
    converted(tmp_path)
    assert weight_files(tmp_path, ".safetensors") == [tmp_path / "adapter_model.safetensors"]


# Tensors that share memory


def tied(**more: Tensor) -> dict[str, Tensor]:
    weight = normal(6, 2)
    return {"lm_head.weight": weight, "model.embed_tokens.weight": weight, **more}


@pytest.mark.parametrize(
    ("architecture", "kept"),
    [
        ("LlamaForCausalLM", "model.embed_tokens.weight"),
        ("NobodysForCausalLM", "lm_head.weight"),
        (None, "lm_head.weight"),
    ],
)
def test_of_names_for_one_tensor_one_is_kept(
    tmp_path: Path, architecture: str | None, kept: str
) -> None:
    write(tmp_path, tied(other=normal(2)))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    converted(tmp_path)
    (removed,) = tied().keys() - {kept}
    assert load_file(tmp_path / ST).keys() == {kept, "other"}
    assert metadata(tmp_path / ST) == {"format": "pt", removed: kept}
    assert same(load_file(tmp_path / ST)[kept], normal(6, 2))


def test_t5_keeps_its_shared_weight(tmp_path: Path) -> None:
    names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight"]
    write(tmp_path, dict.fromkeys(names, normal(3, 3)))
    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    converted(tmp_path)
    assert load_file(tmp_path / ST).keys() == {"shared.weight"}


def test_parts_of_a_tensor_are_written_in_full(tmp_path: Path) -> None:
    whole = normal(6, 2)
    write(tmp_path, {"whole": whole, "part": whole[2:4], "flat": whole.reshape(-1)})
    converted(tmp_path)
    result = load_file(tmp_path / ST)
    assert same(result["part"], whole[2:4])
    assert same(result["flat"], whole.reshape(-1))
    assert metadata(tmp_path / ST) == {"format": "pt"}


def test_neighbours_in_one_storage_do_not_overlap(tmp_path: Path) -> None:
    storage = normal(10)
    write(tmp_path, {"a": storage[:4], "b": storage[4:7], "c": storage[7:]})
    converted(tmp_path)
    assert same(load_file(tmp_path / ST)["b"], storage[4:7])


def test_overlapping_parts_of_something_that_is_not_there(tmp_path: Path) -> None:
    storage = normal(10)
    write(tmp_path, {"a": storage[:6], "b": storage[4:], "c": normal(1)})
    assert refusal(tmp_path).startswith(
        "Error while trying to find names to remove to save state dict, but found no suitable name"
        " to keep for saving amongst: ['a', 'b']"
    )


def test_empty_tensors_share_nothing() -> None:
    empty = torch.empty(0)
    assert duplicates({"a": empty, "b": empty}, Path("config.json")) == {}


# Several files


def write_shards(path: Path) -> dict[str, Tensor]:
    shards = [tied(a=normal(2)), {"b": normal(3, 3), "none": torch.empty(0)}]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        write(path, shard, name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": 1, "x": "y"}, "weight_map": weight_map}
    (path / BIN_INDEX).write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "llama"}')
    return shards[0] | shards[1]


def test_an_index_names_the_new_files(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    assert len(converted(tmp_path)) == 2
    del tensors["model.embed_tokens.weight"]
    text = (tmp_path / ST_INDEX).read_text()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    weight_map = {"lm_head.weight": first, "a": first, "b": second, "none": second}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total, "x": "y"}, "weight_map": weight_map}
    assert text == json.dumps(index, indent=4)
    checkpoint = open_checkpoint(tmp_path)
    for name, expected in tensors.items():
        with checkpoint.tensor(name, tuple(expected.shape)) as tensor:
            assert same(tensor, expected)
    checkpoint.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: "{", "is not an index of .bin files"),
        (lambda index: "[]", "is not an index of .bin files"),
        (lambda index: json.dumps({**index, "metadata": "x"}), "is not an index of .bin files"),
        (
            lambda index: json.dumps({"weight_map": {"q": "pytorch_model-00001-of-00002.bin"}}),
            "places 'q' in pytorch_model-00001-of-00002.bin, which does not hold it",
        ),
        (
            lambda index: json.dumps({"weight_map": {"a": "pytorch_model-00003-of-00002.bin"}}),
            "places 'a' in pytorch_model-00003-of-00002.bin, which does not hold it",
        ),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, change: Any, text: str) -> None:
    write_shards(tmp_path)
    path = tmp_path / BIN_INDEX
    path.write_text(change(json.loads(path.read_text())))
    assert text in refusal(tmp_path)


def test_nothing_to_do(tmp_path: Path) -> None:
    assert converted(tmp_path) == ["No pytorch .bin files found to convert"]
    write(tmp_path, KINDS)
    (tmp_path / ST_INDEX).touch()
    (tmp_path / BIN_INDEX).touch()
    text = f"Existing {ST_INDEX} file found, remove it first to reconvert"
    assert converted(tmp_path) == [text]
    (tmp_path / ST).touch()
    text = "Existing .safetensors weights found, remove them first to reconvert"
    assert converted(tmp_path) == [text]
    other = tmp_path / "other.bin.index.json"
    other.touch()
    found = [str(other), str(tmp_path / BIN_INDEX)]
    assert converted(tmp_path) == [f"Found more than one .bin.index.json file: {found}"]


# Files that must not be trusted


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("function", [os.system, exec, os.mkdir], ids=lambda f: f.__name__)
def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zipped: bool,
    variable: str,
    function: Any,
) -> None:
    marker = tmp_path / "marker"
    argument = {
        os.system: f"touch {marker}",
        exec: f"open({str(marker)!r}, 'w')",
        os.mkdir: str(marker),
    }[function]
    if variable:
        monkeypatch.setenv(variable, "1")
    content = {"a": normal(2), "b": Bomb(function, argument)}
    path = write(tmp_path / "m", content, _use_new_zipfile_serialization=zipped)
    text = refusal(path)
    name = rf"([a-z_]+\.)?{function.__name__}"
    start = re.escape(f"cannot convert {path / BIN}: it asks for ")
    assert re.match(f"{start}{name}, which is no tensor and might run code;", text)
    assert not marker.exists()


def test_no_process_is_started_and_nothing_executed_by_a_bomb(tmp_path: Path) -> None:
    write(tmp_path, {"b": Bomb(eval, "__import__('os').system('bomb')")})
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tgis.hub.convert import convert_weights\n"
        "from tgis.errors import ModelError\n"
        "def audit(event, args):\n"
        "    started = event.startswith(('os.system', 'os.exec', 'subprocess', 'os.posix_spawn'))\n"
        "    if started or 'bomb' in repr(args) and event != 'open': print(event, args)\n"
        "sys.addaudithook(audit)\n"
        "try: convert_weights(Path(sys.argv[1]), print)\n"
        "except ModelError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"Converting {BIN} (1 of 1)", "refused"]


def test_a_script_is_no_weight_file(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(Module()).save(tmp_path / BIN)
    assert "cannot convert" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([normal(2)], "it holds no tensors by name"),
        (normal(2), "it holds no tensors by name"),
        ({"a": normal(2), "epoch": 3}, "its entry 'epoch' is no tensor but int"),
        ({"a": {"b": normal(2)}}, "its entry 'a' is no tensor but dict"),
        ({3: normal(2)}, "its entry 3 is no tensor"),
        ({"a": normal(2, 2).to_sparse()}, "which safetensors files do not hold"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "which safetensors files do not hold"),
        ({"a": torch.ones(1).expand(10**9)}, "claims 4000000000 bytes, more than the file has"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_content_that_cannot_be_converted(tmp_path: Path, content: Any, text: str) -> None:
    write(tmp_path, content)
    assert text in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_broken_file(tmp_path: Path, size: int) -> None:
    write(tmp_path, KINDS)
    path = tmp_path / BIN
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(tmp_path).startswith(f"cannot convert {path}: ")


# All or nothing


def test_a_good_file_does_not_survive_a_bad_one(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"?")
    refusal(tmp_path)


def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = convert.save_file

    def save_badly(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(convert, "save_file", save_badly)
    write(tmp_path, {"a": normal(4), "b": normal(4)})
    assert refusal(tmp_path) == "The output tensors do not match for key b"


# name of the directory -> where a conversion is killed: at the nth call of a function
DEATHS = {"verify": ("_verify", 2)} | {f"rename {n}": ("rename", n) for n in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each of `DEATHS`, as kill -9 left it."""
    root = tmp_path_factory.mktemp("killed")
    for name in DEATHS:
        write_shards(root / name)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tgis.hub import convert\n"
        f"for directory, (name, count) in {DEATHS}.items():\n"
        "    owner = Path if name == 'rename' else convert\n"
        "    def die(*args, real=getattr(owner, name), calls=[], count=count):\n"
        "        calls.append(args)\n"
        "        if len(calls) == count: os.kill(os.getpid(), 9)\n"
        "        return real(*args)\n"
        "    if (child := os.fork()) == 0:\n"
        "        setattr(owner, name, die)\n"
        "        convert.convert_weights(Path(sys.argv[1], directory), lambda line: None)\n"
        "        os._exit(0)\n"
        "    print(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(DEATHS)
    return root


@pytest.mark.parametrize("death", DEATHS)
def test_kill_9_leaves_nothing_that_is_taken_for_weights(killed: Path, death: str) -> None:
    path = killed / death
    assert not has_safetensors(path)
    with pytest.raises(ModelError):
        resolve(Config(model_name=str(path)))
    is_complete = death in ("rename 2", "rename 3", "rename 4")
    done = ["Finished a conversion that had been interrupted"]
    assert (converted(path) == done) is is_complete
    assert has_safetensors(path)
    assert not list(path.glob(".conv*"))
    checkpoint = open_checkpoint(path)
    assert all(name in checkpoint for name in ("lm_head.weight", "a", "b", "none"))
    checkpoint.close()


def test_two_conversions_at_once(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    lines: list[str] = []
    threads = [
        threading.Thread(target=convert_weights, args=(tmp_path, lines.append)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    existing = "Existing .safetensors weights found, remove them first to reconvert"
    assert lines[2:] == [existing] * 2
    checkpoint = open_checkpoint(tmp_path)
    assert all(name in checkpoint for name in tensors.keys() - {"model.embed_tokens.weight"})
    checkpoint.close()


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    write(tmp_path, {"a": normal(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        text = refusal(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    prefix = f"cannot write safetensors files to {tmp_path}: "
    assert text == f"{prefix}File too large; nothing was left there"


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, KINDS)
    size = (tmp_path / BIN).stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert f"about {size} bytes are needed, {size - 1} are free" in refusal(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, KINDS)
    (tmp_path / ".converting").write_text("in the way")
    assert refusal(tmp_path).startswith(f"cannot write safetensors files to {tmp_path}: ")
