import pytest

from tgis.config import SERVE, Note, parse

OLD = "is deprecated and should not be used. Use HF_HUB_CACHE instead."


@pytest.mark.parametrize(
    ("env", "cache", "warned"),
    [
        ({}, "", []),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub", []),
        ({"HOME": "/h", "HF_HOME": "/f"}, "/f/hub", []),
        ({"HF_HOME": "/f", "HF_HUB_CACHE": "/c"}, "/c", []),
        ({"HOME": "/h", "HF_HUB_CACHE": "~/c"}, "/h/c", []),
        ({"HF_HOME": "/f", "TRANSFORMERS_CACHE": "/t"}, "/t", []),
        ({"HUGGINGFACE_HUB_CACHE": "/g"}, "/g", []),
        ({"HF_HUB_CACHE": "/c", "TRANSFORMERS_CACHE": "/c"}, "/c", ["TRANSFORMERS_CACHE"]),
        (
            {"TRANSFORMERS_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/c"},
            "/c",
            ["HUGGINGFACE_HUB_CACHE"],
        ),
        (
            {"HF_HUB_CACHE": "/c", "TRANSFORMERS_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/c"},
            "/c",
            ["TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"],
        ),
    ],
)
def test_cache_directory(env, cache, warned):
    config = parse([], env, SERVE)
    assert config.hf_hub_cache == cache
    warnings = [note for note in config.notes if "deprecated" in note.text]
    assert warnings == [Note("warning", f"{variable} {OLD}") for variable in warned]


@pytest.mark.parametrize(
    ("env", "argv", "shards", "origin"),
    [
        ({}, [], 1, None),
        ({"NUM_GPUS": "3"}, [], 3, "NUM_GPUS"),
        ({"NUM_GPUS": "2"}, ["--num-shard", "2"], 2, "--num-shard"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, [], 3, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": ""}, [], 1, "CUDA_VISIBLE_DEVICES"),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, [], 1, "NVIDIA_VISIBLE_DEVICES"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "0"},
            [],
            2,
            "CUDA_VISIBLE_DEVICES",
        ),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["--num-shard=1"], 1, "--num-shard"),
    ],
)
def test_shard_count(env, argv, shards, origin):
    config = parse(argv, env, SERVE)
    assert (config.num_shard, config.origins.get("num_shard")) == (shards, origin)
    texts = [note.text for note in config.notes]
    assert ("Defaulting num_shard to 1" in texts) == (origin is None)
    inferred = f"Inferring num_shard = {shards} from CUDA_VISIBLE_DEVICES/NVIDIA_VISIBLE_DEVICES"
    assert (inferred in texts) == ("VISIBLE" in (origin or ""))


def test_ranks_that_are_started_elsewhere():
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    config = parse([], env, SERVE)
    assert (config.rank, config.num_shard, config.local_world_size) == (1, 4, 2)
    assert parse([], {"RANK": "0", "WORLD_SIZE": "1"}, SERVE).num_shard == 1


@pytest.mark.parametrize(
    ("argv", "engine", "warning"),
    [
        ([], None, None),
        (
            ["--engine=hf_custom_tp"],
            "tgis_native",
            'The "hf_custom_tp" deployment engine name is deprecated, please use "tgis_native"',
        ),
        (["--flash-attention"], "tgis_native", None),
        (["--paged-attention", "--engine=tgis_native"], "tgis_native", None),
        (
            ["--flash-attention", "--engine=hf_transformers"],
            "tgis_native",
            "Using deployment engine tgis_native rather than hf_transformers because"
            " FLASH_ATTENTION is enabled",
        ),
        (
            ["--flash-attention", "--paged-attention", "--engine=ibm_fms"],
            "tgis_native",
            "Using deployment engine tgis_native rather than ibm_fms because"
            " PAGED_ATTENTION is enabled",
        ),
    ],
)
def test_engine(argv, engine, warning):
    config = parse(argv, {}, SERVE)
    assert config.deployment_framework == engine
    warnings = [note.text for note in config.notes if note.level == "warning"]
    assert warnings == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("argv", "log_format"),
    [
        ([], "text"),
        (["--json-output"], "json"),
        (["--json-output", "--log-format", "json"], "json"),
        (["--json-output", "false", "--log-format", "json"], "json"),
        (["--json-output", "false"], "text"),
    ],
)
def test_log_format(argv, log_format):
    assert parse(argv, {}, SERVE).log_format == log_format


def test_two_ports_of_zero_are_two_free_ports():
    config = parse(["-p0", "-g0"], {}, SERVE)
    assert (config.port, config.grpc_port) == (0, 0)
