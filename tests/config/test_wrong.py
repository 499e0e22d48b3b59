import pytest
from tests.config.wrong import WRONG, Wrong

from tgis.config import LAUNCHER, SERVE, parse
from tgis.errors import ConfigError


def _name(wrong: Wrong) -> str:
    return ascii(wrong.args or wrong.env)


@pytest.mark.parametrize("wrong", WRONG, ids=_name)
def test_a_wrong_configuration_is_one_line_with_flag_value_and_fix(wrong, tmp_path):
    file = tmp_path / "file.pem"
    file.touch()
    with pytest.raises(ConfigError) as caught:
        parse(wrong.args.format(file=file).split(" ") if wrong.args else [], wrong.env, SERVE)
    message = str(caught.value)
    assert message.isprintable()  # so it is one line
    assert len(message) < 600
    for part in wrong.says:
        assert part in message
    assert caught.value.exit_code == 2


def test_the_launcher_takes_no_positional_argument():
    with pytest.raises(ConfigError, match="some-model: unexpected argument; settings are flags"):
        parse(["some-model"], {}, LAUNCHER)


def test_a_long_value_is_cut():
    with pytest.raises(ConfigError) as caught:
        parse(["--port", "9" * 10_000], {}, SERVE)
    assert len(str(caught.value)) < 300


def test_the_table_is_as_large_as_promised():
    assert len(WRONG) >= 50
