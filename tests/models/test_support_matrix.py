"""docs/models.md is generated, and no native family goes without a twin."""

import re

from tools.generate_models_docs import PAGE, page


def test_the_page_is_in_step() -> None:
    assert PAGE.read_text() == page(), "python -m tools.generate_models_docs"


def test_every_row_has_shapes() -> None:
    own_engines = page().partition("## Engines of other libraries")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", own_engines, re.MULTILINE)
    assert len(rows) > 30
    assert [name for name, shapes in rows if not shapes] == []
