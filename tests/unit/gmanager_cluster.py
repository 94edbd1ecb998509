"""A small cluster in the gManager's eyes: members, what they report, and plans made over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gmanager_office import PlayedReign, leading
from told import told

from services.core.blocks import PoolGeometry
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    PlacementEntry,
    PoolStats,
    RunningRequest,
    WaitingRequest,
)
from services.core.timings import StepTiming
from services.gmanager.instance_client import MoveAnswer, MoveOrder
from services.gmanager.office import Office
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planning import ActivePlanning
from services.gmanager.view import ClusterView
from services.runtime.membership import Member

GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=64, head_dim=32, dtype="float32")
BLOCK = GEOMETRY.block_bytes


def instance(name: str) -> Member:
    return Member("instance", name, f"{name}:1", "m", 100_000, f"k{name}")


def pool(total: int, free: int, workspace: int = 4) -> KvDaemonReport:
    stats = PoolStats(total * BLOCK, BLOCK, total, free=free, workspace=workspace, in_use=total - free - workspace)
    return KvDaemonReport(stats, GEOMETRY)


class PlayedOrders:
    """Takes orders and answers as it is told."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, MoveOrder]] = []
        self.answer: Callable[[MoveOrder], MoveAnswer] = lambda order: MoveAnswer(order.num_blocks, "")

    async def move_blocks(self, address: str, order: MoveOrder, timeout_s: float) -> MoveAnswer:
        self.taken.append((address, order))
        return self.answer(order)

    async def keep(self, addresses: frozenset[str]) -> None:
        self.kept = addresses


class Rig:
    """A crowded instance "a" with two long requests and three waiting, and an idle one, "b"."""

    def __init__(self, took: Callable[[float], object] = lambda _: None) -> None:
        self.reign = PlayedReign(7)
        self.office: Office = leading(self.reign)
        self.view = ClusterView()
        self.orders = PlayedOrders()
        self.now = 100.0
        self.planning = ActivePlanning(
            self.view, self.office, self.orders, PlannerPolicy(settle_s=10.0), lambda: self.now, 0.01, took
        )
        self.sequences: dict[str, int] = {}
        self.view.set_instances({name: instance(name) for name in ("a", "b")}, self.now)
        self.view.set_kvdaemons({k: Member("kvdaemon", k, f"{k}:2") for k in ("ka", "kb")}, self.now)

    def say(self, member: str, report: InstanceReport | KvDaemonReport | None, *timings: object) -> None:
        sequence = self.sequences.get(member, 0)
        self.sequences[member] = sequence + 1
        heartbeat = Heartbeat(member, sequence, sequence == 0, report, timings)  # type: ignore[arg-type]
        self.view.apply(0, heartbeat, self.now)
        self.planning.observe(heartbeat, self.now)

    def crowd(self, instances: bool = True) -> None:
        self.say("kvdaemon/ka", pool(1004, 0))
        self.say("kvdaemon/kb", pool(2004, 2000))
        # Attention over a whole long context takes 40 ms, all else 5 ms: the idle instance's daemon can help.
        context, steps = 500 * 64, []
        for tokens in (1, 4):
            steps += [StepTiming(tokens, 0, context * tokens, 5e-3 + 0.04 * tokens, 0.04 * tokens, 0.04 * tokens)] * 10
        if instances:
            progress = tuple(RunningRequest(name, at, context, context + 5000) for at, name in enumerate(("r0", "r1")))
            placement = tuple(PlacementEntry(name, "ka", 500, True) for name in ("r0", "r1"))
            queue = tuple(WaitingRequest(1600, 500) for _ in range(3))
            self.say("instance/a", told(2, 3, placement, max_running=8, progress=progress, queue=queue), *steps)
            self.say("instance/b", told(0, 0, max_running=8), *steps)

    async def plans(self, count: int) -> None:
        """Lets the loop make so many plans."""
        start = self.planning.summary.plans
        running = asyncio.create_task(self.planning.run())
        try:
            async with asyncio.timeout(20):
                while self.planning.summary.plans < start + count:
                    assert not running.done()
                    await asyncio.sleep(0.005)
        finally:
            running.cancel()
            await asyncio.wait([running])

    @property
    def states(self) -> list[str]:
        return [record.state for record in self.planning.moves]
