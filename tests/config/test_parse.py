import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgis.config import LAUNCHER, SERVE, Config, Note, parse, termination_log_path
from tgis.config.fields import FIELDS, IGNORED_FIELDS, flag_of, variable_of
from tgis.errors import ConfigError

# TGIS operations §1, §2 and §14: flag, a value, what the field must hold, its default.
LAUNCHER_FLAGS = [
    ("--model-name", "m", "m", "bigscience/bloom-560m"),
    ("--revision", "r", "r", None),
    ("--deployment-framework", "hf_transformers", "hf_transformers", None),
    ("--dtype", "bfloat16", "bfloat16", None),
    ("--num-shard", "1", 1, 1),
    ("--max-concurrent-requests", "7", 7, 512),
    ("--max-sequence-length", "9", 9, None),
    ("--max-new-tokens", "8", 8, 1024),
    ("--max-batch-size", "3", 3, None),
    ("--max-prefill-padding", "0.5", 0.5, 0.2),
    ("--batch-safety-margin", "30", 30, 20),
    ("--max-waiting-tokens", "2", 2, 24),
    ("--port", "3001", 3001, 3000),
    ("--grpc-port", "8034", 8034, 8033),
    ("--shard-uds-path", "/tmp/x", "/tmp/x", "/tmp/text-generation-server"),
    ("--master-addr", "h", "h", "localhost"),
    ("--master-port", "29501", 29501, 29500),
    ("--json-output", "true", True, False),
    ("--output-special-tokens", "true", True, False),
    ("--cuda-process-memory-fraction", "0.5", 0.5, 1.0),
    ("--default-include-stop-seqs", "false", False, True),
    ("--otlp-endpoint", "http://h:4317", "http://h:4317", None),
    ("--otlp-service-name", "n", "n", "text-generation-inference.router"),
    ("--tokenization-workers", "2", 2, None),
    ("--prefix-store-path", "/p", "/p", None),
    ("--host", "127.0.0.2", "127.0.0.2", "0.0.0.0"),
]
ALIASES = [
    ("--dtype-str", "float32", "dtype", "float32"),
    ("--num-gpus", "1", "num_shard", 1),
    ("--tensor-parallel-size", "1", "num_shard", 1),
    ("--max-model-len", "77", "max_sequence_length", 77),
    ("--adapter-cache", "/a", "prefix_store_path", "/a"),
    ("--model", "m", "model_name", "m"),
    ("--engine", "tgis_native", "deployment_framework", "tgis_native"),
    ("--quantization", "none", "quantize", None),
    ("--otel-service-name", "s", "otlp_service_name", "s"),
    ("--termination-log-dir", "/t", "termination_log", "/t"),
]
OBSOLETE = ("MAX_BATCH_WEIGHT", "MAX_PREFILL_WEIGHT")


def field_of(flag: str) -> str:
    return flag[2:].replace("-", "_")


def variable(flag: str) -> str:
    return field_of(flag).upper()


@pytest.mark.parametrize(("flag", "text", "value", "default"), LAUNCHER_FLAGS)
def test_launcher_flag_variable_and_default(flag, text, value, default):
    name = field_of(flag)
    assert getattr(parse([], {}, LAUNCHER), name) == default
    for argv, env in (
        ([flag, text], {}),
        ([f"{flag}={text}"], {}),
        ([flag.replace("-", "_").replace("__", "--", 1), text], {}),
        ([], {variable(flag): text}),
    ):
        assert getattr(parse(argv, env, LAUNCHER), name) == value


@pytest.mark.parametrize(("flag", "text", "name", "value"), ALIASES)
def test_aliases_reach_their_setting(flag, text, name, value):
    for argv, env in (([flag, text], {}), ([], {variable(flag): text})):
        config = parse(argv, env, LAUNCHER)
        assert getattr(config, name) == value
        assert config.origins[name] == (flag if argv else variable(flag))


