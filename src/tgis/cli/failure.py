"""How a command ends badly: one line on stderr, the same in the termination log, an exit code."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tgis.errors import StartupError

MAX_LOG_BYTES = 4096  # what Kubernetes keeps of a termination log


def exit_code_of(
    command: Callable[[], int], program: str, termination_log: str | None = None
) -> int:
    """Run a command; whatever is wrong becomes one line.

    Args:
        command: returns its exit code.
        program: begins the line on stderr.
        termination_log: file for the reason, if any; trouble with it is ignored.
    """
    try:
        code = command()
        sys.stdout.flush()
    except StartupError as error:
        line = " ".join(str(error).split())
        print(f"{program}: {line}", file=sys.stderr)
        _write(termination_log, line)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has seen enough, as in `tgis --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:  # a defect: its traceback is wanted
        _write(termination_log, f"{type(error).__name__}: {error}")
        raise
    return code


def _write(path: str | None, message: str) -> None:
    """Replace the file's contents; the platform shows them as the reason of the failure."""
    if path is None:
        return
    data = message.encode(errors="replace")[: MAX_LOG_BYTES - 1] + b"\n"
    try:
        Path(path).write_bytes(data)
    except OSError:
        return  # there is no such platform
