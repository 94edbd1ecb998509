"""The planner: ``plan(load, now) -> Plan``. Pure: no I/O, no clock, no randomness; the same load gives the same plan.

The greedy algorithm of Infinite-LLM (arXiv 2401.02669), whose five steps are marked below. What is different: a debtor
is who is short of memory, now or within its requests' expected growth; the numbers of blocks that are tried are those
at which somebody more fits; a creditor that is short of memory itself is relieved; blocks come home; and who lacks
nothing may have long requests on memory-only daemons as well, which then compute beside it.

Every move raises the modelled throughput of the cluster, and it goes on until nobody can gain: a plan for the load that
a plan leads to is empty.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from services.core.blocks import PoolGeometry
from services.gmanager.planner.hints import hints
from services.gmanager.planner.load import ClusterLoad, RequestLoad
from services.gmanager.planner.market import Market
from services.gmanager.planner.plan import Move, MoveKind, Plan, Unmet
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner.state import Daemon, Instance, Running, State
from services.gmanager.planner.weighing import Limit, limits, weigh

_REQUESTS = 2  # of one instance on one daemon that are tried
_CREDITORS = 2  # of either sort that are tried for one request
_NUMBERS = 6  # of blocks that are tried
_PASSES = 8
_LEAST_GAIN = 1e-6  # tokens/s; what is less may be a rounding error


class Candidate(NamedTuple):
    """A move that keeps all bounds. ``limit``: what kept it from being larger."""

    kind: MoveKind
    request: Running
    source: Daemon
    target: Daemon
    blocks: int
    gain: float
    limit: Limit


def plan(load: ClusterLoad, now: float, policy: PlannerPolicy | None = None) -> Plan:
    """Which blocks should move, and where new requests should start.

    Args:
        now: seconds of the clock that ``heard_at`` and ``moved_at`` of the load are of.
        policy: the default one if None.
    """
    return _Planner(State(load, now, policy or PlannerPolicy()), now).plan()


class _Planner:
    def __init__(self, state: State, now: float) -> None:
        self._state = state
        self._policy = state.policy
        self._now = now
        self._market = Market(state)
        self._moves: dict[tuple[Running, Daemon, Daemon], Move] = {}
        self._came_and_left: dict[Running, tuple[set[Daemon], set[Daemon]]] = {}  # daemons, in this plan
        self._fastest_s: dict[PoolGeometry, float] = {}  # of memory-only daemons, a token's attention
        for daemon in state.daemons.values():
            if daemon.owner is None and daemon.fresh:
                known_s, its_s = self._fastest_s.get(daemon.geometry, math.inf), daemon.load.costs.context_token_s
                self._fastest_s[daemon.geometry] = min(known_s, its_s)
        self._obstacle = ""  # why the instance that is looked at could not be helped, as far as is known

    def plan(self) -> Plan:
        throughput = self._state.throughput()
        unmet: list[Unmet] = []
        for _ in range(_PASSES):
            came_home = self._bring_home()
            made_room, unmet = self._make_room()
            spread = self._spread()
            if not (came_home or made_room or spread):
                break
        moves, answer = tuple(self._moves.values()), hints(self._state)
        return Plan(self._now, moves, answer, tuple(unmet), throughput, self._state.throughput())

    # ------------------------------------------------------------ room for those who are short of it

    def _make_room(self) -> tuple[bool, list[Unmet]]:
        """Moves blocks away from whoever is short of memory. Answers whether any, and who stays short."""
        # Step 1: debtors, the smallest batch first.
        short = [(instance.batch, instance.id, instance) for instance in self._state.instances if instance.pressed]
        heapq.heapify(short)
        moved, unmet = False, []
        while short:
            _, _, instance = heapq.heappop(short)
            best = self._best_way_to_room(instance)
            if best is None:
                unmet.append(Unmet(instance.id, self._obstacle))
                continue
            # Step 5: apply, sort again.
            self._commit(best, instance)
            moved = True
            if instance.pressed:
                heapq.heappush(short, (instance.batch, instance.id, instance))
        return moved, sorted(unmet, key=lambda entry: entry.instance_id)

    def _best_way_to_room(self, instance: Instance) -> Candidate | None:
        if not (instance.fresh and instance.home.fresh):
            self._obstacle = f"not heard of for more than {self._policy.stale_s:g} s"
            return None
        best: Candidate | None = None
        needed = self._policy.min_gain * instance.throughput / max(1, instance.batch)
        for request, targets in self._offers_for(instance):
            kind: MoveKind = "lend" if request.instance is instance else "relieve"
            for candidate in self._tries(kind, instance, request, instance.home, targets):
                if best is None or (candidate.gain, -candidate.blocks) > (best.gain, -best.blocks):
                    best = candidate
            # Step 4 is over when the longest request can be moved with gain; else the next one is tried.
            if best is not None and best.gain >= max(needed, _LEAST_GAIN):
                return best
        if best is not None:
            bound = f" ({best.limit.why})" if best.blocks == best.limit.blocks else ""
            self._obstacle = (
                f"the best move, {best.blocks} blocks{bound} of {best.request.load.request_id} to {best.target.id}, "
                f"gains {best.gain:+.1f} tokens/s: less than {needed:.1f}"
            )
        return None

    def _offers_for(self, instance: Instance) -> Iterator[tuple[Running, Iterable[Daemon]]]:
        """Requests with blocks to take away from an instance's own daemon, each with where they could go."""
        home = instance.home
        if not home.lends:
            # Step 3: its longest request, and the creditors with most to lend.
            for request in self._largest(instance, home):
                yield request, self._creditors(instance)
            return
        # Who lends does not borrow: what it hosts goes back to its instance or to another creditor.
        self._obstacle = "what it hosted is still leaving"
        for debtor in list(home.debtors):
            if debtor.fresh and debtor.home.fresh:
                for request in self._largest(debtor, home):
                    yield request, (debtor.home, *self._creditors(debtor))
            else:
                self._obstacle = f"{debtor.id}, whose blocks it hosts, has not been heard of"

    def _largest(self, instance: Instance, source: Daemon) -> list[Running]:
        """The instance's requests with most to move away from a daemon, except those that moved lately.

        Those that this plan moves already come on top of the usual number: the next plan leaves them alone, and what it
        looks at in their place must have been looked at here, or it would find moves that this one did not.
        """
        loads = instance.load.requests
        if source is instance.home:
            moved = instance.running
            sizes = [(moved[r.request_id].movable if r.request_id in moved else r.movable_blocks, r) for r in loads]
        else:
            sizes = [(running.remote.get(source, 0), running.load) for running in instance.running.values()]
        sizes = [entry for entry in sizes if entry[0] > 0]
        settled = self._now - self._policy.settle_s
        ready = [entry for entry in sizes if entry[1].moved_at <= settled and entry[1].moved_at < self._now]
        if not ready:
            lately = f"its blocks were moved less than {self._policy.settle_s:g} s ago"
            self._obstacle = lately if sizes else "no sealed block that could move"
        moving: list[tuple[int, RequestLoad]] = []
        others: list[tuple[int, RequestLoad]] = []
        for entry in ready:
            running = instance.running.get(entry[1].request_id)
            (moving if running is not None and running in self._came_and_left else others).append(entry)
        chosen = sorted([*moving, *heapq.nsmallest(_REQUESTS, others, key=_largest_first)], key=_largest_first)
        return [instance.request(load) for _, load in chosen]

    def _creditors(self, debtor: Instance) -> Iterator[Daemon]:
        # Step 2: creditors, the one with most to lend first.
        for mapped in (True, False):
            yield from self._market.offers(debtor, mapped)

    # ------------------------------------------------------------ blocks come home

    def _bring_home(self) -> bool:
        """Moves blocks back to instances that have room again, if that helps the creditor more than it costs."""
        moved = False
        for instance in self._state.instances:
            if instance.borrowed and instance.fresh and instance.home.fresh and not instance.pressed:
                for source in [daemon for daemon in instance.borrowed if daemon.fresh]:
                    for request in self._largest(instance, source):
                        tries = self._tries("home", instance, request, source, [instance.home])
                        best = max(tries, key=lambda candidate: (candidate.gain, candidate.blocks), default=None)
                        if best is not None and best.gain > _LEAST_GAIN:
                            self._commit(best, instance)
                            moved = True
        return moved

    # ------------------------------------------------------------ attention in several places at once

    def _spread(self) -> bool:
        """Moves blocks of those whose steps are attention for a good part to daemons with nobody to compute for."""
        moved = False
        for instance in self._state.instances:
            while (best := self._best_way_to_spread(instance)) is not None:
                self._commit(best, instance)
                moved = True
        return moved

    def _best_way_to_spread(self, instance: Instance) -> Candidate | None:
        home, policy = instance.home, self._policy
        if not (instance.fresh and home.fresh) or instance.pressed or home.lends:
            return None
        if instance.unclaimed > policy.spread_room * home.load.total_blocks:
            return None
        if self._most_spread(instance, self._fastest_s.get(home.geometry, math.inf)) < policy.spread_gain:
            return None
        needed = policy.spread_gain * instance.throughput
        offers = [
            daemon
            for daemon in self._market.offers(instance, mapped=False)
            if self._most_spread(instance, daemon.load.costs.context_token_s) >= policy.spread_gain
        ]
        offers.sort(key=lambda daemon: (daemon in instance.borrowed, daemon.load.costs.context_token_s))
        parts = sum(daemon not in instance.borrowed and self._room_for_speed(daemon) > 0 for daemon in offers)
        for request in self._largest(instance, home):
            for candidate in self._tries("spread", instance, request, home, offers, max(1, parts)):
                if candidate.gain >= needed:  # the smallest part that is worth it leaves most for others
                    return candidate
        return None

    def _most_spread(self, instance: Instance, there_s: float) -> float:
        """By what share one move can raise an instance's throughput at most: by all that hides.

        Args:
            there_s: a token's attention where it goes.
        """
        costs = instance.load.costs
        here_s, hidden = costs.context_token_s, self._policy.hide
        saved_s = here_s * hidden * costs.local_s(instance.tokens) / (there_s + hidden * here_s)
        return saved_s / max(instance.step_s - saved_s, saved_s)

    # ------------------------------------------------------------ one move

    def _tries(
        self,
        kind: MoveKind,
        beneficiary: Instance,
        request: Running,
        source: Daemon,
        targets: Iterable[Daemon],
        parts: int = 1,
    ) -> Iterator[Candidate]:
        """Moves of one request that keep all bounds: to the first few targets that can take anything.

        Args:
            parts: to spread, into how many of them what lies at the source could go.
        """
        home = request.instance.home
        self._obstacle = "nobody has room to lend"
        useful = {True: 0, False: 0}
        for target in targets:
            mapped = target.owner is not None
            if target is source or self._turns_back(request, source, target) or useful[mapped] == _CREDITORS:
                continue
            if target is home:
                room = self._room_at_home(request.instance)
            else:
                room = self._room_for_speed(target) if kind == "spread" else self._market.lendable(target)
            limit = min(limits(self._state, request, source, target, room), key=lambda bound: bound.blocks)
            if limit.blocks <= 0:
                self._obstacle = f"not a block of {request.load.request_id} to {target.id}: {limit.why}"
                continue
            useful[mapped] += 1
            self._obstacle = f"no move to {target.id} keeps all bounds"
            if kind == "spread":
                numbers = self._equal_parts(beneficiary, target, parts, limit.blocks)
            else:
                numbers = _halves(limit.blocks) if kind == "home" else _numbers(beneficiary, limit.blocks)
            for blocks in numbers:
                gain = weigh(self._state, request, source, target, blocks)
                if gain is not None:
                    yield Candidate(kind, request, source, target, blocks, gain, limit)

    def _turns_back(self, request: Running, source: Daemon, target: Daemon) -> bool:
        """Within one plan a request's blocks come to a daemon or leave it, not both."""
        came, left = self._came_and_left.get(request, ((), ()))
        return source in came or target in left

    def _room_at_home(self, instance: Instance) -> int:
        if instance.pressed:
            return 0
        reserve = math.ceil(self._policy.home_reserve * instance.home.load.total_blocks)
        return instance.unclaimed - reserve

    def _room_for_speed(self, daemon: Daemon) -> int:
        return self._market.lendable(daemon) - math.ceil(self._policy.spread_reserve * daemon.load.total_blocks)

    def _equal_parts(self, instance: Instance, target: Daemon, parts: int, most: int) -> list[int]:
        """Blocks for one of several daemons as fast as the target, so that all their answers just hide; fewer of them
        each time, so ascending."""
        hide, size = self._policy.hide, instance.home.geometry.block_tokens
        here_s, there_s = instance.load.costs.context_token_s * size, target.load.costs.context_token_s * size
        hidden_s = hide * instance.load.costs.local_s(instance.tokens)
        numbers = {min(most, int(hidden_s / (there_s + hide * number * here_s))) for number in _halves(parts)}
        return sorted(numbers - {0})

    def _commit(self, chosen: Candidate, beneficiary: Instance) -> None:
        request, source, target = chosen.request, chosen.source, chosen.target
        batch = beneficiary.batch
        instances, daemons = self._state.touched(request, source, target)
        self._state.shift(request, source, target, chosen.blocks)
        self._state.measure(instances, daemons)
        source.leaving += chosen.blocks
        target.coming += chosen.blocks
        if source is not request.instance.home:
            source.releasing = request.instance.returning = True
        for daemon in daemons:
            self._market.offer(daemon)
        self._record(chosen, _reason(self._state, chosen, beneficiary, batch))

    def _record(self, chosen: Candidate, reason: str) -> None:
        key = (chosen.request, chosen.source, chosen.target)
        blocks, gain = chosen.blocks, chosen.gain
        before = self._moves.get(key)
        if before is not None:
            blocks, gain, reason = blocks + before.blocks, gain + before.gain, f"{before.reason}; then {reason}"
        came, left = self._came_and_left.setdefault(chosen.request, (set(), set()))
        came.add(chosen.target)
        left.add(chosen.source)
        load = chosen.request.load
        debtor, source, creditor = chosen.request.instance.id, chosen.source.id, chosen.target.id
        self._moves[key] = Move(chosen.kind, load.request_id, debtor, source, creditor, blocks, gain, reason)


