"""Configuration: every setting once, from flags and environment to one frozen `Config`."""

from tgis.config.limits import Limits, effective_limits
from tgis.config.parse import LAUNCHER, SERVE, Program, parse, termination_log_path
from tgis.config.service import Config, Note
from tgis.config.show import explain, help_text

__all__ = [
    "LAUNCHER",
    "SERVE",
    "Config",
    "Limits",
    "Note",
    "Program",
    "effective_limits",
    "explain",
    "help_text",
    "parse",
    "termination_log_path",
]
