import runpy
from pathlib import Path

import pytest

from tgis.config import LAUNCHER, SERVE, explain, help_text, parse
from tgis.config.fields import FIELDS, IGNORED_FIELDS, flag_of, variable_of

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_in_step():
    tool = runpy.run_path(str(ROOT / "tools" / "generate_config_docs.py"))
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == tool["page"](), "run tools/generate_config_docs.py"
    for name in (*FIELDS, *IGNORED_FIELDS):
        assert f"`{variable_of(name)}`" in page


def test_print_config_names_each_value_and_its_source():
    config = parse(
        ["--port", "1", "--no-prefix-caching"], {"MAX_NEW_TOKENS": "5", "HF_HOME": "/f"}, SERVE
    )
    rows = {line.split()[0]: line.split()[1:] for line in explain(config).splitlines()}
    assert list(rows) == list(FIELDS)
    assert rows["port"] == ["1", "--port"]
    assert rows["prefix_caching"] == ["false", "--no-prefix-caching"]
    assert rows["max_new_tokens"] == ["5", "MAX_NEW_TOKENS"]
    assert rows["hf_hub_cache"] == ["/f/hub", "HF_HOME"]
    assert rows["grpc_port"] == ["8033", "default"]


@pytest.mark.parametrize("program", [SERVE, LAUNCHER])
def test_help_names_every_setting_with_the_programs_default(program):
    text = help_text(program)
    for name, field in FIELDS.items():
        assert (variable_of(name) if field.setting.env_only else flag_of(name)) in text
    assert all(len(line) <= 100 for line in text.splitlines())
    host = next(line for line in text.splitlines() if "--host " in line)
    assert program.defaults.get("host", "127.0.0.1") in text[text.index(host) :][:200]


def test_every_setting_has_one_line_of_help():
    for field in FIELDS.values():
        assert field.setting.help.isprintable()
        assert len(field.setting.help) <= 90
        assert field.default is not None or field.setting.unset
