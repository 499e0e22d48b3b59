"""The commands that start a server: `tgis serve` and `text-generation-launcher`."""

import os
from collections.abc import Sequence

from tgis.cli.failure import exit_code_of
from tgis.config import Program, explain, help_text, parse, termination_log_path


def serve(argv: Sequence[str], program: Program) -> int:
    """Read the settings and serve until told to stop; returns the exit code."""
    log = termination_log_path(argv, os.environ)
    return exit_code_of(lambda: _serve(argv, program), program.name, log)


def _serve(argv: Sequence[str], program: Program) -> int:
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(program))
        return 0
    settings = [word for word in argv if word not in ("--print-config", "--print_config")]
    config = parse(settings, os.environ, program)
    if len(settings) < len(argv):
        print(explain(config))
        return 0
    from tgis.serve import run  # not before the settings are known to be right

    return run(config)
