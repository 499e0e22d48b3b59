"""`text-generation-launcher`: TGIS's own command line."""

import sys
from collections.abc import Sequence

from tgis import __version__
from tgis.cli.serve import serve
from tgis.config import LAUNCHER


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    if not {"-V", "--version"}.isdisjoint(argv):
        print(LAUNCHER.name, __version__)
        return 0
    return serve(argv, LAUNCHER)


if __name__ == "__main__":
    sys.exit(main())
