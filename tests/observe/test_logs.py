"""Log lines: what forms they take, and that no text can forge one."""

import json
import logging
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgis.observe.logs import JsonFormatter, TextFormatter, clip, configure, escape


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("tgis.room").makeRecord(
        "tgis.room", level, "/src/file.py", 12, message, (), None, extra=extra or None
    )
    made.created = 1767225600.25
    return made


def test_a_text_line() -> None:
    line = TextFormatter("front").format(record("a message"))
    assert line == "2026-01-01T00:00:00.250Z INFO front: a message"


def test_a_text_line_with_a_span() -> None:
    span = {"request_id": 7, "input": ["two words"], "params": 'a="b"', "none": ""}
    line = TextFormatter("front").format(record("done", logging.WARNING, span=span))
    assert line == (
        "2026-01-01T00:00:00.250Z WARN front: done "
        '{request_id=7 input="[\'two words\']" params="a=\\"b\\"" none=""}'
    )


def test_a_json_line_has_the_keys_of_tgis() -> None:
    span = {"name": "generate", "request_id": 7}
    line = JsonFormatter("front").format(record("done\n", logging.WARNING, span=span))
    assert "\n" not in line
    assert json.loads(line) == {
        "timestamp": "2026-01-01T00:00:00.250Z",
        "level": "WARN",
        "message": "done\n",
        "target": "tgis.room",
        "filename": "file.py",
        "line_number": 12,
        "process": "front",
        "span": span,
        "spans": [span],
    }


@pytest.mark.parametrize("formatter", [TextFormatter("p"), JsonFormatter("p")])
def test_defects_come_with_their_traceback(formatter: logging.Formatter) -> None:
    try:
        raise KeyError("what")
    except KeyError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    assert "KeyError: 'what'" in formatter.format(made)


@given(st.text())
def test_no_text_makes_a_second_line_or_controls_a_terminal(text: str) -> None:
    span = {"input": [text], "params": text}
    for formatter in (TextFormatter("p"), JsonFormatter("p")):
        line = formatter.format(record(text, span=span))
        assert len(line.splitlines()) == 1
        assert not any(unicodedata.category(character) == "Cc" for character in line)


def test_escape() -> None:
    assert escape("plain ü 日本") == "plain ü 日本"
    assert escape("a\nb\x1b[31m\x00") == "a\\nb\\x1b[31m\\x00"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("x" * 32, "x" * 32),
        ("x" * 33, "x" * 32 + "..."),
        ("ü" * 32, "ü" * 32),
        ("日" * 16, "日" * 16),
        ("日" * 17, "日" * 16 + "..."),
        ("x" + "日" * 16, "x" + "日" * 15 + "..."),
        ("e\u0301" * 32, "e\u0301" * 32),
        ("a" + "\u0301" * 1000, "a" + "\u0301" * 63 + "..."),
    ],
)
def test_clip(text: str, shown: str) -> None:
    assert clip(text, 32) == shown


@given(st.text())
def test_clipped_text_is_a_beginning_of_the_text(text: str) -> None:
    shown = clip(text, 32)
    assert shown == text or (shown.endswith("...") and text.startswith(shown[:-3]))
    assert len(shown) <= 67


@pytest.mark.parametrize(
    ("level", "seen"),
    [("error", 1), ("warning", 2), ("info", 3), ("debug", 4), ("trace", 4), ("off", 0)],
)
def test_levels(level: str, seen: int, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, old = root.handlers[:], root.level
    try:
        configure(level, "text", "p")
        for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("tgis.levels").log(number, "line")
        lines = re.findall("line", capsys.readouterr().out)
        assert len(lines) == seen
    finally:
        root.handlers, root.level = handlers, old
