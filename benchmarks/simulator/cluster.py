"""A whole cluster: the events, and who is woken by them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.simulator.costs import Link, Rates
from benchmarks.simulator.gmanager import SimulatedGManager
from benchmarks.simulator.instance import SimulatedInstance
from benchmarks.simulator.lending import Lending, NoLending, Pool, PooledMemory
from benchmarks.simulator.moves import Moves
from benchmarks.simulator.policies import ClusterSpec
from benchmarks.simulator.recorder import Outcome, PlacementSample, Recorder
from benchmarks.simulator.routing import Gateway
from benchmarks.simulator.sequence import SimulatedSequence, make_sequence
from benchmarks.simulator.steps import Device
from benchmarks.simulator.traces import MAX_OUTPUT, Arrival
from services.core.blocks import PoolGeometry
from services.gmanager.planner.policy import PlannerPolicy

TICK_S = 1.0  # between two plans, heartbeats, samples

Event = Callable[[float], None]


class Cluster:
    """Everything that is simulated, in one thread and without any real time."""

    def __init__(self, spec: ClusterSpec, arrivals: Sequence[Arrival], warmup_s: float) -> None:
        self.spec = spec
        self.recorder = Recorder(warmup_s)
        self._arrivals = arrivals
        self._events: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._open = len(arrivals)

        number, rates = spec.instances, Rates.of(spec.model, spec.hardware, spec.instance_devices)
        blocks, workspace, serving = spec.size(rates.kv_tokens)
        self.block_tokens = serving.block_tokens
        model = spec.model
        geometry = PoolGeometry(model.layers, model.kv_heads, serving.block_tokens, model.head_dim, "bfloat16")
        self.pools = [Pool(blocks) for _ in range(number)]
        self.devices = [Device(rates) for _ in range(number)]
        lending: Lending = PooledMemory(self.pools) if spec.policy.pooled else NoLending(self.pools)
        self.instances = []
        for index in range(number):
            links = _links(spec, index)
            moves = Moves(index, self.pools, links, serving.block_tokens, geometry.block_bytes)
            self.instances.append(
                SimulatedInstance(
                    index, serving, self.pools, self.devices, links, lending, moves, self.recorder, self._ended
                )
            )
        self._turns: list[Event | None] = [None] * number
        self._gateway = Gateway([f"i{index:04}" for index in range(number)])
        self.gmanager: SimulatedGManager | None = None
        if spec.policy.planned:
            policy = PlannerPolicy(move_bytes_per_s=spec.moves * spec.network_bytes_per_s)
            self.gmanager = SimulatedGManager(
                self.instances,
                self.pools,
                self.devices,
                self._gateway,
                geometry,
                workspace,
                policy,
                self.recorder,
                spec.seed,
            )

    def run(self, end_s: float | None = None) -> Outcome:
        """Until ``end_s``, or until all requests have been served if None."""
        if self._arrivals:
            self._at(self._arrivals[0].time_s, partial(self._arrive, 0))
        self._at(TICK_S, self._tick)
        now = 0.0
        while self._events and (self._open or end_s is not None):
            now, _, event = heapq.heappop(self._events)
            if end_s is not None and now > end_s:
                break
            event(now)
        end_s = max(now, self.recorder.begin_s + 1e-9) if end_s is None else end_s
        return self.recorder.outcome(end_s, self.gmanager.step_error if self.gmanager is not None else 0.0)

    def check_integrity(self) -> None:
        """Every block is free, or held by one request, or reserved for one move."""
        used = [0] * len(self.pools)
        for instance in self.instances:
            for sequence in instance.running:
                used[instance.index] += sequence.local
                for lender, blocks in sequence.remote.items():
                    used[lender] += blocks
                assert sequence.away == sum(sequence.remote.values())
            for sequence in instance.waiting:
                assert sequence.held == 0
            for target in range(len(self.pools)):
                used[target] += instance.moves.reserved_at(target)
        for pool, blocks in zip(self.pools, used, strict=True):
            assert 0 <= pool.free == pool.blocks - blocks

    # ------------------------------------------------------------ events

    def _at(self, time_s: float, event: Event) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def _arrive(self, number: int, now: float) -> None:
        lengths = self._arrivals[number].lengths
        sequence = make_sequence(number, lengths.prompt, lengths.output, MAX_OUTPUT, now)
        index = self._gateway.place(sequence.request_id, lengths.prompt)
        instance = self.instances[index]
        instance.submit(sequence)
        if not instance.computing:
            self._turn_at(index, now)
        if number + 1 < len(self._arrivals):
            self._at(self._arrivals[number + 1].time_s, partial(self._arrive, number + 1))

    def _turn_at(self, index: int, time_s: float) -> None:
        """The next turn of an instance; one that was to come before is none any more."""

        def turn(now: float) -> None:
            if self._turns[index] is turn:
                self._turns[index] = None
                again = self.instances[index].turn(now)
                if again is not None:
                    self._turn_at(index, again)

        self._turns[index] = turn
        self._at(time_s, turn)

    def _tick(self, now: float) -> None:
        if self.gmanager is not None:
            self.gmanager.tick(now)
        self.recorder.placements.append(self._placement(now))
        self._at(now + TICK_S, self._tick)

    def _ended(self, sequence: SimulatedSequence) -> None:
        self._open -= 1
        self._gateway.ended(sequence.request_id)

    def _placement(self, now: float) -> PlacementSample:
        lent = [0] * len(self.pools)
        own = []
        for instance in self.instances:
            own.append(sum(sequence.local for sequence in instance.running))
            for sequence in instance.running:
                for lender, blocks in sequence.remote.items():
                    lent[lender] += blocks
        return PlacementSample(now, tuple(own), tuple(lent), tuple(pool.blocks for pool in self.pools))


def _links(spec: ClusterSpec, index: int) -> list[Link]:
    """From one instance to every other; instances fill one node after the other."""
    hardware, devices = spec.hardware, spec.instance_devices
    near = Link(hardware.local_hop_s, devices * hardware.local_bytes_per_s)
    far = Link(hardware.network_hop_s, spec.network_bytes_per_s)
    per_node = max(1, hardware.devices_per_node // devices)
    return [near if other // per_node == index // per_node else far for other in range(spec.instances)]
