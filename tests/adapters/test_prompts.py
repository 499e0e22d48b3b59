"""Files of soft prompts: the texts of what is wrong with them, and that hostile ones do nothing."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tgis.adapters.prompts import PromptRules, SoftPrompt, load_prompt
from tgis.adapters.store import Refused, Store
from tgis.types import AdapterKind, ModelKind

SIZE, MOST = 16, 10
SECONDS = 2.0


def rules(
    kind: ModelKind = ModelKind.DECODER_ONLY, dtype: torch.dtype = torch.float32
) -> PromptRules:
    return PromptRules(kind, SIZE, dtype, MOST)


SEQ2SEQ = rules(ModelKind.ENCODER_DECODER)


def load(root: Path, what: PromptRules | None = None) -> SoftPrompt:
    with Store(str(root)).open("a") as directory:
        return load_prompt(directory, what or rules())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


def rows(count: int, size: int = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)).to(dtype)


def text_of(place: Path, what: PromptRules | None = None) -> str:
    start = time.monotonic()
    with pytest.raises(Refused) as refused:
        load(place.parent, what)
    assert time.monotonic() - start < SECONDS
    assert refused.value.kind in (AdapterKind.PROMPT, None)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_as_tgis_stores_it(place: Path, dtype: torch.dtype) -> None:
    tensor = rows(8, dtype=dtype)
    torch.save(tensor, place / "decoder.pt")
    prompt = load(place.parent)
    assert prompt.encoder is None
    assert prompt.decoder is not None
    assert prompt.decoder.dtype == torch.float32
    assert torch.equal(prompt.decoder, tensor.float())
    assert (prompt.num_decoder, prompt.num_encoder, prompt.num_bytes) == (8, 0, 512)


def test_parameters_views_and_tensors_that_share(place: Path) -> None:
    whole = rows(10)
    torch.save(torch.nn.Parameter(whole[2:6]), place / "decoder.pt")
    prompt = load(place.parent)
    assert prompt.decoder is not None
    assert not prompt.decoder.requires_grad
    assert torch.equal(prompt.decoder, whole[2:6])
    torch.save(rows(SIZE)[:, :4].T, place / "decoder.pt")
    found = load(place.parent).decoder
    assert found is not None
    assert found.is_contiguous()


def test_parts_of_an_encoder_decoder_model(place: Path) -> None:
    torch.save(rows(8), place / "encoder.pt")
    prompt = load(place.parent, SEQ2SEQ)
    assert (prompt.num_decoder, prompt.num_encoder) == (0, 8)
    torch.save(rows(4), place / "decoder.pt")
    prompt = load(place.parent, SEQ2SEQ)
    assert (prompt.num_decoder, prompt.num_encoder, prompt.num_bytes) == (4, 8, 1024)
    assert load(place.parent).num_encoder == 0  # of no use to a decoder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_pefts_files(place: Path, suffix: str) -> None:
    tensors = {"prompt_embeddings": rows(5, dtype=torch.bfloat16)}
    if suffix == "bin":
        torch.save(tensors, place / "adapter_model.bin")
    else:
        save_file(tensors, place / "adapter_model.safetensors")
    prompt = load(place.parent)
    assert prompt.decoder is not None
    assert torch.equal(prompt.decoder, tensors["prompt_embeddings"].float())
    assert text_of(place, SEQ2SEQ) == "encoder-decoder architectures not supported for peft models"


NONE = "Invalid prefix embedding tensor"


@pytest.mark.parametrize(
    ("value", "what", "expected"),
    [
        (torch.zeros(SIZE), None, NONE),
        (torch.zeros(2, 2, SIZE), None, NONE),
        (torch.zeros(2, SIZE, dtype=torch.int64), None, NONE),
        (torch.zeros(2, SIZE, dtype=torch.bool), None, NONE),
        (torch.zeros(2, SIZE, dtype=torch.complex64), None, NONE),
        (torch.zeros(2, SIZE).to(torch.float8_e4m3fn), None, NONE),
        (torch.zeros(2, SIZE).to_sparse(), None, NONE),
        (torch.empty(2, SIZE, device="meta"), None, NONE),
        ([1.0, 2.0], None, NONE),
        ({"prompt_embeddings": torch.zeros(2, SIZE)}, None, NONE),
        (torch.zeros(0, SIZE), None, "Invalid prefix embedding length of 0"),
        (torch.zeros(11, SIZE), None, "Invalid prefix embedding length of 11"),
        (
            torch.zeros(1, 1).expand(10**12, SIZE),
            None,
            f"Invalid prefix embedding length of {10**12}",
        ),
        (
            torch.zeros(3, SIZE),
            SEQ2SEQ,
            "Encoder/decoder prefix tensor must be of even length",
        ),
        (torch.zeros(2, 17), None, "Prefix embedding tensor dim 17 does not match model (16)"),
        (torch.full((2, SIZE), torch.nan), None, "Prefix contains non-finite elements"),
        (torch.full((2, SIZE), -torch.inf), None, "Prefix contains non-finite elements"),
        (
            torch.full((2, SIZE), 1e6),
            rules(dtype=torch.float16),
            "Prefix contains non-finite elements after conversion"
            " from torch.float32 to torch.float16",
        ),
    ],
)
def test_tensors_that_will_not_do(
    place: Path, value: Any, what: PromptRules | None, expected: str
) -> None:
    torch.save(value, place / "decoder.pt")
    assert text_of(place, what) == expected


def test_the_first_rule_that_is_broken_counts(place: Path) -> None:
    torch.save(torch.full((11, 17), torch.nan), place / "decoder.pt")
    assert text_of(place, SEQ2SEQ) == "Invalid prefix embedding length of 11"


def test_nothing_there(place: Path) -> None:
    assert text_of(place) == "there is no decoder.pt"
    assert text_of(place, SEQ2SEQ) == "there is neither decoder.pt nor encoder.pt"
    save_file({"weights": rows(2)}, place / "adapter_model.safetensors")
    assert text_of(place) == "adapter_model.safetensors has no tensor prompt_embeddings"


class Bomb:
    """What unpickling would run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def archived(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive as torch lays it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_pickles_that_run_code(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(target))
    for data in (
        bomb,
        saved(Bomb(target)),
        saved({"prompt_embeddings": Bomb(target)}),
        archived({"data.pkl": bomb, "version": b"3", "byteorder": b"little"}),
    ):
        for name in ("decoder.pt", "adapter_model.bin"):
            (place / name).write_bytes(data)
            text_of(place)
            (place / name).unlink()
    assert not target.exists()


HOSTILE = (
    *("empty", "noise", "cut", "half", "tail", "two directories", "zip bomb", "no pickle"),
    *("long pickle", "deep pickle", "short storage", "many records"),
)
TRUNCATED = "decoder.pt is truncated or is no file of torch.save"
PACKED = "decoder.pt is compressed; torch.save does not do that"


@cache
def hostile_archives() -> dict[str, tuple[bytes, str]]:
    good = saved(rows(4))
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        records = {
            info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()
        }
    zeros = archived({**records, "data/0": b"\0" * (30 << 20)}, zipfile.ZIP_DEFLATED)
    broken = "decoder.pt is broken or holds more than tensors"
    more = "decoder.pt holds more than tensors"
    return {
        "empty": (b"", TRUNCATED),
        "noise": (os.urandom(1000), TRUNCATED),
        "cut": (good[:-30], TRUNCATED),
        "half": (good[: len(good) // 2], TRUNCATED),
        "tail": (good + b"\0" * 10, TRUNCATED),
        "two directories": (good + good[-22:] + b"x", TRUNCATED),
        "zip bomb": (zeros, PACKED),
        "no pickle": (archived({"version": b"3"}), broken),
        "long pickle": (archived({**records, "data.pkl": b"\x80\x02" + b"(" * (1 << 17)}), more),
        "deep pickle": (archived({**records, "data.pkl": b"\x80\x02" + b"(" * 60_000}), broken),
        "short storage": (archived({**records, "data/0": b"\0" * 8}), broken),
        "many records": (archived({f"data/{i}": b"" for i in range(100)}), more),
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(place: Path, name: str) -> None:
    data, expected = hostile_archives()[name]
    (place / "decoder.pt").write_bytes(data)
    assert text_of(place) == expected


def test_a_file_that_is_too_large_is_not_read(place: Path) -> None:
    with (place / "decoder.pt").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "exceeds the limit of" in text_of_any(place)


def text_of_any(place: Path) -> str:
    with pytest.raises(Refused) as refused:
        load(place.parent)
    return str(refused.value)


def header(content: object, length: int | None = None, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    own = {"dtype": "F32", "shape": [2, SIZE], "data_offsets": [0, 8 * SIZE]}
    return {"prompt_embeddings": {**own, **changes}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        header({}, length=1 << 63),
        header({}, length=(1 << 64) - 1),
        header(b"[" * 1000),
        header([entry()]),
        header(b"{" + b'"a":[' * 100_000),
        header(entry(), data=b"\0" * 8),
        header(entry(shape=[2, -SIZE]), data=b"\0" * 8 * SIZE),
        header(entry(shape=[1 << 62, 1 << 62]), data=b"\0" * 8 * SIZE),
        header(entry(shape="xy"), data=b"\0" * 8 * SIZE),
        header(entry(dtype="F31"), data=b"\0" * 8 * SIZE),
        header(entry(data_offsets=[-8, 8 * SIZE - 8]), data=b"\0" * 8 * SIZE),
        header(entry(data_offsets=[1e400, 5]), data=b"\0" * 8 * SIZE),
        header(entry(data_offsets=[0, 1 << 62]), data=b"\0" * 8 * SIZE),
        header(b" " * (90 << 20) + b"{}"),
    ],
)
def test_hostile_safetensors(place: Path, data: bytes) -> None:
    (place / "adapter_model.safetensors").write_bytes(data)
    text = text_of(place)
    assert "header" in text or "truncated" in text or "no tensor" in text


CHILD = """
import sys
from pathlib import Path
ran = []
def hook(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.exec", "socket.connect", "ctypes.dlopen"):
        ran.append(event)
from tests.adapters import test_prompts as t
from tgis.adapters.prompts import load_prompt
from tgis.adapters.store import Refused, Store
import torch, safetensors.torch
sys.addaudithook(hook)
refused = 0
for root in sys.argv[1:]:
    with Store(root).open("a") as directory:
        try:
            load_prompt(directory, t.rules())
        except Refused:
            refused += 1
print(refused, ran)
"""


def test_no_code_runs_and_nothing_is_called(tmp_path: Path) -> None:
    """An audit hook in a process of its own sees no call out of it."""
    cases = [data for data, _ in hostile_archives().values()]
    cases += [pickle.dumps(Bomb(tmp_path / "ran")), saved(Bomb(tmp_path / "ran"))]
    for number, data in enumerate(cases):
        (tmp_path / str(number) / "a").mkdir(parents=True)
        (tmp_path / str(number) / "a" / "decoder.pt").write_bytes(data)
    roots = [str(tmp_path / str(number)) for number in range(len(cases))]
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *roots],
        capture_output=True,
        text=True,
        cwd=repository,
        check=True,
    )
    assert done.stdout == f"{len(cases)} []\n"
