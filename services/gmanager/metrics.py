"""What a gManager knows and has done, read when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import mean

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.gmanager.move_book import MoveRecord
from services.gmanager.office import Office
from services.gmanager.planning import Planning
from services.gmanager.relays import Relays
from services.gmanager.view import ClusterView
from services.runtime import metrics


class GManagerState(Collector):
    """Asked on the event loop, which everything here belongs to."""

    def __init__(self, office: Office, view: ClusterView, planning: Planning, relays: Relays) -> None:
        self._office = office
        self._view = view
        self._planning = planning
        self._relays = relays

    def collect(self) -> Iterable[Metric]:
        now = time.monotonic()
        instances = [info.member.member_id for info in self._view.instances(now)]
        members = (
            ("instance", len(instances)),
            ("kvdaemon", len(self._view.kvdaemons(now))),
            ("gmanager", len(self._view.gmanagers())),
        )
        yield metrics.LEADS.value(self._office.fencing_token is not None)
        yield metrics.LEADER_CHANGES.value(self._office.leader_changes)
        yield metrics.MEMBERS.family(((kind,), count) for kind, count in members)
        streams = (("direct", self._relays.direct), ("relayed", self._relays.relayed))
        yield metrics.HEARTBEAT_STREAMS.family(((way,), count) for way, count in streams)
        errors = ((name, self._planning.step_error(name)) for name in instances)
        yield metrics.STEP_PREDICTION_ERROR.family(((name,), error) for name, error in errors if error is not None)
        summary = self._planning.summary
        if summary is not None:
            throughput = (("without", summary.throughput), ("with", summary.planned_throughput))
            yield metrics.PLANNED_THROUGHPUT.family(((moves,), value) for moves, value in throughput)
        yield from self._moves()

    def _moves(self) -> Iterable[Metric]:
        totals, records = self._planning.totals, self._planning.moves
        yield metrics.MOVES_IN_PROGRESS.value(sum(record.active for record in records))
        yield metrics.MOVES.family(totals.moves.items())
        yield metrics.MOVED_BLOCKS.family(((kind,), blocks) for kind, blocks in totals.blocks.items())
        measured: dict[str, list[MoveRecord]] = {}
        for record in records:
            if record.measured_gain is not None:
                measured.setdefault(record.move.kind, []).append(record)
        yield metrics.PREDICTED_GAIN.family(
            ((kind,), mean(record.move.gain for record in chosen)) for kind, chosen in measured.items()
        )
        yield metrics.MEASURED_GAIN.family(
            ((kind,), mean(record.measured_gain or 0.0 for record in chosen)) for kind, chosen in measured.items()
        )
