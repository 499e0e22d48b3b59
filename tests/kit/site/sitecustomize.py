"""Runs first in every process of a server that tests have started.

`TGIS_TEST_AUDIT` names the file for what should not happen (see `tests.kit.audit`);
`TGIS_TEST_FAULTS` a module whose `install` makes parts of the server fail.
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

if record := os.environ.get("TGIS_TEST_AUDIT"):
    from tests.kit import audit

    audit.install(Path(record), server=True)

if faults := os.environ.get("TGIS_TEST_FAULTS"):
    importlib.import_module(faults).install()
