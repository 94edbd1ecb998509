"""The planner's loop: heartbeats in, a plan every interval, orders to the debtors' rManagers.

The loop runs in every gManager and acts only in the one that leads. What it needs it learns from heartbeats, so a new
leader begins with nothing: it plans as soon as everybody has reported, or has had the time to.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.core.errors import InfiniteLLMError
from services.core.placement import AdmissionHint, BlockCount, Heartbeat, InstanceReport
from services.gmanager.instance_client import MoveAnswer, MoveOrder
from services.gmanager.learning import Learning
from services.gmanager.move_book import NOT_LEADER, UNREACHABLE, MoveBook, MoveRecord, MoveTotals
from services.gmanager.office import Office
from services.gmanager.planner.load import ClusterLoad
from services.gmanager.planner.plan import Move, Plan
from services.gmanager.planner.planner import plan
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner_input import make_load, with_moves
from services.gmanager.view import ClusterView, InstanceFacts, KvDaemonFacts

logger = logging.getLogger(__name__)

ORDER_TIMEOUT_S = 5.0


class Orders(Protocol):
    """Where orders go."""

    async def move_blocks(self, address: str, order: MoveOrder, timeout_s: float) -> MoveAnswer: ...
    async def keep(self, addresses: frozenset[str]) -> None: ...


class Planning(Protocol):
    """What the servicer tells, and asks, the planner."""

    async def run(self) -> None:
        """Goes on until it is cancelled."""

    def observe(self, heartbeat: Heartbeat, now: float) -> None:
        """Takes in what the view has taken in."""

    def forget(self) -> None:
        """Another gManager leads from now on."""

    def step_error(self, instance_id: str) -> float | None:
        """Median relative error of the predicted step time; None before the first prediction."""

    @property
    def moves(self) -> tuple[MoveRecord, ...]:
        """The latest moves, oldest first."""

    @property
    def totals(self) -> MoveTotals:
        """Of all moves since this gManager leads."""

    @property
    def summary(self) -> PlanSummary | None:
        """Of the planner; None where it is off."""


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """The latest plan: ``throughput`` of the cluster without its moves and with them, as modelled (tokens/s)."""

    plans: int = 0
    throughput: float = 0.0
    planned_throughput: float = 0.0
    unmet: tuple[str, ...] = ()


class NoPlanning:
    """The planner is off: blocks move only as memory runs out."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    def observe(self, heartbeat: Heartbeat, now: float) -> None:
        """Nothing is learned."""

    def forget(self) -> None:
        """Nothing was known."""

    def step_error(self, instance_id: str) -> float | None:
        return None

    @property
    def moves(self) -> tuple[MoveRecord, ...]:
        return ()

    @property
    def totals(self) -> MoveTotals:
        return MoveTotals()

    @property
    def summary(self) -> PlanSummary | None:
        return None


