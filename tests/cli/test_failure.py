import pytest

from tgis.cli.failure import MAX_LOG_BYTES, exit_code_of
from tgis.errors import ConfigError, ModelError


def fail(error):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (ModelError, 1)])
def test_a_startup_error_is_one_line_twice_and_an_exit_code(error, code, tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text("something older and longer than the new line")
    assert exit_code_of(fail(error("a setting\nis wrong")), "tgis serve", str(log)) == code
    assert capsys.readouterr() == ("", "tgis serve: a setting is wrong\n")
    assert log.read_text() == "a setting is wrong\n"


def test_the_termination_log_is_bounded(tmp_path):
    log = tmp_path / "log"
    exit_code_of(fail(ModelError("x" * 10_000)), "tgis", str(log))
    assert len(log.read_bytes()) == MAX_LOG_BYTES


@pytest.mark.parametrize("path", ["/no/such/directory/log", "/", ""])
def test_trouble_with_the_termination_log_is_ignored(path, capsys):
    assert exit_code_of(fail(ConfigError("wrong")), "tgis", path) == 2
    assert capsys.readouterr().err == "tgis: wrong\n"


def test_a_defect_keeps_its_traceback_and_is_logged(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(ZeroDivisionError):
        exit_code_of(fail(ZeroDivisionError("by zero")), "tgis", str(log))
    assert log.read_text() == "ZeroDivisionError: by zero\n"


def test_an_interrupt_is_silent(capsys):
    assert exit_code_of(fail(KeyboardInterrupt()), "tgis") == 130
    assert capsys.readouterr() == ("", "")


def test_success_writes_nothing(tmp_path):
    log = tmp_path / "log"
    assert exit_code_of(lambda: 7, "tgis", str(log)) == 7
    assert not log.exists()
