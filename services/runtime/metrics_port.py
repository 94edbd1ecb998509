"""How metrics are served: a process's registry, ``GET /metrics``, and a port for it where HTTP has no other."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.runtime import metrics
from services.runtime.http_server import HttpServer
from services.runtime.version import version

_GRACE_S = 1.0


def make_registry() -> CollectorRegistry:
    """A process's registry, with what every process tells of itself: version, processor time, memory."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(_BuildInfo())
    ProcessCollector(registry=registry)
    return registry


def metrics_route(registry: CollectorRegistry) -> Route:
    """``GET /metrics``, in Prometheus' text format; OpenMetrics would make underscores of the colons in vLLM's names.

    Collectors are asked on the event loop.
    """

    async def scrape(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return Route("/metrics", scrape)


class MetricsPort:
    """Serves ``/metrics`` over plain HTTP from ``start`` to ``close``.

    Args:
        listen: host:port; None asks for no such port.
        allow_insecure: whether other hosts may reach it.

    Raises:
        ConfigError: the address is taken, or not loopback without ``allow_insecure``.
    """

    def __init__(self, listen: str | None, registry: CollectorRegistry, allow_insecure: bool) -> None:
        self.address = ""
        self._server: HttpServer | None = None
        if listen is not None:
            app = Starlette(routes=[metrics_route(registry)])
            self._server = HttpServer(app, listen, _GRACE_S, allow_insecure, key="metrics_listen")
            self.address = self._server.address

    def start(self) -> None:
        if self._server is not None:
            self._server.start()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()


class _BuildInfo(Collector):
    def collect(self) -> Iterable[Metric]:
        yield metrics.BUILD_INFO.family([((version(),), 1)])
