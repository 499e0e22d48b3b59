"""Log lines: readable text, or JSON for machines."""

import json
import logging
import sys
import time

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO front: message`; control characters are escaped."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback after it if there is one."""
        line = (
            f"{_timestamp(record.created)} {record.levelname} {self._process}: "
            f"{escape(record.getMessage())}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys that TGIS uses."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "timestamp": _timestamp(record.created),
            "level": record.levelname,
            "message": record.getMessage(),
            "target": record.name,
            "process": self._process,
        }
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
