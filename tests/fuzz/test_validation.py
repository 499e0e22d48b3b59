import re

from tests.fuzz.validation import run

from tgis.front.validate import RULES


def test_random_requests_have_the_expected_verdicts():
    outcomes = run(count=20_000, seed=1)
    assert {"accepted", "token limited", "does not fit", "cannot be parsed"} <= set(outcomes)
    for rule in RULES:  # the run is worth something only if it breaks every rule
        pattern = re.sub(r"\\\{.*?\\\}", ".*", re.escape("refused: " + rule.text))
        assert any(re.fullmatch(pattern, outcome) for outcome in outcomes), rule.name