class ActivePlanning:
    """The planner is on. Used from one event loop; only ``plan`` itself is computed in another thread.

    Args:
        clock: monotonic seconds, the ``now`` of the view.
        interval_s: from the end of one plan to the next.
        took: is told how long each plan took, in seconds.
    """

    def __init__(
        self,
        view: ClusterView,
        office: Office,
        orders: Orders,
        policy: PlannerPolicy,
        clock: Callable[[], float],
        interval_s: float,
        took: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._view = view
        self._office = office
        self._orders = orders
        self._policy = policy
        self._clock = clock
        self._interval_s = interval_s
        self._took = took
        self.forget()

    def forget(self) -> None:
        """Another gManager leads from now on, and gets the heartbeats."""
        self._learned = Learning()
        self._book = MoveBook(self._learned.rates)
        self._led_since: float | None = None
        self._summary = PlanSummary()

    @property
    def moves(self) -> tuple[MoveRecord, ...]:
        return self._book.records

    @property
    def totals(self) -> MoveTotals:
        return self._book.totals

    @property
    def summary(self) -> PlanSummary | None:
        return self._summary

    def step_error(self, instance_id: str) -> float | None:
        return self._learned.step_error(instance_id)

    def observe(self, heartbeat: Heartbeat, now: float) -> None:
        self._learned.observe(heartbeat.member, heartbeat.timings, now)
        if isinstance(heartbeat.report, InstanceReport):
            for report in heartbeat.report.moves:
                record = self._book.reported(report, now)
                if record is not None:
                    _log_end(record)

    async def run(self) -> None:
        """Plans for ever, while this gManager leads. Planning takes a quarter of the time at most."""
        took_s = 0.0
        while True:
            await asyncio.sleep(max(self._interval_s, 3 * took_s))
            if self._office.fencing_token is None:
                self._led_since = None
                continue
            now = self._clock()
            if self._led_since is None:
                self._led_since = now
            try:
                took_s = await self._plan_once(now)
            except Exception:  # a bug; the cluster goes on without plans, and this is not the time to lose its view
                logger.exception("planning failed")

    async def _plan_once(self, now: float) -> float:
        """Plans and gives the orders, if there is enough to go by. Answers how long planning took, in seconds."""
        instances, kvdaemons = self._view.instance_facts(), self._view.kvdaemon_facts()
        assert self._led_since is not None
        told = [*(facts.heard_at for facts in instances), *(facts.heard_at for facts in kvdaemons)]
        if -math.inf in told and now - self._led_since < self._policy.stale_s:
            return 0.0
        self._learned.keep({f.member.member_id for f in instances}, {f.member.member_id for f in kvdaemons})
        self._book.abandon(now)
        for record in self._book.measure(now):
            _log_gain(record)
        placed = {progress.request_id: where for facts in instances for progress, where in facts.running}
        self._book.forget_requests(placed.keys())
        under_way = self._book.under_way(lambda move: _blocks(placed.get(move.request_id, {}), move.creditor))
        known, moved_at = self._learned.known, dict(self._book.moved_at)

        def make() -> tuple[ClusterLoad, Plan]:
            load = with_moves(make_load(instances, kvdaemons, known, moved_at), under_way, now)
            return load, plan(load, now, self._policy)

        load, made = await asyncio.to_thread(make)  # for thousands of instances it takes as long as many heartbeats
        took_s = self._clock() - now
        self._took(took_s)
        if self._office.fencing_token is not None:
            unmet = tuple(f"{entry.instance_id}: {entry.reason}" for entry in made.unmet)
            self._summary = PlanSummary(self._summary.plans + 1, made.throughput, made.planned_throughput, unmet)
            self._view.set_hints(_hints(made, load))
            await self._order(made, instances, kvdaemons, now)
        return took_s

    # ------------------------------------------------------------ orders

    async def _order(
        self, made: Plan, instances: Sequence[InstanceFacts], kvdaemons: Sequence[KvDaemonFacts], now: float
    ) -> None:
        """Gives a plan's orders: one at a time to each instance, to all instances at the same time."""
        members = {facts.member.member_id: facts for facts in instances}
        daemon_addresses = {facts.member.member_id: facts.member.address for facts in kvdaemons}
        beside = {facts.member.local_kvdaemon_id: facts.member.member_id for facts in instances}
        by_instance: dict[str, list[tuple[str, Move]]] = {}
        for move in made.moves:
            move_id = secrets.token_hex(8)
            concerned = [move.debtor, *(beside[name] for name in (move.source, move.creditor) if name in beside)]
            where = next((w for p, w in members[move.debtor].running if p.request_id == move.request_id), {})
            self._book.plan(move_id, move, concerned, _blocks(where, move.creditor), now)
            by_instance.setdefault(move.debtor, []).append((move_id, move))
        await self._orders.keep(frozenset(facts.member.address for facts in instances))
        async with asyncio.TaskGroup() as tasks:
            for instance_id, moves in by_instance.items():
                tasks.create_task(self._order_all(members[instance_id].member.address, moves, daemon_addresses))

    async def _order_all(
        self, address: str, moves: Sequence[tuple[str, Move]], daemon_addresses: Mapping[str, str]
    ) -> None:
        obstacle = ""  # to all orders from here on
        for move_id, move in moves:
            token = self._office.fencing_token
            if token is None:  # the lease was lost meanwhile
                obstacle = NOT_LEADER
            if token is None or obstacle:
                self._book.refused(move_id, obstacle, self._clock())
                continue
            order = MoveOrder(
                move_id,
                token,
                move.request_id,
                move.source,
                move.creditor,
                daemon_addresses[move.creditor],
                move.blocks,
            )
            try:
                answer = await self._orders.move_blocks(address, order, ORDER_TIMEOUT_S)
            except InfiniteLLMError as error:
                logger.warning("move not ordered", extra={**_about(move_id, move), "why": str(error)})
                obstacle = UNREACHABLE
                self._book.refused(move_id, obstacle, self._clock())
                continue
            if answer.accepted_blocks:
                logger.info(
                    "move ordered",
                    extra={**_about(move_id, move), "accepted": answer.accepted_blocks, "reason": move.reason},
                )
                self._book.accepted(move_id, answer.accepted_blocks)
            else:
                logger.info("move refused", extra={**_about(move_id, move), "why": answer.refusal})
                self._book.refused(move_id, answer.refusal, self._clock())


def _blocks(where: Mapping[str, BlockCount], kvdaemon_id: str) -> int:
    return where[kvdaemon_id].num_blocks if kvdaemon_id in where else 0


def _hints(made: Plan, load: ClusterLoad) -> dict[str, AdmissionHint]:
    block_tokens = {daemon.kvdaemon_id: daemon.geometry.block_tokens for daemon in load.kvdaemons}
    sizes = {instance.instance_id: block_tokens[instance.kvdaemon_id] for instance in load.instances}
    return {
        hint.instance_id: AdmissionHint(hint.room_blocks * sizes[hint.instance_id], hint.gain) for hint in made.hints
    }


def _about(move_id: str, move: Move) -> dict[str, object]:
    return {
        "move": move_id,
        "kind": move.kind,
        "request_id": move.request_id,
        "debtor": move.debtor,
        "source": move.source,
        "destination": move.creditor,
        "blocks": move.blocks,
    }


def _log_end(record: MoveRecord) -> None:
    extra = {**_about(record.move_id, record.move), "end": record.state, "moved": record.moved_blocks}
    logger.info("move ended", extra={**extra, "seconds": round(record.seconds, 3)})


def _log_gain(record: MoveRecord) -> None:
    gains = {"predicted_gain": round(record.move.gain, 2), "measured_gain": round(record.measured_gain or 0.0, 2)}
    logger.info("move measured", extra={**_about(record.move_id, record.move), **gains})