@pytest.mark.parametrize("cert", ["TLS_CERT_PATH", "SSL_CERTFILE"])
@pytest.mark.parametrize("key", ["TLS_KEY_PATH", "SSL_KEYFILE"])
def test_tls_under_both_families_of_names(cert, key, tmp_path):
    file = tmp_path / "file.pem"
    file.touch()
    config = parse([], {cert: str(file), key: str(file)}, LAUNCHER)
    assert config.tls_cert_path == config.tls_key_path == str(file)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["-p", "1"], "port", 1),
        (["-p1"], "port", 1),
        (["-p=1"], "port", 1),
        (["-g", "2"], "grpc_port", 2),
        (["-c", "0.25"], "cuda_process_memory_fraction", 0.25),
        (["--json-output"], "json_output", True),
        (["--json-output", "No"], "json_output", False),
        (["--json-output", "some/model"], "model_name", "some/model"),
        (["--json-output=YES"], "json_output", True),
        (["--no-prefix-caching"], "prefix_caching", False),
        (["some/model"], "model_name", "some/model"),
        (["--port", "1", "--port=1"], "port", 1),
        (["--kv-cache-memory", "4GiB"], "kv_cache_memory", 4 * 2**30),
        (["--kv-cache-memory", "1.5G"], "kv_cache_memory", 1_500_000_000),
        (["--kv-cache-memory", "512 mib"], "kv_cache_memory", 512 * 2**20),
        (["--kv-cache-memory", "1000000"], "kv_cache_memory", 10**6),
        (["--dtype", "half"], "dtype", "float16"),
        (["--dtype", "auto"], "dtype", None),
        (["--log-level", "WARN"], "log_level", "warning"),
        (["--log-level", "info,tower=debug"], "log_level", "info"),
        (["--log-level", "tower=debug,error"], "log_level", "error"),
        (["--host", "::1"], "host", "::1"),
        (["--host", "localhost"], "host", "localhost"),
    ],
)
def test_spellings(argv, name, value):
    assert getattr(parse(argv, {}, SERVE), name) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [(w, True) for w in ("true", "TRUE", "1", "yes", " Yes ")]
    + [(w, False) for w in ("false", "False", "0", "no")],
)
def test_boolean_words_in_the_environment(text, value):
    assert parse([], {"DEFAULT_INCLUDE_STOP_SEQS": text}, SERVE).default_include_stop_seqs is value


def test_programs_differ_in_model_and_host_alone():
    launcher, serve = (parse([], {}, program) for program in (LAUNCHER, SERVE))
    differ = [n for n in FIELDS if getattr(launcher, n) != getattr(serve, n)]
    assert differ == ["model_name", "host"]
    assert serve.model_name is None
    assert (serve.host, launcher.host) == ("127.0.0.1", "0.0.0.0")


def test_defaults_of_parse_are_those_of_the_struct():
    assert msgspec.structs.replace(parse([], {}, SERVE), notes=()) == Config()


def test_the_launcher_line_of_the_reference_suite():
    line = (
        "--model-name M --num-shard 2 --dtype-str float32 --deployment-framework hf_accelerate"
        " --port 3000 --master-port 29502 --shard-uds-path /tmp/test-2-3000-29502"
        " --max-batch-size 8 --max-waiting-tokens 10 --max-sequence-length 200"
        " --max-new-tokens 169 --output-special-tokens"
    )
    env = {"ESTIMATE_MEMORY": "manual", "PREFIX_STORE_PATH": "/prompts"}
    config = parse(line.split(), env, LAUNCHER)
    assert (config.max_sequence_length, config.max_new_tokens, config.max_batch_size) == (
        200,
        169,
        8,
    )
    assert (config.dtype, config.output_special_tokens) == ("float32", True)
    assert config.prefix_store_path == "/prompts"


numbers = st.none() | st.integers(1, 9999)


@given(flag=numbers, env=numbers, blank=st.sampled_from([None, "", " "]))
def test_flag_beats_environment_beats_default(flag, env, blank):
    argv = [] if flag is None else ["--max-new-tokens", str(flag)]
    environ = {} if blank is None else {"MAX_NEW_TOKENS": blank}
    environ |= {} if env is None else {"MAX_NEW_TOKENS": str(env)}
    config = parse(argv, environ, SERVE)
    assert config.max_new_tokens == next(v for v in (flag, env, 1024) if v is not None)
    origin = "--max-new-tokens" if flag else "MAX_NEW_TOKENS" if env else None
    assert config.origins.get("max_new_tokens") == origin


