"""The gManager's loop over simulated heartbeats: the real ``Learning``, ``make_load``, ``plan`` and ``MoveBook``."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.simulator.instance import SimulatedInstance
from benchmarks.simulator.lending import Pool
from benchmarks.simulator.moves import EndedMove
from benchmarks.simulator.recorder import Recorder
from benchmarks.simulator.routing import Gateway
from benchmarks.simulator.sequence import SimulatedSequence
from benchmarks.simulator.steps import Device
from services.core.blocks import PoolGeometry
from services.core.placement import (
    MOST_WAITING_TOLD,
    AdmissionHint,
    BlockCount,
    KvDaemonReport,
    MoveEnd,
    MoveReport,
    PoolStats,
    RunningRequest,
    WaitingRequest,
)
from services.gmanager.learning import Learning
from services.gmanager.move_book import MoveBook
from services.gmanager.planner.plan import Move, Plan
from services.gmanager.planner.planner import plan
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner_input import make_load, with_moves
from services.gmanager.view import InstanceFacts, KvDaemonFacts
from services.runtime.membership import Member

_NOISE = 0.02  # of timings, relative standard deviation


class SimulatedGManager:
    """Hears everybody, plans, and orders moves; all of it in one moment.

    Args:
        geometry: of every pool.
        workspace: blocks of every pool that are not lent.
    """

    def __init__(
        self,
        instances: Sequence[SimulatedInstance],
        pools: Sequence[Pool],
        devices: Sequence[Device],
        gateway: Gateway,
        geometry: PoolGeometry,
        workspace: int,
        policy: PlannerPolicy,
        recorder: Recorder,
        seed: int,
    ) -> None:
        self._instances = instances
        self._pools = pools
        self._devices = devices
        self._gateway = gateway
        self._geometry = geometry
        self._workspace = workspace
        self._policy = policy
        self._recorder = recorder
        self._learning = Learning()
        self._book = MoveBook(self._learning.rates)
        self._noise = random.Random(f"noise {seed}")
        self._ordered = 0
        self._kvdaemons = [f"k{instance.index:04}" for instance in instances]
        self._names = [f"i{instance.index:04}" for instance in instances]
        self._indices = {name: index for index, name in enumerate(self._kvdaemons)}
        self._members = [
            Member("instance", name, name, model="simulated", local_kvdaemon_id=kvdaemon)
            for name, kvdaemon in zip(self._names, self._kvdaemons, strict=True)
        ]
        self._daemon_members = [Member("kvdaemon", name, name) for name in self._kvdaemons]
        self.latest: Plan | None = None

    @property
    def step_error(self) -> float:
        """Median over instances of the predictions' error; 0 before the first."""
        errors = [self._learning.step_error(name) for name in self._names]
        known = [error for error in errors if error is not None]
        return statistics.median(known) if known else 0.0

    def tick(self, now: float) -> None:
        """Heartbeats, a plan, its orders and its hints."""
        self._hear(now)
        facts = [self._instance_facts(instance, now) for instance in self._instances]
        daemons = [self._daemon_facts(index, now) for index in range(len(self._pools))]
        self._book.abandon(now)
        self._book.measure(now)
        placed = {progress.request_id: where for entry in facts for progress, where in entry.running}
        self._book.forget_requests(placed.keys())
        under_way = self._book.under_way(lambda move: _blocks(placed.get(move.request_id, {}), move.creditor))
        load = make_load(facts, daemons, self._learning.known, dict(self._book.moved_at))
        self.latest = plan(with_moves(load, under_way, now), now, self._policy)
        self._give_hints(self.latest)
        running = {sequence.request_id: sequence for instance in self._instances for sequence in instance.running}
        for move in self.latest.moves:
            self._order(move, running, placed, now)

    # ------------------------------------------------------------ heartbeats

    def _hear(self, now: float) -> None:
        layers = self._geometry.layers
        for instance, name, kvdaemon in zip(self._instances, self._names, self._kvdaemons, strict=True):
            noise = self._noise.gauss(1.0, _NOISE)
            told = instance.timings.drain(layers, self._kvdaemons, noise)
            self._learning.observe(f"instance/{name}", told, now)
            self._learning.observe(f"kvdaemon/{kvdaemon}", self._devices[instance.index].drain(noise), now)
            for ended in instance.moves.drain():
                self._recorder.moves += ended.moved_blocks > 0
                self._recorder.moved_blocks += ended.moved_blocks
                self._book.reported(self._report(ended), now)

    def _report(self, ended: EndedMove) -> MoveReport:
        source, target = self._kvdaemons[ended.source], self._kvdaemons[ended.target]
        return MoveReport(ended.move_id, ended.request_id, source, target, ended.moved_blocks, ended.seconds, ended.end)

    def _instance_facts(self, instance: SimulatedInstance, now: float) -> InstanceFacts:
        return InstanceFacts(
            self._members[instance.index],
            now,
            instance.max_running,
            tuple((self._told(sequence), self._where(instance.index, sequence)) for sequence in instance.running),
            tuple(
                WaitingRequest(len(sequence.tokens), sequence.longest - len(sequence.tokens))
                for sequence in instance.waiting[:MOST_WAITING_TOLD]
            ),
        )

    def _told(self, sequence: SimulatedSequence) -> RunningRequest:
        size = self._geometry.block_tokens
        computed = sequence.computed // size * size
        return RunningRequest(sequence.request_id, sequence.request.arrival_time, computed, sequence.longest)

    def _where(self, index: int, sequence: SimulatedSequence) -> Mapping[str, BlockCount]:
        where = {self._kvdaemons[index]: BlockCount(sequence.local, True)}
        where.update({self._kvdaemons[at]: BlockCount(blocks, False) for at, blocks in sequence.remote.items()})
        return where

    def _daemon_facts(self, index: int, now: float) -> KvDaemonFacts:
        pool, block_bytes = self._pools[index], self._geometry.block_bytes
        total = pool.blocks + self._workspace
        stats = PoolStats(
            total * block_bytes,
            block_bytes,
            total,
            pool.free,
            workspace=self._workspace,
            in_use=pool.blocks - pool.free,
        )
        return KvDaemonFacts(self._daemon_members[index], now, KvDaemonReport(stats, self._geometry))

    # ------------------------------------------------------------ orders and hints

    def _order(
        self,
        move: Move,
        running: Mapping[str, SimulatedSequence],
        placed: Mapping[str, Mapping[str, BlockCount]],
        now: float,
    ) -> None:
        self._ordered += 1
        move_id = f"m{self._ordered}"
        debtor = self._instances[int(move.debtor[1:])]
        source, target = self._indices[move.source], self._indices[move.creditor]
        concerned = dict.fromkeys((move.debtor, self._names[source], self._names[target]))
        before = _blocks(placed[move.request_id], move.creditor)
        self._book.plan(move_id, move, concerned, before, now)
        answer = debtor.moves.begin(move_id, running[move.request_id], source, target, move.blocks, now)
        if isinstance(answer, MoveEnd):
            self._book.refused(move_id, answer, now)
        else:
            self._book.accepted(move_id, answer)

    def _give_hints(self, made: Plan) -> None:
        size = self._geometry.block_tokens
        hints = {hint.instance_id: AdmissionHint(hint.room_blocks * size, hint.gain) for hint in made.hints}
        for client in self._gateway.instances:
            client.take_hint(hints.get(client.instance_id))
            client.local_free_blocks = self._pools[client.index].free


def _blocks(where: Mapping[str, BlockCount], kvdaemon_id: str) -> int:
    return where[kvdaemon_id].num_blocks if kvdaemon_id in where else 0
