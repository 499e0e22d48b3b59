"""Who a call belongs to, and how permits are shared."""

import pytest

from tgis.errors import Overloaded
from tgis.front.intake import Intake
from tgis.front.tenants import NOBODY, tenants_by
from tgis.observe.metrics import Limits, Metrics


def test_by_a_metadata_entry() -> None:
    tenant_of = tenants_by("x-tenant")
    one = tenant_of([("user-agent", "x"), ("x-tenant", "one")])
    assert len(one) == 16
    assert one == tenant_of([("x-tenant", b"one")]) != tenant_of([("x-tenant", "two")])
    assert tenant_of([("x-api-key", "one")]) == NOBODY


def test_by_api_key_however_it_is_sent() -> None:
    tenant_of = tenants_by("api-key")
    one = tenant_of([("x-api-key", "one")])
    assert one == tenant_of([("authorization", "Bearer one")]) != NOBODY
    assert tenant_of([("x-tenant", "one")]) == NOBODY


def test_without_the_setting_nobody_is_a_tenant() -> None:
    assert tenants_by(None)([("x-api-key", "one")]) == NOBODY


def intake(fair: bool) -> Intake:
    metrics = Metrics(Limits(512, 511, 8))
    return Intake(None, None, None, 8, metrics, fair)  # type: ignore[arg-type]


def take(intake: Intake, tenant: bytes) -> list[object]:
    """As many permits as the tenant can get, one by one."""
    held = []
    while True:
        permit = intake.permits(1, tenant)
        try:
            permit.__enter__()
        except Overloaded:
            return held
        held.append(permit)


@pytest.mark.parametrize(("fair", "shares"), [(False, [8, 0, 0]), (True, [4, 2, 1])])
def test_no_tenant_takes_more_permits_than_it_leaves(fair: bool, shares: list[int]) -> None:
    permits = intake(fair)
    held = [take(permits, tenant) for tenant in (b"a", b"b", b"c")]
    assert [len(each) for each in held] == shares
    for permit in (permit for each in held for permit in each):
        permit.__exit__(None, None, None)  # type: ignore[attr-defined]
    assert not permits._held
    assert len(take(permits, b"c")) == shares[0]