@given(
    values=st.dictionaries(
        st.sampled_from(["flag num_shard", "flag num_gpus", "NUM_SHARD", "NUM_GPUS"]),
        st.integers(1, 3),
        min_size=1,
    )
)
def test_all_names_of_one_setting_must_agree(values):
    argv = [f"--{k[5:]}={v}" for k, v in values.items() if k.startswith("flag")]
    environ = {k: str(v) for k, v in values.items() if not k.startswith("flag")}
    heard = {values.get(f"flag {n}", values.get(n.upper())) for n in ("num_shard", "num_gpus")}
    heard.discard(None)
    if len(heard) == 1:
        assert parse(argv, environ, SERVE).num_shard == heard.pop()
    else:
        with pytest.raises(ConfigError, match="are set to different values"):
            parse(argv, environ, SERVE)


words = st.text(string.printable, max_size=12) | st.sampled_from(
    [flag_of(name) for name in FIELDS] + ["--", "-", "-p", "--no-json-output", "=", "true", "7"]
)


@given(
    argv=st.lists(words, max_size=6),
    env=st.dictionaries(
        st.sampled_from([variable_of(name) for name in (*FIELDS, *IGNORED_FIELDS)]),
        words,
        max_size=4,
    ),
)
def test_anything_at_all_is_a_config_or_one_line(argv, env):
    try:
        config = parse(argv, env, SERVE)
    except ConfigError as error:
        outcome = str(error)
    else:
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config)
        outcome = "read" if copy == config else "changed on its way"
    assert outcome.isprintable()
    assert outcome != "changed on its way"


REFUSED = {name for name, field in IGNORED_FIELDS.items() if field.setting.not_yet}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused_by_name(name):
    variable_name = name.upper()
    with pytest.raises(ConfigError, match=variable_name) as caught:
        parse([], {variable_name: "1"}, SERVE)
    assert str(caught.value).isprintable()
    assert parse([], {variable_name: ""}, SERVE).speculate == "off"


def test_mlp_speculators_are_refused_and_their_batch_limit_is_ours():
    assert {"speculator_name", "speculator_n_candidates"} <= REFUSED
    wanted = r"--speculator-name=fms.*--speculate takes prompt-lookup"
    with pytest.raises(ConfigError, match=wanted):
        parse(["--speculator-name", "fms"], {}, SERVE)
    assert parse([], {"SPECULATOR_MAX_BATCH_SIZE": "4"}, SERVE).speculate_max_batch_size == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [("OFF", "off"), (" Prompt-Lookup", "prompt-lookup"), ("Org/Small", "Org/Small")],
)
def test_drafts_come_from_a_word_or_a_model(text, value):
    assert parse(["--speculate", text], {}, SERVE).speculate == value


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS.keys() - REFUSED))
def test_what_has_no_effect_is_said_once(name):
    variable_name = name.upper()
    config = parse([], {variable_name: "1"}, SERVE)
    lines = [note for note in config.notes if variable_name in note.text]
    assert len(lines) == 1
    exact = f"{variable_name} is set to 1 but this parameter will be ignored."
    if variable_name in OBSOLETE:
        assert lines == [Note("warning", exact)]
    else:
        assert lines[0].text.startswith(f"{exact} Reason: ")


def test_a_setting_of_tgis_that_changes_nothing_yet_is_said_too():
    notes = parse(["--shard-uds-path", "/x"], {}, SERVE).notes
    assert [n.level for n in notes if "--shard-uds-path is set to /x" in n.text] == ["warning"]


def test_no_two_settings_share_a_name():
    fields = [*FIELDS.values(), *IGNORED_FIELDS.values()]
    names = [name for field in fields for name in field.names]
    assert len(names) == len(set(names))
    shorts = [field.setting.short for field in fields if field.setting.short]
    assert len(shorts) == len(set(shorts))


@pytest.mark.parametrize(
    ("argv", "env", "path"),
    [
        ([], {}, "/dev/termination-log"),
        ([], {"TERMINATION_LOG_DIR": "/a"}, "/a"),
        (["--termination-log", "/b"], {"TERMINATION_LOG_DIR": "/a"}, "/b"),
        (["--port", "x", "--termination_log_dir=/c"], {}, "/c"),
        (["--termination-log"], {"TERMINATION_LOG": "/d"}, "/d"),
    ],
)
def test_the_termination_log_is_known_before_the_rest_is_right(argv, env, path):
    assert termination_log_path(argv, env) == path
