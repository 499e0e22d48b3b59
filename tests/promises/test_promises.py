"""Every promise in its short form. Figures that depend on what else the machine does only show."""

import importlib

import pytest

from .figures import Promise

NAMES = [
    "core_killed",
    "core_stopped",
    "poisoned_request",
    "cancelled_streams",
    "slow_readers",
    "overload",
    "drain",
    "hostile_wire",
    "supply_chain",
    "soak",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_promise(name: str) -> None:
    promise: Promise = importlib.import_module(f"tests.promises.{name}").PROMISE
    assert promise.name == name
    print(promise.title)
    broken = [figure for figure in promise.run(full=False) if figure.steady and not figure.holds]
    assert not broken, "\n".join(map(str, broken))
