"""Whose a call is: tenants share the engine fairly, and never a cached prefix."""

from collections.abc import Callable, Iterable
from hashlib import blake2b

from tgis.front.auth import key_in

API_KEY = "api-key"
NOBODY = b""  # the tenant of all calls that name none
_NAME_BYTES = 16

Metadata = Iterable[tuple[str, str | bytes]]


def tenants_by(source: str | None) -> Callable[[Metadata], bytes]:
    """How to find a call's tenant in its metadata.

    Args:
        source: `api-key`, or the name of a metadata entry; None = there are no tenants.

    Returns:
        metadata -> a name of fixed length, of which the original cannot be told.
    """
    if source is None:
        return lambda metadata: NOBODY

    def tenant_of(metadata: Metadata) -> bytes:
        for name, value in metadata:
            if source != API_KEY:
                given = value if name == source else None
            else:
                given = key_in(name, value)
            if given is not None:
                data = given.encode() if isinstance(given, str) else given
                return blake2b(data, digest_size=_NAME_BYTES).digest()
        return NOBODY

    return tenant_of
