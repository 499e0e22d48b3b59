"""`grpc.health.v1.Health` with one status for several names.

The library's servicer keeps watchers until their connection ends, and so would hold up a server
that drains; here closing ends them, after they have been told.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2 as pb

from tgis.errors import Unavailable
from tgis.front.rpc import Context

HEALTH_SERVICE = pb.DESCRIPTOR.services_by_name["Health"]


class HealthService:
    """The servicer.

    Args:
        names: what checks may ask for; "" is the server as a whole.
        is_serving: the truth, asked at each check so that no answer can be stale.
    """

    def __init__(self, names: Sequence[str], is_serving: Callable[[], bool]) -> None:
        self._names = frozenset(names)
        self._is_serving = is_serving
        self._closed = False
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """The truth has changed: tell the watchers."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """NOT_SERVING for good; whoever watches is told, and the watch ends."""
        self._closed = True
        self.changed()

    @property
    def _status(self) -> pb.HealthCheckResponse.ServingStatus:
        answer = pb.HealthCheckResponse
        serving = not self._closed and self._is_serving()
        return answer.SERVING if serving else answer.NOT_SERVING

    async def Check(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        """The status of one name."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return pb.HealthCheckResponse(status=self._status)

    async def List(  # noqa: N802
        self, request: pb.HealthListRequest, context: Context
    ) -> pb.HealthListResponse:
        """The status of every name."""
        status = pb.HealthCheckResponse(status=self._status)
        return pb.HealthListResponse(statuses=dict.fromkeys(self._names, status))

    async def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Context
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The status of one name, now and whenever it changes."""
        is_known = request.service in self._names
        last: pb.HealthCheckResponse.ServingStatus | None = None
        while True:
            changed = self._changed
            status = self._status if is_known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                yield pb.HealthCheckResponse(status=status)
                last = status
            elif self._closed:
                raise Unavailable("the server is shutting down")
            else:
                await changed.wait()
