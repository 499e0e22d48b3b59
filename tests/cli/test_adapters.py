"""`tgis adapters`: one line for each adapter, and an exit code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tgis.cli.main import main


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    for name in ("good", "team/peft", "broken", "ia3", "do.ts", "lora"):
        (root / name).mkdir(parents=True)
    torch.save(torch.zeros(4, 64), root / "good" / "decoder.pt")
    torch.save(torch.zeros(2, 64), root / "good" / "encoder.pt")
    torch.save(torch.zeros(4, 64), root / "do.ts" / "decoder.pt")
    save_file(
        {"prompt_embeddings": torch.zeros(3, 64)}, root / "team/peft/adapter_model.safetensors"
    )
    (root / "team/peft/adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    (root / "broken" / "decoder.pt").write_bytes(b"no")
    (root / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (root / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {
        f"{name}.lora_A.weight": torch.zeros(2, 64),
        f"{name}.lora_B.weight": torch.zeros(64, 2),
    }
    save_file(halves, root / "lora" / "adapter_model.safetensors")
    return root


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = main(["adapters", *words])
    return code, capsys.readouterr().out.splitlines()


def test_list(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list", str(store)) == (
        0,
        [
            "broken\tprompt",
            "do.ts\tbad: not a valid id",
            "good\tprompt",
            "ia3\tbad: adapter type IA3 is not currently supported",
            "lora\tlora",
            "team/peft\tprompt",
        ],
    )


def test_check(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "check", str(store))
    assert code == 1
    assert lines == [
        "BAD\tbroken\tdecoder.pt is truncated or is no file of torch.save",
        "BAD\tdo.ts\trequests cannot name it: only alphanumeric, _ and - and / may",
        "ok\tgood\tsoft prompt: decoder 4 x 64, encoder 2 x 64",
        "BAD\tia3\tadapter type IA3 is not currently supported",
        "ok\tlora\tLoRA of 2 tensors (--model checks whether they fit)",
        "ok\tteam/peft\tsoft prompt: decoder 3 x 64",
        "3 ok, 3 bad",
    ]


def test_a_sound_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    torch.save(torch.zeros(3, 8), tmp_path / "a" / "decoder.pt")
    assert run(capsys, "check", str(tmp_path))[0] == 0


def test_against_a_model(
    demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = json.loads((demo_model_dir / "config.json").read_text())["hidden_size"]
    for name, tensor in {"fits": torch.zeros(3, size), "wide": torch.zeros(3, size + 1)}.items():
        (tmp_path / name).mkdir()
        torch.save(tensor, tmp_path / name / "decoder.pt")
    flags = ("--model", str(demo_model_dir), "--dtype", "float32")
    code, lines = run(capsys, "check", str(tmp_path), *flags)
    assert code == 1
    assert lines == [
        f"ok\tfits\tsoft prompt: decoder 3 x {size}",
        f"BAD\twide\tPrefix embedding tensor dim {size + 1} does not match model ({size})",
        "1 ok, 1 bad",
    ]


def test_no_such_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "check", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err
