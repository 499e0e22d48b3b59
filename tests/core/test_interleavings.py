"""A short run of `tests.core.interleavings`; a million are a command."""

import pytest
from tests.core.interleavings import run


@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_keeps_the_accounts_and_the_tokens(seed: int) -> None:
    events = run(5000, seed, per_world=500)
    for name in ("copies", "hits", "preemptions", "cancelled", "expired", "failed with its step"):
        assert events[name], f"no {name}: the run proves little"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_interleavings() -> None:
    run(1_000_000, seed=1)
