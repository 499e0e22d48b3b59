import json
from pathlib import Path

import huggingface_hub
import pytest

from tgis.config import SERVE, parse
from tgis.errors import ModelError
from tgis.hub.resolve import locate, resolve
from tgis.types import ModelKind

FACTS = {"model_type": "llama", "vocab_size": 7, "max_position_embeddings": 64, "eos_token_id": 2}
NAME = "some-org/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(path: Path, config=FACTS, weights=("model.safetensors",)) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (path / "config.json").write_text(text)
    for name in weights:
        (path / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return path


def write_cached(cache: Path, refs=(("main", COMMIT),), commits=(COMMIT,), name=NAME) -> Path:
    root = cache / ("models--" + name.replace("/", "--"))
    for ref, commit in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    for commit in commits:
        write_model(root / "snapshots" / commit)
    return root


def found(name, cache="", **env):
    environ = {"HF_HUB_CACHE": str(cache)} if cache else {}
    return resolve(parse([str(name)], {**environ, **env}, SERVE))


def refusal(name, cache="", **env) -> str:
    with pytest.raises(ModelError) as caught:
        found(name, cache, **env)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_directory(tmp_path):
    path = write_model(tmp_path / "m")
    files = found(path)
    assert (files.path, files.name) == (str(path), str(path))
    assert (files.model_type, files.kind) == ("llama", ModelKind.DECODER_ONLY)
    assert (files.vocab_size, files.max_length, files.eos_token_ids) == (7, 64, (2,))
    assert files.weights == ("model.safetensors",)
    assert files.config == FACTS


def test_a_relative_directory(tmp_path, monkeypatch):
    write_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert found("m").path == str(tmp_path / "m")


def test_the_demo_model(demo_model_dir):
    files = resolve(parse([], {}, SERVE))
    assert (files.path, files.name) == (str(demo_model_dir), "demo")
    assert files.eos_token_ids


@pytest.mark.parametrize(
    ("refs", "revision"),
    [
        ([("main", COMMIT)], None),
        ([("main", "f" * 40), ("v2", COMMIT)], "v2"),
        ([("main", "f" * 40), ("refs/pr/1", COMMIT)], "refs/pr/1"),
        ([("main", "f" * 40)], COMMIT),
    ],
)
def test_a_revision_in_the_cache(tmp_path, refs, revision):
    root = write_cached(tmp_path, refs, [COMMIT, "f" * 40])
    path = locate(NAME, revision, str(tmp_path))
    assert path == root / "snapshots" / COMMIT
    known = huggingface_hub.try_to_load_from_cache(
        NAME, "config.json", cache_dir=tmp_path, revision=revision
    )
    assert known == str(path / "config.json")


@pytest.mark.parametrize(
    "variable", ["HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"]
)
def test_every_cache_variable(tmp_path, variable):
    write_cached(tmp_path)
    assert found(NAME, **{variable: str(tmp_path)}).name == NAME


def test_the_cache_below_home(tmp_path):
    write_cached(tmp_path / ".cache" / "huggingface" / "hub")
    assert found(NAME, HOME=str(tmp_path)).name == NAME


def test_the_cache_wins_over_a_directory_of_the_same_name(tmp_path, monkeypatch):
    root = write_cached(tmp_path / "cache")
    write_model(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert found(NAME, tmp_path / "cache").path.startswith(str(root))
    assert found(NAME, tmp_path / "empty").path == str(tmp_path / NAME)


def test_a_snapshot_path_with_a_cache(tmp_path):
    path = write_cached(tmp_path) / "snapshots" / COMMIT
    assert found(path, tmp_path).path == str(path)


def test_an_unknown_revision_names_those_there_are(tmp_path):
    write_cached(tmp_path)
    text = refusal(NAME, tmp_path, REVISION="v9")
    prefix = "Failed to resolve config path: Config file not found in local cache for model"
    assert text.startswith(f"{prefix} {NAME}, revision v9; set --revision to one of main, {COMMIT}")


def test_a_cache_without_a_snapshot(tmp_path):
    (tmp_path / "models--a--b").mkdir()
    assert "for model a/b, revision main; " in refusal("a/b", tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "no/where", "/no/where", "a" * 5000, "a/b/c/d"])
def test_an_unknown_model(tmp_path, name):
    text = refusal(name, tmp_path)
    assert text.startswith(f"Failed to resolve config path: Model {name} not found")


def test_an_unknown_model_says_where_it_was_looked_for(tmp_path):
    assert f"in the cache {tmp_path};" in refusal("nowhere", tmp_path)
    assert "--model-name" in refusal("nowhere", tmp_path)
    assert "HF_HUB_CACHE, HF_HOME and HOME are not set" in refusal("nowhere")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "f").touch()
    assert f"Model {tmp_path / 'f'} not found: it is a file" in refusal(tmp_path / "f")


