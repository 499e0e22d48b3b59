"""Every setting does what the table says of it."""

import re
from pathlib import Path

import pytest

from tgis.config.fields import FIELDS

ROOM = Path(__file__).parents[2] / "src" / "tgis"
ELSEWHERE = "\n".join(
    path.read_text()
    for path in sorted(ROOM.rglob("*.py"))
    if path.parent.name != "config" or path.name == "limits.py"
)
# These are used up while the settings are read.
USED_UP = {"flash_attention", "paged_attention", "json_output", "termination_log", "num_shard"}
# Checked against the other limits although it changes nothing.
CHECKED = {"max_prompt_prefix_length"}


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - USED_UP - CHECKED))
def test_a_setting_is_read_by_the_server_or_says_that_it_is_not(name):
    setting = FIELDS[name].setting
    read = bool(re.search(rf"\b_?config\.{name}\b", ELSEWHERE))
    said = bool(setting.no_effect or setting.not_yet)
    assert read != said, "delete no_effect/not_yet of what is read, add it to what is not"