def _largest_first(entry: tuple[int, RequestLoad]) -> tuple[int, str]:
    return (-entry[0], entry[1].request_id)


def _numbers(instance: Instance, most: int) -> list[int]:
    """Blocks that are worth a try to make room in an instance's pool: as many as let one request more run, and most."""
    _, _, steps = instance.giving_way()
    spare = instance.spare
    admitted = bisect_right(instance.needs, spare)
    steps += [need - spare for need in instance.needs[admitted:]]
    steps = [blocks for blocks in steps if blocks < most]
    if len(steps) >= _NUMBERS:  # the first, the last, and some between
        steps = [steps[round(k * (len(steps) - 1) / (_NUMBERS - 2))] for k in range(_NUMBERS - 1)]
    return [*steps, most]


def _halves(most: int) -> list[int]:
    return [blocks for blocks in (most >> k for k in range(_NUMBERS)) if blocks]


def _reason(state: State, chosen: Candidate, beneficiary: Instance, batch: int) -> str:
    """In words, once the move stands in the books."""
    load, target, debtor = chosen.request.load, chosen.target, chosen.request.instance
    if chosen.kind == "home":
        why = f"{debtor.id} has {debtor.unclaimed + chosen.blocks} blocks free and unclaimed"
    elif chosen.kind == "spread":
        why = f"attention of {debtor.id} runs in one place more: a step takes {1e3 * debtor.step_s:.2f} ms then"
    else:
        why = f"{beneficiary.id} is short of memory: batch {batch} -> {beneficiary.batch}"
    parts = [why, f"{chosen.blocks} blocks of {load.request_id}"]
    if chosen.blocks == chosen.limit.blocks:
        parts[-1] += f", {chosen.limit.why}"
    if debtor.borrowed:
        answer_ms, local_ms = 1e3 * state.answer_s(debtor), 1e3 * debtor.load.costs.local_s(debtor.tokens)
        parts.append(f"answers take {answer_ms:.2f} ms beside {local_ms:.2f} ms of local attention")
    creditor = chosen.source if target is debtor.home else target
    whose = creditor.owner.id if creditor.owner is not None else creditor.id
    parts.append(f"hosting takes {creditor.hosting:.1%} of {whose}'s time")
    return "; ".join(parts)
