"""The port that Kubernetes' probes ask: gRPC's standard health service, in plain text, on a port of its own.

    service "live"    the process does what it is there for: where that is a worker thread, it has finished a round of
                      its loop lately. If not, the process is to be killed and started again.
    service "ready"   it takes part in the cluster: loaded, registered, not about to end.

A process listens here when it has loaded what it needs, and not before: until then nobody answers, which is what a
startup probe waits for. The port tells nothing else, so it needs no TLS; kubelet's probes could not do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.grpc_server import bind, make_server

Check = Callable[[], bool]


class HealthPort:
    """Answers probes from ``start`` to ``close``.

    Args:
        listen: host:port; None asks for no such port.
        live: asked on the event loop at every probe, like ``ready``; must not wait.
    """

    def __init__(self, listen: str | None, live: Check, ready: Check) -> None:
        self.address = ""
        self._server: aio.Server | None = None
        if listen is not None:
            self._server = make_server()
            health_pb2_grpc.add_HealthServicer_to_server(_HealthServicer({"live": live, "ready": ready}), self._server)
            self.address = bind(self._server, listen, allow_insecure=True)

    async def start(self) -> None:
        if self._server is not None:
            await self._server.start()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=0)


class _HealthServicer(health_pb2_grpc.HealthServicer):
    def __init__(self, checks: dict[str, Check]) -> None:
        self._checks = checks

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        check = self._checks.get(request.service)
        if check is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"services here are {', '.join(sorted(self._checks))}")
        serving = health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse(status=serving if check() else health_pb2.HealthCheckResponse.NOT_SERVING)
