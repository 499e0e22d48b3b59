"""Log lines: readable text, or JSON for machines.

What a line is about, such as the numbers of one request, travels as `extra={"span": {...}}`.
"""

import json
import logging
import sys
import time
import unicodedata
from collections.abc import Mapping

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}


_LEVEL_NAMES = {"WARNING": "WARN", "CRITICAL": "ERROR"}  # else as Python calls them


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO front: message {key=value ...}`; no control characters."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback after it if there is one."""
        line = (
            f"{_timestamp(record.created)} {_level(record)} {self._process}: "
            f"{escape(record.getMessage())}"
        )
        if span := _span(record):
            line += " {" + " ".join(f"{key}={_word(value)}" for key, value in span.items()) + "}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys that TGIS uses."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, object] = {
            "timestamp": _timestamp(record.created),
            "level": _level(record),
            "message": record.getMessage(),
            "target": record.name,
            "filename": record.filename,
            "line_number": record.lineno,
            "process": self._process,
        }
        if span := _span(record):
            entry |= {"span": span, "spans": [span]}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(level: str, log_format: str, process: str) -> None:
    """Send all logs of this process to standard output.

    Args:
        level: trace, debug, info, warning, error or off.
        log_format: text or json.
        process: what this process is called in the lines.
    """
    handler = logging.StreamHandler(sys.stdout)
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    handler.setFormatter(formatter(process))
    logging.basicConfig(level=_LEVELS[level], handlers=[handler], force=True)


def escape(text: str) -> str:
    """Control characters as escapes, so that no text can forge a log line."""
    return text if text.isprintable() else "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def _timestamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def clip(text: str, columns: int) -> str:
    """The beginning of a text, as wide as `columns` of a terminal, and `...` if there is more."""
    width = 0
    for index, character in enumerate(text[: 2 * columns]):  # bounds characters without width
        width += _columns(character)
        if width > columns:
            return text[:index] + "..."
    return text if len(text) <= 2 * columns else text[: 2 * columns] + "..."


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _level(record: logging.LogRecord) -> str:
    return _LEVEL_NAMES.get(record.levelname, record.levelname)


def _span(record: logging.LogRecord) -> Mapping[str, object] | None:
    return getattr(record, "span", None)


def _word(value: object) -> str:
    """A value in a text line: quoted where it has spaces, quotes or characters to escape."""
    text = str(value)
    if text and text.isprintable() and not set(text) & set(' "{}='):
        return text
    return '"' + escape(text).replace('"', '\\"') + '"'
