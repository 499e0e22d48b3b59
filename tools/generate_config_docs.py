"""Write docs/configuration.md from the table of settings; `--check` only compares."""

import sys
from pathlib import Path

from tgis.config.show import reference

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Made by tools/generate_config_docs.py from src/tgis/config: do not edit. -->

Every setting can be given as a flag or as an environment variable. A flag beats the environment,
and an empty environment variable counts as not set. In flags `-` and `_` are the same; a value
follows after a space or after `=`. A setting that is true or false takes `true`, `1`, `yes`,
`false`, `0` or `no` in any case; the flag alone means true, and `--no-` before its name false.

`tgis serve [MODEL]` and `text-generation-launcher` take the same settings. The launcher listens on
`0.0.0.0` and serves `bigscience/bloom-560m` where nothing else is said, as TGIS does; `tgis serve`
listens on `127.0.0.1` and serves the demo model.

`--print-config` shows the value of every setting and where it comes from, and ends. A wrong
setting ends the start with exit code 2 and one line that names the flag, the value and what is
expected; the same line goes into the termination log. A setting that is accepted and changes
nothing leaves one line in the log.

"""


def page() -> str:
    """The whole page."""
    return HEAD + reference()


def main() -> int:
    """Entry point."""
    if "--check" in sys.argv[1:]:
        in_step = PAGE.read_text() == page()
        if not in_step:
            print("docs/configuration.md is out of step: run tools/generate_config_docs.py")
        return 0 if in_step else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
