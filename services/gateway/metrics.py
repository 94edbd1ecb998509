"""What a gateway holds, read when somebody asks; what happens to its requests is counted in request_metrics.py."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.gateway.generation_service import GenerationService
from services.gateway.journal import Journal
from services.gateway.router import Router
from services.runtime import metrics


class GatewayState(Collector):
    """What a gateway holds now."""

    def __init__(self, service: GenerationService, router: Router, journal: Journal) -> None:
        self._service = service
        self._router = router
        self._journal = journal

    def collect(self) -> Iterable[Metric]:
        journal = self._journal.stats
        yield metrics.REQUESTS_IN_PROGRESS.value(self._service.active)
        yield metrics.CONNECTED_INSTANCES.value(self._router.ready_instances)
        yield metrics.JOURNAL_FAILURES.value(journal.failures)
        yield metrics.JOURNAL_DROPPED.value(journal.dropped_entries)
        yield metrics.JOURNAL_QUEUED.value(journal.queued_bytes)