def test_a_directory_without_config(tmp_path):
    write_model(tmp_path / "m", config=None)
    assert "the directory has no config.json" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("", "is not valid JSON"),
        ('{"model_type": "llama"', "is not valid JSON"),
        ("\x00\xff", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"model_type": "\\ud800"}', "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", "model_type is missing"),
        ('{"model_type": 3}', "model_type is missing"),
        ('{"model_type": "llama", "eos_token_id": "x"}', "eos_token_id in its configuration"),
        ('{"model_type": "llama", "eos_token_id": [1, -2]}', "eos_token_id in its configuration"),
        ('{"model_type": "llama", "pad_token_id": 1.5}', "pad_token_id in its configuration"),
    ],
)
def test_a_broken_config(tmp_path, config, says):
    path = write_model(tmp_path / "m", config=config)
    text = refusal(path)
    assert says in text
    assert str(path) in text


def test_an_unreadable_config(tmp_path):
    path = write_model(tmp_path / "m", config=None)
    (path / "config.json").mkdir()
    assert "the directory has no config.json" in refusal(path)


@pytest.mark.parametrize("number", ["1" + "0" * 30, "-Infinity", "NaN", "1e999"])
def test_numbers_beyond_64_bits_do_no_harm(tmp_path, number):
    text = '{"model_type": "llama", "max_position_embeddings": 8, "other": ' + number + "}"
    assert found(write_model(tmp_path / "m", config=text)).max_length == 8


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ((), "Weights not found in local cache for model"),
        (("pytorch_model.bin",), "text-generation-server convert-to-safetensors"),
    ],
)
def test_no_weights(tmp_path, weights, says):
    assert says in refusal(write_model(tmp_path / "m", weights=weights))


def test_weights_named_by_an_index(tmp_path):
    names = ["a-1.safetensors", "a-2.safetensors"]
    path = write_model(tmp_path / "m", weights=[*names, "other.safetensors"])
    index = {"weight_map": {"x": names[1], "y": names[0], "z": names[1]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert found(path).weights == tuple(names)
    (path / names[1]).unlink()
    assert "1 of 2 weight files are missing, such as a-2.safetensors" in refusal(path)
    (path / "model.safetensors.index.json").write_text("{}")
    assert "has no usable weight_map" in refusal(path)


def test_a_git_lfs_pointer_is_no_weight_file(tmp_path):
    path = write_model(tmp_path / "m")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    assert "is a Git LFS pointer, not the weights" in refusal(path)


def test_onnx_weights_for_the_onnx_engine_alone(tmp_path):
    path = write_model(tmp_path / "m", weights=("model.onnx",))
    assert found(path, DEPLOYMENT_FRAMEWORK="hf_optimum_ort").weights == ("model.onnx",)
    assert "Weights not found" in refusal(path)
    (path / "model.onnx_data").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(ModelError, match=r"model.onnx_data is a Git LFS pointer"):
        found(path, DEPLOYMENT_FRAMEWORK="hf_optimum_ort")
    with pytest.raises(ModelError, match=r"expected encoder_model.onnx and .*only model.onnx"):
        found(
            write_model(path, FACTS | {"model_type": "t5"}), DEPLOYMENT_FRAMEWORK="hf_optimum_ort"
        )


@pytest.mark.parametrize(
    ("model", "kind", "length"),
    [
        ("stories260K", ModelKind.DECODER_ONLY, 512),
        ("babyllama105", ModelKind.DECODER_ONLY, 256),
        ("tiny-t5", ModelKind.ENCODER_DECODER, None),
    ],
)
def test_real_models(shared_dir, model, kind, length):
    files = found(shared_dir / "models" / model)
    assert (files.kind, files.max_length, files.dtype) == (kind, length, "float32")
